"""Spoilt sparse checkpoints, masks and second directories: one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli.refusals import DAMAGE, QUERY, Command, change_weights, prune_words, refused, retrain_words
from cli.workspace import tree
from safetensors.torch import load_file
from transformers import Trainer

from sparse_ft.checkpoints import make_record, write_sidecars
from sparse_ft.masks import MaskSet

NORM = "model.layers.0.input_layernorm.weight"


def reading_words(verb: str, place: Path) -> list[object]:
    """A command that reads `sparse`, and works."""
    if verb == "retrain":
        return retrain_words(place)
    return [verb, place / "sparse", *(["--dataset", place / "text"] if verb == "eval" else [])]


@pytest.mark.parametrize("verb", ["retrain", "report"])
def test_masks_of_another_shape(verb: str, place: Path, command: Command) -> None:
    """Masks and record agree with each other, but are of a model with other widths."""
    masks = dict(MaskSet.load(place / "sparse"))
    masks[QUERY] = torch.ones(16, 32, dtype=torch.bool)
    masks[QUERY][:, ::2] = False
    wrong = MaskSet(masks)
    weights = {name: mask.float() for name, mask in wrong.items()}
    write_sidecars(place / "sparse", wrong, make_record(wrong, weights, command="prune", arguments={}))
    refused(command, place, *reading_words(verb, place), naming=(QUERY, "(16, 32)", "(32, 32)"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("verb", ["retrain", "report"])
def test_damaged_or_malicious_masks(verb: str, damage: str, place: Path, command: Command) -> None:
    file = place / "sparse" / "sparse_masks.safetensors"
    file.write_bytes(DAMAGE[damage](file))
    refused(command, place, *reading_words(verb, place), naming=("sparse_masks.safetensors",))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_masks_are_found_before_anything_is_evaluated(damage: str, place: Path, command: Command) -> None:
    file = place / "sparse" / "sparse_masks.safetensors"
    file.write_bytes(DAMAGE[damage](file))
    assert "perplexity" not in command(*reading_words("eval", place)).out
    refused(command, place, *reading_words("eval", place), naming=("sparse_masks.safetensors",))


def test_eval_that_may_not_record_says_so_before_anything_is_evaluated(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the mode bits, which root may ignore."""
    (place / "sparse").chmod(0o500)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: os.stat(path).st_mode >> 6 & mode == mode)
    words = reading_words("eval", place)
    assert "perplexity" not in command(*words).out
    refused(command, place, *words, naming=("No permission", str(place / "sparse"), "--no_record"))
    result = command(*words, "--no_record", "--sequence_length", 16)
    assert result.code == 0 and "perplexity" in result.out
    (place / "sparse").chmod(0o700)


@pytest.mark.parametrize("name", [QUERY, NORM, "model.embed_tokens.weight"])
@pytest.mark.parametrize("verb", ["retrain", "eval"])
def test_missing_tensor(verb: str, name: str, place: Path, command: Command) -> None:
    """transformers would make up the missing one."""
    change_weights(place / "sparse", lambda tensors: tensors.pop(name))
    refused(command, place, *reading_words(verb, place), naming=(name,))


@pytest.mark.parametrize("name", [QUERY, NORM])
@pytest.mark.parametrize("verb", ["retrain", "eval"])
def test_weights_of_another_shape(verb: str, name: str, place: Path, command: Command) -> None:
    change_weights(place / "sparse", lambda tensors: tensors.update({name: tensors[name][:16].clone()}))
    refused(command, place, *reading_words(verb, place), naming=(name, "16", "32"))


@pytest.mark.parametrize("verb", ["retrain", "eval"])
def test_weights_that_are_no_numbers(verb: str, place: Path, command: Command) -> None:
    """In a tensor without masks, so that no digest covers it."""
    change_weights(place / "sparse", lambda tensors: tensors[NORM].fill_(float("nan")))
    refused(command, place, *reading_words(verb, place), naming=(NORM, "NaN"))


@pytest.mark.parametrize("verb", ["retrain", "eval", "report"])
def test_index_that_leaves_the_directory(verb: str, place: Path, command: Command) -> None:
    model = place / "sparse"
    names = list(load_file(model / "model.safetensors"))
    shutil.move(model / "model.safetensors", place / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../secret.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, place, *reading_words(verb, place), naming=("../secret.safetensors",))


