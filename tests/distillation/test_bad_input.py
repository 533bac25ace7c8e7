"""What cannot be learnt from, or not from this teacher, is refused in one sentence before the student changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.sparse_models import snapshot
from distillation.runs import Collate, Rows, assert_bits, lively, padding, train, words
from tiny_models import TINY, VOCABULARY
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

from sparse_ft.distillation import CachedTargets, DistillationConfig, Distiller, predictor, write_targets

KL = DistillationConfig(kl_weight=1.0)
STATES = DistillationConfig(squarehead_weight=1.0)
BOTH = DistillationConfig(kl_weight=1.0, squarehead_weight=1.0)


SETTINGS = {"kl", "squarehead", "distill", "layer", "energy", "attention", "model"}


def llama(**other: Any) -> nn.Module:
    settings: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **other}))


def refused(
    words: str, student: Any, directory: Path, config: DistillationConfig, teacher: Any = None, **more: Any
) -> None:
    """The run raises a sentence of these words, and the student is as before."""
    before = snapshot(student)
    needed = {name: p.requires_grad for name, p in student.named_parameters()}
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        train(student, directory, config, teacher, **more)
    sentence = str(caught.value)
    assert sentence[0].isupper() or sentence.split()[0].split("_")[0] in SETTINGS, sentence
    assert sentence.endswith((".", "?")) and "\n" not in sentence and ". " not in sentence.rstrip("."), sentence
    assert_bits(snapshot(student), before)
    assert {name: p.requires_grad for name, p in student.named_parameters()} == needed
    assert not list(directory.glob("checkpoint-*"))


# -- the teacher -----------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[Callable[[], nn.Module], DistillationConfig, str]] = {
    "vocabulary": (lambda: llama(vocab_size=97), KL, r"vocabulary of 96 but the teacher a vocabulary of 97: take"),
    "depth": (lambda: llama(num_hidden_layers=3), STATES, r"has 2 layers but the teacher 3.*: give .* or .?spaced"),
    "rotary embeddings": (
        lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        KL,
        r"rotary embeddings are .*default.* but the teacher's .*linear.*same RoPE scaling",
    ),
    "length": (lambda: llama(max_position_embeddings=32), KL, r"takes 64 positions but the teacher only 32"),
    "hidden size": (lambda: llama(hidden_size=64), STATES, r"have 32 channels but the teacher's 64: .*kl_weight alone"),
    "kind": (TINY["t5"], KL, r"is_encoder_decoder False but the teacher is_encoder_decoder True"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_teacher_of_other_shape(what: str, tmp_path: Path) -> None:
    make, config, sentence = OTHERS[what]
    refused(sentence, lively("llama"), tmp_path, config, make())


def test_what_a_teacher_may_have(tmp_path: Path) -> None:
    """More layers and channels, and longer sequences, where only KL is asked for."""
    teacher = llama(num_hidden_layers=3, hidden_size=64, max_position_embeddings=128)
    assert train(lively("llama"), tmp_path, KL, teacher).distill


def test_another_number_of_classes(tmp_path: Path) -> None:
    models = []
    for labels in (3, 4):
        config = TINY["bert"]().config
        config.num_labels = labels
        models.append(BertForSequenceClassification(config))
    refused("has 3 classes but the teacher 4 classes", models[0], tmp_path, KL, models[1])


def test_another_tokenizer(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    lively("llama", 1).save_pretrained(teacher)
    config = DistillationConfig(kl_weight=1.0, teacher=str(teacher))
    given = {"trainer": {"processing_class": words()}}
    assert train(lively("llama"), tmp_path / "run", config, **given).distill, "a teacher need not have a tokenizer"
    words().save_pretrained(teacher)
    assert train(lively("llama"), tmp_path / "run", config, **given).distill
    words(swapped=True).save_pretrained(teacher)
    refused(r"has id 7 for 'w7' but the tokenizer in .*teacher' has 8", lively("llama"), tmp_path, config, **given)


def test_no_teacher(tmp_path: Path) -> None:
    refused("No teacher was given: name a checkpoint", lively("llama"), tmp_path, KL)
    config = DistillationConfig(kl_weight=1.0, teacher=str(tmp_path / "nothing"))
    with pytest.raises((FileNotFoundError, ValueError), match="nothing"):
        train(lively("llama"), tmp_path, config)


def test_the_teacher_is_the_student(tmp_path: Path) -> None:
    student = lively("llama")
    refused("The teacher is the student itself", student, tmp_path, BOTH, student)
    partly = lively("llama", 1)
    partly.model.embed_tokens.weight = student.model.embed_tokens.weight
    refused("The teacher is the student itself", student, tmp_path, BOTH, partly)


def test_a_new_student_in_each_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_init makes a new student .*: give model\.$"):
        train(None, tmp_path, KL, lively("llama", 1), trainer={"model_init": lambda: lively("llama")})  # type: ignore[arg-type]


# -- the student -----------------------------------------------------------------------------------------------------


def test_nothing_that_kl_could_be_of(tmp_path: Path) -> None:
    config = TINY["bert"]().config
    with pytest.raises(ValueError, match=r"kl_weight is 1.0 but BertModel has no output head.*: set kl_weight to 0"):
        Distiller(BertModel(config), BertModel(config), KL)
    assert Distiller(BertModel(config), BertModel(config), STATES).pairs == (((1, 1), (2, 2)),)
    for settings, kind in (
        ({"num_labels": 1}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi"),
    ):
        for name, value in settings.items():
            setattr(config, name, value)
        models = [BertForSequenceClassification(config) for _ in range(2)]
        refused(rf"kl_weight is 1.0 but BertForSequenceClassification is trained on {kind}", models[0], tmp_path, KL,
                models[1])  # fmt: skip
        config.num_labels = 3


def test_labels_that_name_no_class(tmp_path: Path) -> None:
    config = TINY["bert"]().config
    config.num_labels = 3
    student, teacher = (BertForSequenceClassification(config) for _ in range(2))

    def several(rows: list[Any]) -> dict[str, Tensor]:
        batch = padding()(rows)
        return {**batch, "labels": torch.ones(len(rows), 3)}

    refused("labels are torch.float32, which name no class: set kl_weight to 0", student, tmp_path, KL, teacher,
            collate=several)  # fmt: skip


# -- the data --------------------------------------------------------------------------------------------------------


def without(*names: str) -> Collate:
    return lambda rows: {name: value for name, value in padding()(rows).items() if name not in names}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Collate:
    return lambda rows: {**(batch := padding()(rows)), name: change(batch[name])}


BATCHES: dict[str, tuple[Collate, DistillationConfig, str]] = {
    "masked": (
        changed("labels", lambda labels: torch.full_like(labels, -100)),
        KL,
        r"All 56 labels of a step are -100, so there is nothing to learn from it",
    ),
    "no mask": (without("attention_mask"), STATES, r"no attention_mask, so padding cannot be told .*no_padding=True"),
    "4-D mask": (
        changed("attention_mask", lambda mask: mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1).bool()),
        STATES,
        r"attention_mask has shape \(4, 1, 14, 14\), but padding is told by one value per token",
    ),
}


@pytest.mark.parametrize("what", BATCHES)
def test_a_batch_that_cannot_be_learnt_from(what: str, tmp_path: Path) -> None:
    collate, config, sentence = BATCHES[what]
    refused(sentence, lively("llama"), tmp_path, config, lively("llama", 1), collate=collate)


def test_a_batch_without_labels(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        return outputs.logits.float().mean()  # type: ignore[no-any-return]

    refused("The batch has .* but no labels: KL is computed where there is a label", lively("llama"), tmp_path, KL,
            lively("llama", 1), collate=without("labels"), trainer={"compute_loss_func": loss})  # fmt: skip


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from list(Rows())  # type: ignore[call-overload]


def test_a_stream_has_no_first_samples(tmp_path: Path) -> None:
    config = DistillationConfig(squarehead_weight=1.0, energy="fixed")
    refused("energy 'fixed' needs a training dataset with a length: use energy='batch'", lively("llama"), tmp_path,
            config, lively("llama", 1), data=Stream())  # fmt: skip
    assert train(lively("llama"), tmp_path, STATES, lively("llama", 1), data=Stream()).distill


# -- stored targets --------------------------------------------------------------------------------------------------


@pytest.fixture
def targets(tmp_path: Path) -> CachedTargets:
    """Of the rows that are trained on, at temperature 1."""
    teacher = lively("llama", 1)
    rows = [row["input_ids"] for row in Rows()]  # type: ignore[attr-defined]
    write_targets(tmp_path / "targets", rows, predictor(teacher), k=8, vocabulary=VOCABULARY, progress=False)
    return CachedTargets.open(tmp_path / "targets")


def test_targets_that_do_not_fit(targets: CachedTargets, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(lively("llama"), run, KL, targets).distill
    refused("squarehead_weight compares hidden states, which stored targets do not have", lively("llama"), run, BOTH,
            targets)  # fmt: skip
    config = DistillationConfig(kl_weight=1.0, temperature=2.0)
    refused(r"made at temperature 1.0 but 2.0 is asked for", lively("llama"), run, config, targets)
    refused("of a vocabulary of 96 but the student has 97", llama(vocab_size=97), run, KL, targets)
    refused(r"Row 0.*, with \d+ tokens, is not among the 4 sequences", lively("llama"), run, KL, targets,
            data=Rows(seed=1))  # fmt: skip
    refused("T5ForConditionalGeneration is an encoder-decoder, .*: give the teacher itself", lively("t5"), run, KL,
            targets)  # fmt: skip


# -- the config ------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "all 0": ({"kl_weight": 0.0}, r"kl_weight and squarehead_weight are both 0, so nothing would be learnt"),
    "all 0, states": ({"kl_weight": 0.0, "squarehead_weight": 0.0}, r"both 0"),
    "negative": ({"mse_weight": -1.0}, r"mse_weight is -1.0, but weights are finite and at least 0"),
    "not a number": ({"ce_weight": float("nan")}, r"ce_weight is nan"),
    "infinite": ({"kl_weight": float("inf")}, r"kl_weight is inf"),
    "temperature": ({"temperature": 0.0}, r"temperature is 0.0, but logits are divided by it"),
    "energy": ({"squarehead_weight": 1.0, "energy": "running"}, r"energy 'running'"),
    "samples": ({"energy_samples": 0}, r"energy_samples is 0"),
    "dtype": ({"teacher_dtype": "float8"}, r"teacher_dtype 'float8'"),
    "weights": ({"layer_weights": [1.0, -1.0]}, r"layer_weights has -1.0, but weights are finite and at least 0"),
    "no layer": ({"distill_layers": ["first"]}, r"distill_layers has 'first', but entries are student:teacher"),
    "twice": ({"distill_layers": ["1:1", "1:2"]}, r"names student layer 1 twice"),
    "bits": ({"teacher_quantization": "2bit"}, r"2bit.*8bit"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_makes_no_sense(what: str) -> None:
    settings, sentence = CONFIGS[what]
    with pytest.raises(ValueError, match=sentence):
        DistillationConfig(**settings)


LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "not there": ({"distill_layers": ["3"]}, r"layer 3 of the student, which has layers 1 to 2"),
    "backwards": ({"distill_layers": ["1:2", "2:1"]}, r"have to follow the order"),
    "weights": ({"layer_weights": [1.0]}, r"1 layer_weights for 2 compared layers"),
}


@pytest.mark.parametrize("what", LAYERS)
def test_layers_that_are_not_there(what: str, tmp_path: Path) -> None:
    settings, sentence = LAYERS[what]
    config = DistillationConfig(squarehead_weight=1.0, **settings)
    refused(sentence, lively("llama"), tmp_path, config, lively("llama", 1))
