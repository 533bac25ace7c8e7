"""A teacher for models and trainers of other kinds: encoder-decoders, encoders, classifiers, TRL, other depths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distillation.runs import (
    Rows,
    Run,
    assert_same,
    gradients,
    layer_term,
    lively,
    padding,
    states_term,
    terms,
    token_terms,
    total,
    train,
    words,
)
from tiny_models import TINY, VOCABULARY
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    CLIPVisionConfig,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from trl import SFTConfig, SFTTrainer

from sparse_ft.distillation import DistillationConfig

ALL = DistillationConfig(ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0)
WEIGHTS = (ALL.ce_weight, ALL.kl, 0.3)


def assert_run(run: Run, expected: dict[str, Tensor], parts: dict[str, Tensor], loss: float) -> None:
    """The gradient, the loss and the parts that were logged."""
    assert run.logged("loss") == [pytest.approx(loss, rel=1e-5)]
    assert_same(run.gradients[0], expected)
    for name, value in parts.items():
        assert run.distill[0][f"distill/{name}"] == pytest.approx(value.item(), rel=1e-4), name


# -- encoder-decoders ------------------------------------------------------------------------------------------------


class Pairs(Rows):
    """Sources of one length, targets of another."""

    def __init__(self) -> None:
        super().__init__()
        targets = Rows((4, 7, 12, 3), prompt=0, seed=1)
        self.rows = [
            {"input_ids": a["input_ids"], "labels": b["input_ids"]} for a, b in zip(self, targets, strict=True)
        ]


def encoder_decoder(
    student: Any, teacher: Any, batch: dict[str, Tensor], heard: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts; `heard` are the encoder's valid positions."""
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(**batch, output_hidden_states=True)
    labels = batch["labels"]
    ce, kl = token_terms(ours.logits.flatten(0, 1), its.logits.flatten(0, 1), labels.flatten(), 2.0)
    encoder = states_term("squarehead", ours.encoder_hidden_states, its.encoder_hidden_states, heard)
    decoder = states_term("squarehead", ours.decoder_hidden_states, its.decoder_hidden_states, labels != -100)
    parts = {"ce": ce, "kl": kl, "squarehead/encoder": encoder, "squarehead/decoder": decoder}
    parts["squarehead"] = encoder + decoder
    return sum(w * parts[n] for w, n in zip(WEIGHTS, ("ce", "kl", "squarehead"), strict=True)), parts


@pytest.mark.parametrize("given", [True, False], ids=["decoder_input_ids", "labels alone"])
def test_t5(given: bool, tmp_path: Path) -> None:
    student, teacher = lively("t5"), lively("t5", 1)
    collate = DataCollatorForSeq2Seq(words(), model=student if given else None)
    batch = collate([{k: v.tolist() for k, v in row.items()} for row in Pairs()])
    assert ("decoder_input_ids" in batch) == given and bool((batch["labels"] == -100).any())
    loss, parts = encoder_decoder(student, teacher, dict(batch), batch["attention_mask"].bool())
    expected = gradients(student, loss)
    run = train(
        student, tmp_path, ALL, teacher, cls=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments,
        data=[{k: v.tolist() for k, v in row.items()} for row in Pairs()], collate=collate,
    )  # fmt: skip
    assert_run(run, expected, parts, loss.item())
    logged = {name.removeprefix("distill/") for name in run.distill[0]}
    assert {f"squarehead/{stack}_{layer}" for stack in ("encoder", "decoder") for layer in (1, 2)} <= logged


def tiny_whisper(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=12,
        max_target_positions=32, pad_token_id=2, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return lively(WhisperForConditionalGeneration(config))


class Sounds(Rows):
    """Spectrograms of 24 frames, of which some are silence after the end, and what was said."""

    def __init__(self, masked: bool, prompt: int = 0) -> None:
        super().__init__((4, 7, 12, 3), prompt=prompt, seed=1)
        generator = torch.Generator().manual_seed(5)
        for number, row in enumerate(self.rows):
            row["input_features"] = torch.randn(8, 24, generator=generator)
            if masked:
                row["attention_mask"] = (torch.arange(24) < 24 - 4 * number).long()

    @staticmethod
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        stacked = ("input_features", "attention_mask")
        labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], True, -100)
        return {
            **{name: torch.stack([row[name] for row in rows]) for name in stacked if name in rows[0]},
            "labels": labels,
        }


