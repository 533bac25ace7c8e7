"""`retrain` with a teacher that does not fit, or options that do not go together: one sentence, nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.refusals import Command, refused, retrain_words
from cli.workspace import save_model, save_tokenizer, tree
from tiny_models import TINY
from transformers import AutoModelForCausalLM

from sparse_ft.cli.main import main

pytestmark = pytest.mark.usefixtures("no_work")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the perplexity to start from, the first work of a run, and loading a teacher are errors."""

    def worked(*args: object, **options: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("sparse_ft.cli.retrain.measure", worked)
    monkeypatch.setattr("sparse_ft.cli.retrain_teacher.load_teacher", worked)


Case = tuple[dict[str, object], tuple[str, ...]]
TEACHER = {"teacher": "dense"}
NO_TEACHER = "there is no teacher to learn from; name one with --teacher"

OPTIONS: dict[str, Case] = {
    "kl without a teacher": ({"kl_weight": 1}, ("--kl_weight", NO_TEACHER)),
    "layers without a teacher": ({"distill_layers": "1:1"}, ("--distill_layers", NO_TEACHER)),
    "share without a teacher": ({"share_teacher": True}, ("--share_teacher", NO_TEACHER)),
    "top k without a teacher": ({"teacher_top_k": 4}, ("--teacher_top_k", NO_TEACHER)),
    "kl of reconstruction": ({"method": "reconstruct", "kl_weight": 1}, ("--kl_weight", NO_TEACHER)),
    "reconstruction": ({"method": "reconstruct", **TEACHER}, ("'reconstruct'", "leave out the teacher")),
    "targets for reconstruction": ({"method": "reconstruct", "teacher_cache": "t"}, ("'reconstruct'",)),
    "teacher that is not there": ({"teacher": "nothing"}, ("nothing",)),
    "teacher that is a file": ({"teacher": "dense/config.json"}, ("dense/config.json", "is a file")),
    "teacher without weights": ({"teacher": "text"}, ("text", "config.json")),
    "teacher is the output": ({"teacher": "dense", "output_dir": "dense"}, ("'dense'", "also an input")),
    "teacher in what is overwritten": (
        {"teacher": "outer/dense", "output_dir": "outer", "overwrite": True},
        ("outer", "inside"),
    ),
    "targets in the output": ({**TEACHER, "teacher_cache": "out"}, ("--teacher_cache 'out'", "not two places")),
    "targets inside the output": ({**TEACHER, "teacher_cache": "out/t"}, ("--teacher_cache 'out/t'", "not two places")),
    "targets inside the run": ({**TEACHER, "teacher_cache": "out.run/t"}, ("'out.run/t'", "not two places")),
    "output inside the targets": ({**TEACHER, "teacher_cache": "t", "output_dir": "t/out"}, ("not two places",)),
    "targets in the adapter": ({**TEACHER, "teacher_cache": "a/t", "save_adapter": "a"}, ("'a/t'", "not two places")),
    "targets where something is": ({**TEACHER, "teacher_cache": "text"}, ("--teacher_cache 'text'", "no targets")),
    "targets where a file is": ({**TEACHER, "teacher_cache": "text/train.txt"}, ("text/train.txt", "no targets")),
    "targets that nobody makes": ({"teacher_cache": "t"}, ("no targets", "'t'", "--teacher")),
    "targets for states": (
        {**TEACHER, "teacher_cache": "t", "squarehead_weight": 1, "kl_weight": 1},
        ("--squarehead_weight", "--teacher_cache"),
    ),
    "share with full": ({**TEACHER, "share_teacher": True, "method": "full"}, ("--share_teacher", "--method full")),
    "share with a quantised model": (
        {**TEACHER, "share_teacher": True, "quantization": "4bit"},
        ("--share_teacher", "the model is quantised"),
    ),
    "share with a quantised teacher": (
        {**TEACHER, "share_teacher": True, "teacher_quantization": "4bit"},
        ("--share_teacher", "the teacher is quantised"),
    ),
    "share with targets": (
        {**TEACHER, "share_teacher": True, "teacher_cache": "t"},
        ("--share_teacher", "--teacher_cache"),
    ),
    "dtype of a shared teacher": (
        {**TEACHER, "share_teacher": True, "teacher_dtype": "float32"},
        ("--teacher_dtype", "leave it out"),
    ),
    "unknown energy": ({**TEACHER, "energy": "fixd"}, ("energy 'fixd'", "Did you mean 'fixed'?")),
    "energy without SquareHead": ({**TEACHER, "energy": "fixed"}, ("--energy", "--squarehead_weight")),
    "samples of no energy": (
        {**TEACHER, "squarehead_weight": 1, "energy_samples": 4},
        ("--energy_samples", "--energy fixed"),
    ),
    "layers of KL": ({**TEACHER, "distill_layers": "1"}, ("--distill_layers", "--squarehead_weight")),
    "temperature without KL": ({**TEACHER, "squarehead_weight": 1, "temperature": 2}, ("--temperature", "--kl_weight")),
    "top k without targets": ({**TEACHER, "teacher_top_k": 4}, ("--teacher_top_k", "--teacher_cache")),
    "nothing to learn": ({**TEACHER, "kl_weight": 0}, ("kl_weight", "squarehead_weight", "0")),
    "negative CE": ({**TEACHER, "ce_weight": -1}, ("--ce_weight -1", "0 or more")),
    "negative KL": ({**TEACHER, "kl_weight": "-0.5"}, ("--kl_weight -0.5", "0 or more")),
    "negative SquareHead": ({**TEACHER, "squarehead_weight": "nan"}, ("--squarehead_weight nan", "0 or more")),
    "infinite weight": ({**TEACHER, "mse_weight": "inf"}, ("--mse_weight inf",)),
    "negative layer": (
        {**TEACHER, "squarehead_weight": 1, "distill_layers": "2", "layer_weights": "-1"},
        ("layer_weights", "-1"),
    ),
    "weights of other layers": (
        {**TEACHER, "squarehead_weight": 1, "layer_weights": "1"},
        ("1 layer_weights", "2 compared layers"),
    ),
    "layer that is not there": ({**TEACHER, "squarehead_weight": 1, "distill_layers": "3:1"}, ("layer 3", "1 to 2")),
    "layer that is no layer": ({**TEACHER, "squarehead_weight": 1, "distill_layers": "last"}, ("'last'", "4:8")),
    "temperature of zero": ({**TEACHER, "temperature": 0}, ("--temperature 0", "positive")),
    "no samples": (
        {**TEACHER, "squarehead_weight": 1, "energy": "fixed", "energy_samples": 0},
        ("--energy_samples 0",),
    ),
    "no tokens kept": ({**TEACHER, "teacher_cache": "t", "teacher_top_k": 0}, ("--teacher_top_k 0", "at least 1")),
    "more tokens kept than there are": (
        {**TEACHER, "teacher_cache": "t", "teacher_top_k": 97},
        ("--teacher_top_k 97", "vocabulary of 96"),
    ),
    "unknown dtype": ({**TEACHER, "teacher_dtype": "float61"}, ("teacher_dtype 'float61'", "float16")),
    "unknown device": ({**TEACHER, "teacher_device": "cdua"}, ("device 'cdua'", "cpu")),
    "unknown quantisation": ({**TEACHER, "teacher_quantization": "3bit"}, ("teacher_quantization '3bit'", "8bit")),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    if case == "teacher in what is overwritten":
        save_model(place / "outer" / "dense")
    options, naming = OPTIONS[case]
    words = retrain_words(place, **{"output_dir": "out", **options})
    refused(command, place, *words, naming=naming)


def other(family: str, **changes: Any) -> Callable[[Path], None]:
    """Make a teacher whose config has other entries."""

    def make(directory: Path) -> None:
        config = TINY[family]().config
        for name, value in changes.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        save_tokenizer(directory)

    return make


def _other_tokenizer(directory: Path) -> None:
    save_model(directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["fox"], ids["dog"] = ids["dog"], ids["fox"]
    file.write_text(json.dumps(content))


def _encoder(directory: Path) -> None:
    TINY["bert"]().save_pretrained(directory)


def _encoder_decoder(directory: Path) -> None:
    TINY["t5"]().save_pretrained(directory)


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
STATES = {"squarehead_weight": 1}
TEACHERS: dict[str, tuple[Callable[[Path], None], dict[str, object], tuple[str, ...]]] = {
    "vocabulary": (other("llama", vocab_size=100), {}, ("vocabulary of 96", "100")),
    "tokenizer": (_other_tokenizer, {}, ("tokenizer", "'dog'", "teacher")),
    "depth": (other("llama", num_hidden_layers=4), STATES, ("2 layers", "4", "distill_layers", "2:4", "spaced")),
    "rope": (other("llama", rope_parameters=ROPE), {}, ("rotary", "linear", "RoPE scaling")),
    "positions": (other("llama", max_position_embeddings=32), {}, ("64 positions", "32")),
    "width": (other("llama", hidden_size=64), STATES, ("32 channels", "64", "kl_weight")),
    "no next token": (_encoder, {}, ("bert", "next token")),
    "two stacks": (_encoder_decoder, {}, ("t5", "next token")),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_that_cannot_be_compared(case: str, place: Path, command: Command) -> None:
    make, options, naming = TEACHERS[case]
    make(place / "teacher")
    refused(command, place, *retrain_words(place, teacher=place / "teacher", **options), naming=naming)
    if not options:
        cached = retrain_words(place, teacher=place / "teacher", teacher_cache=place / "targets")
        refused(command, place, *cached, naming=naming)


@pytest.fixture
def targets(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Targets of the training text in sequences of 16 tokens, 4 kept."""
    with monkeypatch.context() as working:
        working.undo()
        from sparse_ft.cli import measuring, retrain, retrain_teacher
        from sparse_ft.distillation import load_teacher

        working.setattr(retrain, "measure", measuring.measure)
        working.setattr(retrain_teacher, "load_teacher", load_teacher)
        options = {"teacher": place / "dense", "teacher_cache": place / "targets", "teacher_top_k": 4, "eval": "false"}
        words = retrain_words(place, **options, output_dir=place / "first")
        assert main([str(word) for word in words]) == 0
    return place / "targets"


MISUSE: dict[str, Case] = {
    "another length": ({"sequence_length": 32}, ("Row 0", "32 tokens", "sequence length")),
    "another temperature": ({"temperature": 2}, ("temperature 1.0", "2.0")),
    "another k": ({"teacher_top_k": 8}, ("keep 4 tokens", "--teacher_top_k is 8")),
    "another teacher": ({"teacher": "other"}, ("dense", "'other'", "--teacher_cache")),
    "another text": ({"dataset": "text/test.txt", "eval": "false"}, ("is not among",)),
    "states": ({"squarehead_weight": 1}, ("--squarehead_weight", "--teacher_cache")),
    "share": ({"share_teacher": True}, ("--share_teacher", "--teacher_cache")),
    "overwritten": ({"output_dir": "targets", "overwrite": True}, ("also an input",)),
}


def test_targets_are_of_one_text_temperature_and_teacher(
    targets: Path, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    monkeypatch.chdir(place)
    for case, (options, naming) in MISUSE.items():
        words = retrain_words(place, **{"teacher_cache": "targets", **options})
        try:
            refused(command, place, *words, naming=naming)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error
    other("llama", vocab_size=100)(place / "wide")
    words = ["--model_name_or_path", place / "wide", "--sparsity", 0.5, "--output_dir", place / "pruned"]
    assert command("prune", *words).code == 0
    wide = retrain_words(place, model_name_or_path=place / "pruned", teacher_cache=targets)
    refused(command, place, *wide, naming=("vocabulary of 96", "100"))
    (targets / "targets.json").write_text("{")
    refused(command, place, *retrain_words(place, teacher_cache=targets), naming=("targets.json", "damaged"))


def test_an_unfit_original_is_not_shared(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when it is read; the run that was begun leaves nothing."""
    before = tree(place)
    options = {"teacher": place / "sparse", "share_teacher": True, "eval": "false"}
    result = command(*retrain_words(place, **options))
    assert result.code == 2 and "original" in result.complaint and "dense" in result.complaint
    assert tree(place) == before
