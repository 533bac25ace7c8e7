"""`retrain --method reconstruct`: what it writes, what it defaults to, and what it refuses without a trace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.refusals import refused
from cli.workspace import Result, save_model, tree
from safetensors.torch import load_file

from sparse_ft.cli.reconstruct import _print_windows
from sparse_ft.data import calibration_batches
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_model, load_tokenizer, named_weights
from sparse_ft.reconstruction import ReconstructionResult, WindowResult, reconstruct

Command = Callable[..., Result]


def words(place: Path, **options: object) -> list[object]:
    """A command that works, but for the options given; None takes one out, True makes it a flag."""
    defaults = {
        "method": "reconstruct",
        "model_name_or_path": place / "sparse",
        "dense_model": place / "dense",
        "output_dir": place / "out",
        "dataset": place / "text",
        "sequence_length": 16,
        "samples": 6,
        "learning_rate": "3e-3",
    }
    found: list[object] = ["retrain"]
    for name, value in {**defaults, **options}.items():
        if value is not None:
            found += [f"--{name}"] if value is True else [f"--{name}", value]
    return found


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_result_is_that_of_the_function_with_sidecars_and_report(place: Path, command: Command) -> None:
    result = command(*words(place, seed=3))
    assert result.code == 0, result.err
    out, model = place / "out", load_model(place / "sparse")
    masks = MaskSet.load(place / "sparse")
    batches = calibration_batches(
        place / "text", load_tokenizer(place / "dense"), samples=6, sequence_length=16, seed=3
    )
    expected = reconstruct(
        model, masks, load_model(place / "dense"), calibration=batches, learning_rate=3e-3, seed=3, progress=False
    )
    assert {row.iterations for row in expected.windows} == {3}, "six sequences, two at a time, each once"
    weights = named_weights(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored(out).items())
    assert MaskSet.load(out) == masks
    names = {"config.json", "tokenizer.json", "sparse_masks.safetensors", "sparse_ft.json", "report.html"}
    assert names <= {path.name for path in out.iterdir()}

    record = json.loads((out / "sparse_ft.json").read_text())
    assert record["command"] == "retrain" and [step["command"] for step in record["history"]] == ["prune"]
    asked = {"method": "reconstruct", "granularity": "attn_mlp", "stream": "sparse", "reconstruct_with": "full"}
    used = {"samples": 6, "learning_rate": 3e-3, "max_steps": -1, "num_train_epochs": 1.0, "seed": 3, "bf16": False}
    assert (asked | used).items() <= record["arguments"].items()
    assert record["arguments"]["dense_model"] == str(place / "dense")
    assert [entry["label"] for entry in record["evaluation"]] == ["pruned", "retrained"], "dense: another length"
    numbers = json.loads((out / "report.json").read_text())["reconstruction"]
    assert [(row["block"], row["window"], row["loss_before"], row["loss_after"]) for row in numbers] == [
        (row.block, row.window, row.loss_before, row.loss_after) for row in expected.windows
    ]
    assert "attn" in result.out and "verified" in result.out


@pytest.mark.parametrize("improved", [True, False])
def test_a_run_that_changed_nothing_says_so(improved: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (
        WindowResult("layers.0", "attn", 0.5, 0.5, 3, False),
        WindowResult("layers.0", "mlp", 0.5, 0.4, 3, improved),
    )
    _print_windows(ReconstructionResult(rows, "full", "attn_mlp", "block", 0.1, False, 8))
    assert ("No window came closer to the dense model" in capsys.readouterr().out) is not improved


def test_the_dense_model_is_the_one_the_record_names(place: Path, dense: Path, command: Command) -> None:
    assert command(*words(place)).code == 0
    assert command(*words(place, dense_model=None, output_dir=place / "other")).code == 0
    assert all(torch.equal(tensor, stored(place / "other")[name]) for name, tensor in stored(place / "out").items())
    record = json.loads((place / "other" / "sparse_ft.json").read_text())
    assert record["arguments"]["dense_model"] == str(dense)


def test_it_goes_on_from_a_retrained_checkpoint(place: Path, command: Command) -> None:
    """Twice in a row: the dense model is found in the history, and nothing is lost on the way."""
    assert command(*words(place, samples=4)).code == 0
    result = command(
        *words(place, model_name_or_path=place / "out", output_dir=place / "again", dense_model=None, samples=4)
    )
    assert result.code == 0, result.err
    record = json.loads((place / "again" / "sparse_ft.json").read_text())
    assert [step["command"] for step in record["history"]] == ["prune", "retrain"]
    MaskSet.load(place / "sparse").verify(load_model(place / "again"))
    assert command("eval", place / "again", "--dataset", place / "text", "--sequence_length", 16).code == 0
    assert json.loads((place / "again" / "report.json").read_text())["reconstruction"], "eval keeps the windows"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(granularity="block", stream="dense"), dict(window="block", iterations=3)),
        (dict(max_steps=5, reconstruct_with="mask_lora+norms", r=4, lora_alpha=4), dict(window="attn", iterations=5)),
        (dict(num_train_epochs=2, bf16=True), dict(window="attn", iterations=6)),
        (dict(num_train_epochs=0.5, per_device_train_batch_size=1), dict(window="attn", iterations=3)),
        (dict(stream="sparse_to_dense", activations_dir="files", learning_rate=None), dict(window="attn")),
    ],
)
def test_options(
    options: dict[str, Any], expected: dict[str, Any], place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    result = command(*words(place, **options))
    assert result.code == 0, result.err
    first = json.loads((place / "out" / "report.json").read_text())["reconstruction"][0]
    assert expected.items() <= first.items()
    MaskSet.load(place / "sparse").verify(load_model(place / "out"))
    arguments = json.loads((place / "out" / "sparse_ft.json").read_text())["arguments"]
    given = {name: value for name, value in options.items() if value is not None}
    assert {name: arguments[name] for name in given} == given


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_models_that_predict_no_next_token(name: str, tmp_path: Path, text: Path, command: Command) -> None:
    dense, sparse = save_model(tmp_path / "dense", name), tmp_path / "sparse"
    assert command("prune", "--model_name_or_path", dense, "--sparsity", 0.5, "--output_dir", sparse).code == 0
    shutil.copytree(text, tmp_path / "text")
    result = command(*words(tmp_path, dense_model=None))
    assert result.code == 0, result.err
    masks, before, after = MaskSet.load(sparse), stored(sparse), stored(tmp_path / "out")
    masks.verify(load_model(tmp_path / "out"))
    assert all(not torch.equal(before[key], after[key]) for key in masks)
    assert "Not evaluated: perplexity is for causal language models." in result.out


def test_a_model_without_masks(place: Path, command: Command) -> None:
    """Zeros are taken as masks; nothing says where they come from, so the dense model is asked for."""
    for name in ("sparse_masks.safetensors", "sparse_ft.json"):
        (place / "sparse" / name).unlink()
    result = command(*words(place))
    assert result.code == 0, result.err
    assert MaskSet.load(place / "out").sparsity() == 0.5
    refused(command, place, *words(place, dense_model=None, output_dir=place / "b"), naming=("--dense_model", "sparse"))


REFUSED: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "dense is sparse": (dict(dense_model="sparse"), ("sparse", "as the dense model")),
    "dense is absent": (dict(dense_model="/no/such/model"), ("/no/such/model",)),
    "granularity": (dict(granularity="attnmlp"), ("granularity", "'attn_mlp'")),
    "stream": (dict(stream="sparce"), ("stream", "'sparse'")),
    "train": (dict(reconstruct_with="ful"), ("'ful'", "'full'")),
    "head": (dict(reconstruct_with="full+head"), ("'head'", "outside the blocks")),
    "empty group": (dict(reconstruct_with="biases"), ("no biases", "LlamaForCausalLM")),
    "learning rate": (dict(learning_rate="nan"), ("--learning_rate nan", "positive")),
    "more samples than text": (dict(samples=1_000_000), ("--dataset", "3585 sequences of 16", "1000000", "--samples")),
    "rank of no adapter": (dict(r=4), ("'reconstruct'", "--r ", "--reconstruct_with full")),
    "samples": (dict(samples=1), ("1 calibration sequences", "takes 2")),
    "no samples": (dict(samples=0), ("--samples 0",)),
    "no steps": (dict(max_steps=0), ("--max_steps 0", "nothing to train")),
    "no text": (dict(dataset=None), ("--dataset",)),
    "saved adapter": (dict(save_adapter="adapter"), ("--save_adapter", "merged")),
    "resume": (dict(resume_from_checkpoint=True), ("--resume_from_checkpoint",)),
    "accumulation": (dict(gradient_accumulation_steps=2), ("--gradient_accumulation_steps 2",)),
    "weight decay": (dict(weight_decay=0.1), ("--weight_decay 0.1",)),
    "dtype": (dict(dtype="bfloat16"), ("--dtype bfloat16", "--bf16")),
    "quantisation": (dict(quantization="4bit"), ("--quantization 4bit",)),
    "dropout": (dict(lora_dropout=0.1), ("--lora_dropout 0.1",)),
    "output": (dict(output_dir="dense", overwrite=True), ("dense", "also an input")),
    "joined": (dict(method="reconstruct+norms"), ("reconstruct", "joins with nothing")),
    "misspelt": (dict(method="reconstrct"), ("reconstrct", "'reconstruct'")),
    "length": (dict(sequence_length=65), ("--sequence_length is 65",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_leaves_no_trace(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options, naming = REFUSED[case]
    refused(command, place, *words(place, **options), naming=naming)


def test_another_dense_model_is_refused(place: Path, command: Command) -> None:
    save_model(place / "qwen", "qwen")
    refused(command, place, *words(place, dense_model=place / "qwen"), naming=("q_proj.bias", "sparse model has none"))


def test_changed_weights_are_refused(place: Path, command: Command) -> None:
    from safetensors.torch import save_file

    tensors = stored(place / "sparse")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(tensors, place / "sparse" / "model.safetensors", metadata={"format": "pt"})
    refused(command, place, *words(place), naming=("weights with digest",))


def test_a_dense_model_that_has_moved_is_asked_for(place: Path, command: Command) -> None:
    file = place / "sparse" / "sparse_ft.json"
    record = json.loads(file.read_text())
    record["arguments"]["model_name_or_path"] = str(place / "moved")
    file.write_text(json.dumps(record))
    refused(command, place, *words(place, dense_model=None), naming=("moved", "is not there", "--dense_model"))


@pytest.mark.parametrize("option", [dict(granularity="block"), dict(samples=4), dict(dense_model="dense")])
def test_other_methods_do_not_take_its_options(option: dict[str, object], place: Path, command: Command) -> None:
    given = words(place, method="mask_lora", **dict(dense_model=None, samples=None) | option)
    refused(command, place, *given, naming=("'mask_lora'", f"--{next(iter(option))}", "--method reconstruct"))


def test_a_failure_on_the_way_leaves_nothing(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_ft.reconstruction import blocks

    fit, before = blocks.BlockReconstruction._fit, tree(place)

    def fail(self: Any, index: int, piece: Any) -> Any:
        if index == 1:
            raise RuntimeError("the power went out")
        return fit(self, index, piece)

    monkeypatch.setattr(blocks.BlockReconstruction, "_fit", fail)
    assert "the power went out" in command(*words(place)).complaint
    assert tree(place) == before