@pytest.mark.parametrize("verb", ["retrain", "report"])
def test_pickled_weights(verb: str, place: Path, command: Command) -> None:
    model = place / "sparse"
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused(command, place, *reading_words(verb, place), naming=("pickle", "safetensors"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("verb", ["prune", "retrain", "eval"])
def test_config_that_is_damaged(verb: str, content: str, place: Path, command: Command) -> None:
    (place / ("dense" if verb == "prune" else "sparse") / "config.json").write_text(content)
    words = prune_words(place) if verb == "prune" else reading_words(verb, place)
    refused(command, place, *words, naming=("config.json",))


@pytest.mark.parametrize("state", ["not empty", "also an input", "is a file"])
@pytest.mark.parametrize("option", ["eval --output_dir", "retrain --save_adapter"])
def test_second_directories(option: str, state: str, place: Path, command: Command) -> None:
    target = place / "second"
    if state == "is a file":
        target.write_text("a file")
    elif state == "not empty":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    else:
        target = place / "sparse"
    if option.startswith("eval"):
        words = [*reading_words("eval", place), "--output_dir", target]
    else:
        words = retrain_words(place, save_adapter=target)
    refused(command, place, *words, naming=(str(target), state))


@pytest.mark.parametrize("where", ["the output directory", "inside the output directory"])
def test_adapter_in_the_output_directory(where: str, place: Path, command: Command) -> None:
    adapter = place / "out" if where == "the output directory" else place / "out" / "adapter"
    refused(command, place, *retrain_words(place, save_adapter=adapter), naming=(str(place / "out"),))


def test_unknown_reporter(place: Path, command: Command) -> None:
    refused(command, place, *retrain_words(place, report_to="tensorbord"), naming=("tensorbord", "tensorboard"))


UNTRAINABLE = [
    *[(option, value) for option in ("weight_decay", "max_grad_norm") for value in ("nan", "inf", "-1")],
    *[(option, "nan") for option in ("warmup_steps", "adam_epsilon", "num_train_epochs", "logging_steps")],
    ("warmup_steps", "-1"),
    ("num_train_epochs", "inf"),
    ("adam_beta1", "2"),
    ("adam_beta2", "1"),
    ("gradient_accumulation_steps", "0"),
    ("per_device_train_batch_size", "0"),
    ("seed", "-1"),
    ("data_seed", str(2**32)),
]


@pytest.mark.parametrize(("option", "value"), UNTRAINABLE)
def test_a_setting_that_cannot_train(option: str, value: str, place: Path, command: Command) -> None:
    """Told before the model is looked for; it is not there."""
    shutil.rmtree(place / "sparse")
    words = retrain_words(place, method="full", **{option: value})
    refused(command, place, *words, naming=(f"--{option} {value}", "cannot train; give"))


@pytest.mark.parametrize("option", ["seed", "num_train_epochs"])
def test_reconstruction_has_the_same_limits(option: str, place: Path, command: Command) -> None:
    words = retrain_words(place, method="reconstruct", **{option: "-1" if option == "seed" else "inf"})
    refused(command, place, *words, naming=(f"--{option}", "cannot train"))


@pytest.mark.parametrize(("option", "value"), [("deepspeed", "x.json"), ("fsdp", "full_shard")])
def test_sharding_is_refused_before_its_library_is_asked(
    option: str, value: str, place: Path, command: Command
) -> None:
    words = retrain_words(place, **{option: value})
    refused(command, place, *words, naming=(f"--{option}", "shards the model", "launch/ddp.yaml"))


@pytest.mark.parametrize("method", ["full", "mask_lora", "norms"])
def test_a_run_that_diverged_is_not_kept(method: str, place: Path, command: Command) -> None:
    options = {"learning_rate": "1e30", "max_steps": 4, "warmup_steps": 0, "save_strategy": "no", "eval": "false"}
    if method == "mask_lora":
        options["save_adapter"] = place / "adapter"
    words = retrain_words(place, method=method, **options)
    refused(command, place, *words, naming=("Training diverged", "not finite", "lower"))


@pytest.mark.parametrize("save_adapter", [True, False])
def test_what_is_written_is_looked_at_itself(
    save_adapter: bool, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No callback has looked, as under --quantization; the weights are NaN when the training is over."""
    train = Trainer.train

    def spoilt(self: Trainer, *args: object, **kwargs: object) -> object:
        result = train(self, *args, **kwargs)
        for parameter in self.model.parameters():
            parameter.detach().fill_(float("nan") if parameter.requires_grad else 0.0)
        return result

    monkeypatch.setattr(Trainer, "train", spoilt)
    options = {"save_adapter": place / "adapter"} if save_adapter else {}
    words = retrain_words(place, eval="false", save_strategy="no", **options)
    refused(command, place, *words, naming=("Training diverged", "tensors are not finite", "lower --learning_rate"))


def revive(directory: Path) -> None:
    """One pruned weight comes back as 1.0."""
    where = int((~MaskSet.load(directory)[QUERY]).flatten().nonzero()[5])
    change_weights(directory, lambda tensors: tensors[QUERY].view(-1)[where].fill_(1.0))


def no_measuring(*args: object, **options: object) -> None:
    raise AssertionError("something was measured")


READERS = {
    "eval": [],
    "eval --no_record": ["--no_record"],
    "report": [],
    "retrain": [],
    "retrain --method reconstruct": ["--method", "reconstruct", "--samples", 2],
}


@pytest.mark.parametrize("reader", READERS)
def test_a_pruned_weight_that_came_back(
    reader: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1, before anything is measured, and not the sentence about another model's weights."""
    for room in ("eval", "measuring"):
        monkeypatch.setattr(f"sparse_ft.cli.{room}.perplexity", no_measuring)
    revive(place / "sparse")
    before = tree(place)
    result = command(*reading_words(reader.split()[0], place), *READERS[reader])
    assert result.code == 1, result.err
    assert "1 pruned weights of" in result.complaint and QUERY in result.complaint
    assert "digest" not in result.complaint and "perplexity" not in result.out and tree(place) == before


@pytest.mark.parametrize("reader", READERS)
def test_other_weights_with_the_same_zeros(
    reader: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("eval", "measuring"):
        monkeypatch.setattr(f"sparse_ft.cli.{room}.perplexity", no_measuring)
    change_weights(place / "sparse", lambda tensors: tensors[QUERY].mul_(2))
    words = [*reading_words(reader.split()[0], place), *READERS[reader]]
    refused(command, place, *words, naming=("weights with digest",))


@pytest.mark.parametrize("samples", [3570, 1_000_000])
def test_more_samples_than_the_text_has_sequences(samples: int, place: Path, command: Command) -> None:
    """3600 tokens hold 3569 different sequences of 32."""
    options = dict(method="wanda", dataset=place / "text", sequence_length=32, samples=samples)
    naming = ("--dataset", "3569 sequences of 32 tokens", str(samples), "--samples", "--sequence_length")
    refused(command, place, *prune_words(place, **options), naming=naming)


def test_zeros_that_are_forgotten_are_told(place: Path, command: Command) -> None:
    """Of the 50% zeros at 2:4, those beyond 30% are kept now, and all that magnitude removes were zero before."""
    sparse, options = place / "sparse", dict(model_name_or_path=place / "sparse")
    result = command(*prune_words(place, sparsity=0.3, **options))
    assert result.code == 0, result.err
    assert not MaskSet.load(place / "out") <= MaskSet.load(sparse)
    (line,) = [line for line in result.out.splitlines() if line.startswith("warning: ")]
    for part in ("50.00% zeros", "of which 39.97%", f"add --inside '{sparse}'"):
        assert part in line, line
    words = prune_words(place, sparsity=0.7, inside=sparse, overwrite=True, **options)
    further = command(*words)
    assert further.code == 0 and "warning: " not in further.out, further.err
    inside = MaskSet.load(place / "out")
    assert inside <= MaskSet.load(sparse) and inside.sparsity() == pytest.approx(0.7, abs=1e-3)
    for name in ("sparse_masks.safetensors", "sparse_ft.json"):
        (sparse / name).unlink()
    again = command(*prune_words(place, sparsity=0.3, overwrite=True, **options))
    assert "50.00% zeros" in again.out and "MaskSet.from_zeros(model)" in again.out


def test_masks_to_stay_inside_that_do_not_fit(place: Path, command: Command) -> None:
    """Of another place, of a model whose weights are alive, and with too little room."""
    refused(command, place, *prune_words(place, inside=place / "nothing"), naming=("nothing",))
    refused(command, place, *prune_words(place, inside=place / "sparse"), naming=("are not zero", "saved with"))
    words = prune_words(place, inside=place / "sparse", model_name_or_path=place / "sparse", sparsity=0.3)
    refused(command, place, *words, naming=("has lost", "raise the sparsity"))


@pytest.mark.parametrize(("model", "sparsity"), [("sparse", 0.7), ("dense", 0.3)])
def test_no_warning_where_no_zero_is_forgotten(model: str, sparsity: float, place: Path, command: Command) -> None:
    result = command(*prune_words(place, model_name_or_path=place / model, sparsity=sparsity))
    assert result.code == 0 and "warning: " not in result.out
