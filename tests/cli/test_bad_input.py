"""What a user can get wrong: one sentence that names it, exit code 2, no traceback, and not a file more than before.

Every case runs the real command on real files, and compares the whole directory tree before and after.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.refusals import (
    DAMAGE,
    QUERY,
    Command,
    change_weights,
    files_of_at_most,
    prune_words,
    refused,
    retrain_words,
)
from cli.workspace import save_model, sentences, tree
from safetensors.torch import load_file

from sparse_ft.cli.early import check_texts
from sparse_ft.cli.main import VERBS

OPTIONS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "more kept than there are": ({"pattern": "5:4", "sparsity": None}, ("5:4",)),
    "pattern that is none": ({"pattern": "two of four", "sparsity": None}, ("two of four",)),
    "inputs that m does not divide": ({"pattern": "16:64", "sparsity": None}, ("q_proj", "32", "64", "indivisible")),
    "sparsity of one": ({"sparsity": "1.0"}, ("sparsity", "1.0", "[0, 1)")),
    "negative sparsity": ({"sparsity": "-0.1"}, ("sparsity", "-0.1", "[0, 1)")),
    "sparsity nan": ({"sparsity": "nan"}, ("sparsity", "nan", "[0, 1)")),
    "sparsity inf": ({"sparsity": "inf"}, ("sparsity", "inf", "[0, 1)")),
    "sparsity no number": ({"sparsity": "half"}, ("--sparsity", "half")),
    "no sparsity": ({"sparsity": None}, ("unstructured", "sparsity")),
    "sparsity against the pattern": ({"pattern": "2:4", "sparsity": 0.6}, ("2:4", "0.6", "0.5")),
    "unknown method": ({"method": "wnada"}, ("wnada", "Did you mean 'wanda'?")),
    "unknown allocation": ({"allocation": "unifrom"}, ("unifrom", "uniform")),
    "unknown indivisible": ({"indivisible": "skp"}, ("skp", "skip")),
    "unknown option": ({"sparsty": "0.5"}, ("--sparsty", "Did you mean '--sparsity'?")),
    "exclude without a match": ({"exclude": "q_prj"}, ("q_prj", "q_proj")),
    "method without text": ({"method": "wanda"}, ("wanda", "--dataset")),
    "damping of magnitude": ({"damping": 0.1}, ("'magnitude'", "--damping")),
    "blocks of random": ({"method": "random", "block_size": 64}, ("'random'", "--block_size")),
    "updates of wanda": (
        {"method": "wanda", "no_update_weights": True, "dataset": "text"},
        ("'wanda'", "--no_update_weights"),
    ),
    "samples of magnitude": ({"samples": 5}, ("'magnitude'", "--samples")),
    "split of magnitude": ({"calibration_split": "test"}, ("'magnitude'", "--calibration_split")),
    "floor of uniform": ({"min_keep": 0.1}, ("'magnitude'", "'uniform'", "--min_keep")),
    "unknown device": ({"device": "gpu0"}, ("gpu0", "cpu")),
    "no output directory": ({"output_dir": None}, ("--output_dir",)),
    "option without a value": ({"pattern": True, "sparsity": None}, ("--pattern", "argument")),
    "no such model": ({"model_name_or_path": "no/such/place"}, ("no/such/place",)),
    "no such recipe": ({"config": "perp/lama_2of4"}, ("perp/lama_2of4", "perp/llama_2of4")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_prune(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options, naming = OPTIONS[case]
    refused(command, place, *prune_words(place, **options), naming=naming)


TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("bad.txt", "empty")),
    "blank": (b"\n \n\n", ("bad.txt", "empty")),
    "binary": (b"\x7fELF\x00\x01" * 50, ("bad.txt", "not UTF-8", "0x00")),
    "other encoding": ("größer ".encode("latin-1") * 50, ("bad.txt", "not UTF-8")),
    "too short": (b"the quick brown fox", ("bad.txt", "4 tokens", "64", "--sequence_length")),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("verb", ["prune", "retrain", "eval"])
def test_texts(verb: str, case: str, place: Path, command: Command) -> None:
    content, naming = TEXTS[case]
    bad = place / "bad.txt"
    bad.write_bytes(content)
    words = {
        "prune": prune_words(place, method="wanda", dataset=bad, sequence_length=64),
        "retrain": retrain_words(place, dataset=bad, sequence_length=64),
        "eval": ["eval", place / "sparse", "--dataset", bad, "--sequence_length", 64],
    }[verb]
    if verb == "eval" and case == "too short":
        naming = ("4 tokens", "64")
    refused(command, place, *words, naming=naming)


def test_missing_text(place: Path, command: Command) -> None:
    words = prune_words(place, method="wanda", dataset=place / "nothing.txt")
    refused(command, place, *words, naming=("nothing.txt", "--dataset"))


NO_TEXT = ("wikitext-of-mine", "text/tset", "data/a/b.txt", "./text", "wiki.jsonl", "~/no.txt")


@pytest.mark.parametrize("option", ["--dataset", "--eval_dataset", "--eval-dataset"])
@pytest.mark.parametrize("name", NO_TEXT)
def test_a_text_that_is_nowhere_is_refused_before_the_verb_is_imported(
    name: str, option: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(VERBS, "prune", ("no.such.module", ""))
    for words in ([option, name], [f"{option}={name}"]):
        refused(command, tmp_path, "prune", *words, naming=(name, option.replace("-d", "_d").replace("-_", "--")))


def test_a_text_that_may_be_there_is_left_to_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, directories, what was downloaded before, and names on a Hub that can be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for cache in ("datasets/Salesforce___wikitext", "datasets/open_web_text", "hub/datasets--allenai--c4"):
        (tmp_path / "home" / cache).mkdir(parents=True)
    (tmp_path / "mine.txt").write_text("text")
    (tmp_path / "texts").mkdir()
    for name in ("mine.txt", "texts", "wikitext", "Salesforce/wikitext", "stas/OpenWebText", "allenai/c4"):
        check_texts(["--dataset", name])
    with pytest.raises(FileNotFoundError, match="wikitextt"):
        check_texts(["--dataset", "wikitextt"])
    monkeypatch.setattr("sparse_ft.cli.early._is_hub_out_of_reach", lambda: False)
    check_texts(["--dataset", "wikitextt", "--eval_dataset", "--seed"])


NUMBERS = {
    "prune": ("damping -1", "block_size 0", "samples 0", "eval_windows 0", "eval_batch_size -1", "sequence_length 0"),
    "eval": ("stride 0", "max_windows 0", "batch_size 0", "seed -1", "stride -3"),
    "retrain": ("eval_windows -1", "eval_batch_size 0", "sequence_length 1", "r 0"),
    "retrain --method reconstruct": ("samples 0", "r -1"),
    "demo": ("samples 0", "retrain_steps 0", "r 0", "learning_rate -1", "learning_rate nan", "eval_windows 0"),
}


@pytest.mark.parametrize(("verb", "given"), [(verb, given) for verb, all_of in NUMBERS.items() for given in all_of])
def test_numbers_are_checked_before_the_model_is_looked_for(
    verb: str, given: str, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "train.txt").write_text("some text")
    option, value = given.split()
    words = [*verb.split(), "--model_name_or_path", tmp_path / "none", "--dataset", tmp_path]
    words += ["--output_dir", tmp_path / "out", f"--{option}={value}"]
    words += ["--method", "sparsegpt", "--sparsity", 0.5] if verb == "prune" else []
    refused(command, tmp_path, *words, naming=(option, value))


def test_text_without_the_split(place: Path, command: Command) -> None:
    (place / "text" / "test.txt").unlink()
    words = ["eval", place / "dense", "--dataset", place / "text"]
    refused(command, place, *words, naming=("test", "train.txt"))


@pytest.mark.parametrize("length", [65, 1])
@pytest.mark.parametrize("verb", ["prune", "retrain", "eval"])
def test_sequences_the_model_cannot_take(verb: str, length: int, place: Path, command: Command) -> None:
    words = {
        "prune": prune_words(place, method="wanda", dataset=place / "text", sequence_length=length),
        "retrain": retrain_words(place, sequence_length=length),
        "eval": ["eval", place / "sparse", "--dataset", place / "text", "--sequence_length", length],
    }[verb]
    refused(command, place, *words, naming=("--sequence_length", str(length), "64" if length > 1 else "at least 2"))


@pytest.mark.parametrize("verb", ["prune", "retrain"])
def test_output_directory_not_empty(verb: str, place: Path, command: Command) -> None:
    (place / "out").mkdir()
    (place / "out" / "mine.txt").write_text("mine")
    words = prune_words(place) if verb == "prune" else retrain_words(place)
    refused(command, place, *words, naming=(str(place / "out"), "not empty", "--overwrite"))


@pytest.mark.parametrize("overwrite", [None, True])
@pytest.mark.parametrize("verb", ["prune", "retrain"])
def test_output_directory_is_the_input(verb: str, overwrite: bool | None, place: Path, command: Command) -> None:
    if verb == "prune":
        words = prune_words(place, output_dir=place / "text" / ".." / "dense", overwrite=overwrite)
    else:
        words = retrain_words(place, output_dir=place / "sparse", overwrite=overwrite)
    refused(command, place, *words, naming=("also an input", "--output_dir"))


@pytest.mark.parametrize("verb", ["prune", "retrain"])
def test_output_directory_is_a_file(verb: str, place: Path, command: Command) -> None:
    (place / "out").write_text("a file")
    words = prune_words(place) if verb == "prune" else retrain_words(place)
    refused(command, place, *words, naming=(str(place / "out"), "is a file"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, place: Path, command: Command) -> None:
    change_weights(place / "dense", lambda tensors: tensors[QUERY].view(-1)[3].fill_(value))
    refused(command, place, *prune_words(place), naming=(QUERY, "NaN or infinite"))


def test_missing_tensor(place: Path, command: Command) -> None:
    change_weights(place / "dense", lambda tensors: tensors.pop(QUERY))
    refused(command, place, *prune_words(place), naming=(QUERY,))


def test_tensor_of_another_shape(place: Path, command: Command) -> None:
    change_weights(place / "dense", lambda tensors: tensors.update({QUERY: torch.ones(16, 32)}))
    refused(command, place, *prune_words(place), naming=(QUERY, "16", "32"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("verb", ["prune", "retrain", "eval", "report"])
def test_damaged_or_malicious_weights(verb: str, damage: str, place: Path, command: Command) -> None:
    file = place / ("dense" if verb == "prune" else "sparse") / "model.safetensors"
    file.write_bytes(DAMAGE[damage](file))
    words = {
        "prune": prune_words(place),
        "retrain": retrain_words(place),
        "eval": ["eval", place / "sparse", "--dataset", place / "text"],
        "report": ["report", place / "sparse"],
    }[verb]
    refused(command, place, *words, naming=("model.safetensors",))


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "..\\secret.safetensors"])
def test_index_that_leaves_the_directory(target: str, place: Path, command: Command) -> None:
    model = place / "dense"
    shutil.copy(model / "model.safetensors", place / "secret.safetensors")
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, place, *prune_words(place), naming=(target,))


def test_link_that_leaves_the_directory(place: Path, command: Command) -> None:
    shutil.move(place / "dense" / "model.safetensors", place / "elsewhere.safetensors")
    os.symlink(place / "elsewhere.safetensors", place / "dense" / "model.safetensors")
    refused(command, place, *prune_words(place), naming=("link", "elsewhere.safetensors"))


@pytest.mark.parametrize("verb", ["prune", "eval"])
def test_pickled_weights(verb: str, place: Path, command: Command) -> None:
    model = place / "dense"
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    words = prune_words(place) if verb == "prune" else ["eval", model, "--dataset", place / "text"]
    refused(command, place, *words, naming=("pickle", "safetensors"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("verb", ["prune", "retrain", "eval", "report"])
def test_missing_file(verb: str, name: str, place: Path, command: Command) -> None:
    (place / ("dense" if verb == "prune" else "sparse") / name).unlink()
    words = {
        "prune": prune_words(place),
        "retrain": retrain_words(place),
        "eval": ["eval", place / "sparse", "--dataset", place / "text"],
        "report": ["report", place / "sparse"],
    }[verb]
    refused(command, place, *words, naming=(name,))


def test_missing_tokenizer(place: Path, command: Command) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "sparse" / name).unlink()
    refused(command, place, *retrain_words(place), naming=("tokenizer", "sparse"))


def test_retraining_a_dense_model(place: Path, command: Command) -> None:
    words = retrain_words(place, model_name_or_path=place / "dense")
    refused(command, place, *words, naming=("dense", "prune"))


def test_masks_of_another_model(place: Path, command: Command, text: Path) -> None:
    other = save_model(place / "other", "gpt2")
    assert command(*prune_words(place, model_name_or_path=other, output_dir=place / "gpt2")).code == 0
    for name in ("sparse_masks.safetensors", "sparse_ft.json"):
        shutil.copy(place / "gpt2" / name, place / "sparse" / name)
    refused(command, place, *retrain_words(place), naming=("c_attn",))


def test_masks_of_another_revision(place: Path, command: Command) -> None:
    other = save_model(place / "other", seed=1)
    words = prune_words(place, model_name_or_path=other, pattern="2:4", sparsity=None, output_dir=place / "second")
    assert command(*words).code == 0
    for name in ("sparse_masks.safetensors", "sparse_ft.json"):
        shutil.copy(place / "second" / name, place / "sparse" / name)
    before = tree(place)
    for words in (retrain_words(place), ["report", place / "sparse"]):
        result = command(*words)
        assert result.code == 1 and "Traceback" not in result.err
        assert "pruned weights of" in result.complaint and "another revision" in result.complaint
    assert tree(place) == before, "something was written"


def test_masks_and_record_of_two_checkpoints(place: Path, command: Command) -> None:
    assert command(*prune_words(place, sparsity=0.7, output_dir=place / "second")).code == 0
    shutil.copy(place / "second" / "sparse_masks.safetensors", place / "sparse")
    refused(command, place, *retrain_words(place), naming=("digest", "sparse_ft.json"))


@pytest.mark.parametrize("name", ["sparse_masks.safetensors", "sparse_ft.json"])
def test_one_sidecar_is_missing(name: str, place: Path, command: Command) -> None:
    (place / "sparse" / name).unlink()
    refused(command, place, *retrain_words(place), naming=(name,))


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 99}', "{}"])
def test_record_that_is_damaged(content: str, place: Path, command: Command) -> None:
    (place / "sparse" / "sparse_ft.json").write_text(content)
    refused(command, place, "report", place / "sparse", naming=("sparse_ft.json",))


def test_adapter_without_its_masks(place: Path, command: Command) -> None:
    adapter = place / "adapter"
    assert command(*retrain_words(place, save_adapter=adapter)).code == 0
    shutil.rmtree(place / "out")
    assert command("eval", adapter, "--dataset", place / "text").code == 0
    (adapter / "sparse_masks.safetensors").unlink()
    words = ["eval", adapter, "--dataset", place / "text"]
    refused(command, place, *words, naming=("adapter", "sparse_masks.safetensors"))


RETRAIN: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown method": ({"method": "mask_lorra"}, ("mask_lorra", "Did you mean 'mask_lora'?")),
    "unknown option": ({"learning_rat": "1e-3"}, ("--learning_rat", "Did you mean '--learning_rate'?")),
    "no text": ({"dataset": None}, ("--dataset",)),
    "no output directory": ({"output_dir": None}, ("--output_dir",)),
    "rank of zero": ({"r": 0}, ("r", "0")),
    "unknown dtype": ({"dtype": "float31"}, ("float31", "float32")),
    "adapter of full fine-tuning": ({"method": "full", "save_adapter": "adapter"}, ("full", "--save_adapter")),
    "steps that are no number": ({"max_steps": "many"}, ("--max_steps", "many")),
    "no steps": ({"max_steps": 0}, ("--max_steps 0", "positive")),
    "no epochs": ({"max_steps": None, "num_train_epochs": 0}, ("--num_train_epochs 0", "positive")),
    "unknown scheduler": ({"lr_scheduler_type": "liner"}, ("--lr_scheduler_type", "liner", "linear")),
    "no such checkpoint": ({"resume_from_checkpoint": "nowhere"}, ("nowhere", "checkpoint")),
}


@pytest.mark.parametrize("case", RETRAIN)
def test_options_of_retrain(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options, naming = RETRAIN[case]
    refused(command, place, *retrain_words(place, **options), naming=naming)


def test_run_that_was_left_over(place: Path, command: Command) -> None:
    assert command(*retrain_words(place, keep_run=True, save_steps=1)).code == 0
    shutil.rmtree(place / "out")
    refused(command, place, *retrain_words(place), naming=("out.run", "--resume_from_checkpoint"))
    words = retrain_words(place, resume_from_checkpoint="true", r=4)
    refused(command, place, *words, naming=("out.run", "r 16", "4"))


def test_config_with_unknown_key(place: Path, command: Command) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text("sparsity: 0.5\npatern: '2:4'\n")
    words = prune_words(place, config=recipe)
    refused(command, place, *words, naming=("patern", "recipe.yaml", "Did you mean 'pattern'?"))


def test_targets_that_match_nothing(place: Path, command: Command) -> None:
    words = ["report", place / "dense", "--targets", "--exclude", "mlp.gat_proj"]
    refused(command, place, *words, naming=("gat_proj",))


@pytest.mark.parametrize("size", [1_000, 60_000])
@pytest.mark.parametrize("verb", ["prune", "retrain"])
def test_disk_full_in_mid_save(verb: str, size: int, place: Path, command: Command) -> None:
    (place / "out").mkdir()
    (place / "out" / "old.txt").write_text("the result of yesterday")
    options: dict[str, Any] = {"overwrite": True}
    words = prune_words(place, **options) if verb == "prune" else retrain_words(place, save_strategy="no", **options)
    before = tree(place)
    with files_of_at_most(size):
        result = command(*words)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.complaint
    assert tree(place) == before, "a half-written file was left, or the old result was touched"


def test_sentences_are_not_all_the_same() -> None:
    assert len(set(sentences(50, 0).splitlines())) > 20
