"""Spoilt sparse checkpoints, masks and second directories: one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli.refusals import DAMAGE, QUERY, Command, change_weights, prune_words, refused, retrain_words
from safetensors.torch import load_file

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