@pytest.mark.parametrize("masked", [False, True], ids=["every frame", "attention_mask"])
def test_whisper(masked: bool, tmp_path: Path) -> None:
    student, teacher, data = tiny_whisper(), tiny_whisper(1), Sounds(masked)
    batch = Sounds.collate(list(data))  # type: ignore[call-overload]
    heard = batch["attention_mask"][:, ::2].bool() if masked else torch.ones(4, 12, dtype=torch.bool)
    loss, parts = encoder_decoder(student, teacher, batch, heard)
    expected = gradients(student, loss)
    run = train(student, tmp_path, ALL, teacher, cls=Seq2SeqTrainer, arguments=Seq2SeqTrainingArguments, data=data,
                collate=Sounds.collate)  # fmt: skip
    assert_run(run, expected, parts, loss.item())


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_energies_of_an_encoder_decoder_are_fixed(name: str, tmp_path: Path) -> None:
    """They are measured with the decoder's inputs made from labels: of all samples they are those of the one batch.

    Micro-batches then add up.
    """
    data, collate = (Pairs(), padding()) if name == "t5" else (Sounds(True), Sounds.collate)
    runs = []
    for energy, size in (("batch", 4), ("fixed", 4), ("fixed", 1)):
        config = DistillationConfig(ce_weight=0.0, squarehead_weight=1.0, energy=energy, energy_samples=4)
        student, teacher = (lively(name, seed) if name == "t5" else tiny_whisper(seed) for seed in (0, 1))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(train(student, tmp_path, config, teacher, data=data, collate=collate, **settings))
    logs = [{n: v for n, v in run.distill[0].items() if "squarehead" in n} for run in runs]
    for run, logged in zip(runs[1:], logs[1:], strict=True):
        assert_same(run.gradients[0], runs[0].gradients[0], 2e-6)
        assert logged == pytest.approx(logs[0], rel=1e-5)


def test_a_teacher_of_other_dtype_hears_in_its_own(tmp_path: Path) -> None:
    run = train(tiny_whisper(), tmp_path, ALL, tiny_whisper().to(torch.bfloat16), data=Sounds(False),
                collate=Sounds.collate)  # fmt: skip
    assert 0 < run.distill[0]["distill/squarehead"] < 0.05


# -- encoders and classifiers ----------------------------------------------------------------------------------------


def masked_words(rows: list[Any]) -> dict[str, Tensor]:
    """Every third token is hidden, and only those have labels."""
    batch = padding()(rows)
    hidden = (torch.arange(batch["input_ids"].shape[1]) % 3 == 1) & batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 5), "labels": labels}


def test_bert(tmp_path: Path) -> None:
    student, teacher, rows = lively("bert"), lively("bert", 1), Rows()
    batch = masked_words(list(rows))  # type: ignore[call-overload]
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(**batch, output_hidden_states=True)
    ce, kl = token_terms(ours.logits.flatten(0, 1), its.logits.flatten(0, 1), batch["labels"].flatten(), 2.0)
    squarehead = states_term("squarehead", ours.hidden_states, its.hidden_states, batch["attention_mask"].bool())
    loss = 0.7 * ce + 0.5 * kl + 0.3 * squarehead
    expected = gradients(student, loss)
    run = train(student, tmp_path, ALL, teacher, data=rows, collate=masked_words)
    assert_run(run, expected, {"ce": ce, "kl": kl, "squarehead": squarehead}, loss.item())


CLASSIFIERS: Any = {"bert": BertForSequenceClassification, "llama": LlamaForSequenceClassification}


def classifier(name: str, seed: int = 0, labels: int = 3) -> PreTrainedModel:
    config = TINY[name]().config
    config.num_labels = labels
    torch.manual_seed(seed)
    return lively(CLASSIFIERS[name](config))


def one_class(rows: list[Any]) -> dict[str, Tensor]:
    batch = padding()(rows)
    return {**batch, "labels": batch["input_ids"][:, 0] % 3}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes(name: str, tmp_path: Path) -> None:
    student, teacher, rows = classifier(name), classifier(name, 1), Rows()
    batch = one_class(list(rows))  # type: ignore[call-overload]
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(**batch, output_hidden_states=True)
    ce, kl = token_terms(ours.logits, its.logits, batch["labels"], 2.0)
    squarehead = states_term("squarehead", ours.hidden_states, its.hidden_states, batch["attention_mask"].bool())
    loss = 0.7 * ce + 0.5 * kl + 0.3 * squarehead
    expected = gradients(student, loss)
    run = train(student, tmp_path, ALL, teacher, data=rows, collate=one_class)
    assert_run(run, expected, {"ce": ce, "kl": kl, "squarehead": squarehead}, loss.item())


def test_a_decoder_that_sees(tmp_path: Path) -> None:
    """Its class is none of the causal ones, but its labels are shifted as well."""
    text = TINY["llama"]().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=95)
        models.append(lively(LlavaForConditionalGeneration(config)))
    student, teacher = models
    config = DistillationConfig(ce_weight=0.7, kl_weight=0.5, temperature=2.0)
    found = terms(student, teacher, padding()(list(Rows())), config)  # type: ignore[call-overload]
    loss = total(found, config)
    expected = gradients(student, loss)
    assert_run(train(student, tmp_path, config, teacher), expected, {"ce": found.ce, "kl": found.kl}, loss.item())


# -- TRL -------------------------------------------------------------------------------------------------------------


def sft(student: nn.Module, directory: Path, config: DistillationConfig, teacher: nn.Module, **more: Any) -> Run:
    """TRL's trainer with its own collator, on the rows of `Rows()` with their labels."""
    rows = [{name: value.tolist() for name, value in row.items()} for row in Rows()]
    return train(
        student, directory, config, teacher, data=Dataset.from_list(rows), cls=SFTTrainer, arguments=SFTConfig,
        trainer={"processing_class": words(), "data_collator": None}, **more,
    )  # fmt: skip


def test_sft_is_the_plain_trainer(tmp_path: Path) -> None:
    """TRL computes its loss without calling the head; the loss of the teacher is the same."""
    plain = train(lively("llama"), tmp_path, ALL, lively("llama", 1))
    run = sft(lively("llama"), tmp_path, ALL, lively("llama", 1))
    assert_same(run.gradients[0], plain.gradients[0])
    assert run.distill[0] == pytest.approx(plain.distill[0], rel=1e-5)


FLAT: dict[str, dict[str, Any]] = {
    "padding_free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 24},
}


@pytest.mark.parametrize("how", FLAT)
def test_sft_without_padding(how: str, tmp_path: Path) -> None:
    """All rows in one, told apart by their positions: the same losses, if the user says that nothing is padding."""
    with pytest.raises(ValueError, match=r"no attention_mask.*no_padding=True"):
        sft(lively("llama"), tmp_path, ALL, lively("llama", 1), **FLAT[how])
    config = DistillationConfig(ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0, no_padding=True)
    plain = train(lively("llama"), tmp_path, ALL, lively("llama", 1))
    run = sft(lively("llama"), tmp_path, config, lively("llama", 1), **FLAT[how])
    assert_same(run.gradients[0], plain.gradients[0])
    assert run.distill[0] == pytest.approx(plain.distill[0], rel=1e-5)


# -- other depths ----------------------------------------------------------------------------------------------------


def deep_llama(layers: int, seed: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    return lively(LlamaForCausalLM(config))


MAPS = {
    "spaced": (["spaced"], None, {1: 2, 2: 4, 3: 6}),
    "two layers": (["2:3", "3:6"], None, {2: 3, 3: 6}),
    "weighted": (["1:1", "3:6"], [0.5, 2.0], {1: 1, 3: 6}),
    "the last": (["3:6"], None, {3: 6}),
    "one teacher layer twice": (["1:4", "2:4"], [3.0, 1.0], {1: 4, 2: 4}),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kind", ["squarehead", "cosine"])
def test_layers_of_a_deeper_teacher(name: str, kind: str, tmp_path: Path) -> None:
    layers, weights, pairs = MAPS[name]
    config = DistillationConfig(**{f"{kind}_weight": 0.3}, distill_layers=layers, layer_weights=weights)
    student, teacher = deep_llama(3, 0), deep_llama(6, 1)
    batch = padding()(list(Rows()))  # type: ignore[call-overload]
    found, valid = terms(student, student, batch, ALL), batch["attention_mask"].bool()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    ours = student(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        its = teacher(**inputs, output_hidden_states=True).hidden_states
    values = [layer_term(kind, ours[i], its[j], valid) for i, j in pairs.items()]
    found.features = {kind: sum(w * v for w, v in zip(weights or [1.0] * len(values), values, strict=True))}
    loss = total(found, config)
    expected = gradients(student, loss)
    run = train(student, tmp_path, config, teacher)
    logged = {f"{kind}/layer_{i}": value for i, value in zip(pairs, values, strict=True)}
    assert_run(run, expected, {**logged, kind: found.features[kind], "ce": found.ce}, loss.item())
    assert len(run.distill[0]) == len(values) + 2
