"""`retrain --teacher`: every method learns from a dense model as well, and the zeros stay zeros."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.refusals import Command, refused, retrain_words
from cli.workspace import save_model
from safetensors.torch import load_file
from tiny_models import TINY

from sparse_ft.cli.main import main
from sparse_ft.cli.retrain_run import run_dir_of
from sparse_ft.distillation import CachedTargets
from sparse_ft.masks import MaskSet

BOTH = {"kl_weight": 0.5, "squarehead_weight": 0.1}
METHODS = ["full", "mask_lora", "scale_lora", "lora_prune", "norms", "head", "embeddings", "mask_lora+norms"]


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny OPT beside its sparse one, which has biases. Read only."""
    home = tmp_path_factory.mktemp("opt")
    save_model(home / "dense", "opt")
    words = ["--model_name_or_path", home / "dense", "--sparsity", "0.6", "--output_dir", home / "sparse"]
    assert main(["prune", *map(str, words)]) == 0
    return home


def words(source: Path, teacher: Path | None, text: Path, target: Path, **options: object) -> list[object]:
    quick = {"max_steps": 3, "learning_rate": "1e-2", "logging_steps": 1, "eval": "false", "use_cpu": True}
    given = {"model_name_or_path": source, "teacher": teacher, "dataset": text, "output_dir": target}
    return retrain_words(target.parent, **{**quick, **given, **options})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def differing(one: Path, other: Path) -> set[str]:
    """Names of the stored tensors that differ in a bit."""
    ours, its = tensors(one), tensors(other)
    return {name for name in ours if not torch.equal(ours[name].view(torch.uint8), its[name].view(torch.uint8))}


def teacher_log(directory: Path, method: str) -> list[dict[str, float]]:
    """The steps of the Trainer's log."""
    logs = json.loads((directory / "sparse_ft.json").read_text())["training"]["logs"][method]
    return [entry for entry in logs if "loss" in entry]


# -- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "biases"])
def test_every_method_learns_from_a_teacher(
    method: str, dense: Path, pruned: Path, opt: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    source, teacher = (opt / "sparse", opt / "dense") if method == "biases" else (pruned, dense)
    result = command(*words(source, teacher, text, tmp_path / "out", method=method, **BOTH))
    assert result.code == 0, result.err
    masks = MaskSet.load(tmp_path / "out")
    assert masks == MaskSet.load(source)
    masks.verify(tensors(tmp_path / "out"))
    assert "KL of next tokens, weight 0.5" in result.out and "layers 1:1 2:2, weight squarehead 0.1" in result.out
    assert command(*words(source, None, text, tmp_path / "alone", method=method)).code == 0
    trained = differing(tmp_path / "out", source)
    assert trained == differing(tmp_path / "alone", source)
    assert differing(tmp_path / "out", tmp_path / "alone") == trained, "the teacher made no difference"
    log = teacher_log(tmp_path / "out", method)
    assert len(log) == 3
    for entry in log:
        parts = entry["distill/ce"] + 0.5 * entry["distill/kl"] + 0.1 * entry["distill/squarehead"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-3)
        by_layer = [entry[f"distill/squarehead/layer_{layer}"] for layer in (1, 2)]
        assert entry["distill/squarehead"] == pytest.approx(sum(by_layer), rel=1e-5)
        assert entry["distill/kl"] > 0


def test_the_record_and_the_report_tell_of_the_teacher(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    target, more = tmp_path / "out", dict(temperature=2.0, distill_layers="2:2", energy="fixed", energy_samples=4)
    result = command(*words(pruned, dense, text, target, **BOTH, **more, max_steps=4))
    assert result.code == 0, result.err
    arguments = json.loads((target / "sparse_ft.json").read_text())["arguments"]
    wanted = {"teacher": str(dense), **BOTH, **more, "distill_layers": ["2:2"], "ce_weight": 1.0, "teacher_cache": None}
    assert {name: arguments[name] for name in wanted} == wanted
    assert "student:teacher layers 2:2, weight squarehead 0.1" in result.out
    page = (target / "report.html").read_text()
    for title in ("KL from the teacher", "SquareHead"):
        assert title in page
    assert json.loads((target / "report.json").read_text())["history"]["mask_lora"][0]["distill/kl"] > 0
    assert command(*words(pruned, None, text, tmp_path / "alone")).code == 0
    assert "teacher" not in json.loads((tmp_path / "alone" / "sparse_ft.json").read_text())["arguments"]
    assert "KL from the teacher" not in (tmp_path / "alone" / "report.html").read_text()


def test_kl_is_what_a_teacher_gives_by_default(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    for name, more in {"default": {}, "named": {"kl_weight": 1, "squarehead_weight": 0}}.items():
        assert command(*words(pruned, dense, text, tmp_path / name, **more)).code == 0
        assert json.loads((tmp_path / name / "sparse_ft.json").read_text())["arguments"]["kl_weight"] == 1.0
    assert not differing(tmp_path / "default", tmp_path / "named")


# -- one copy of what is common --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mask_lora", "norms", "mask_lora+norms+embeddings"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_shared_teacher_teaches_the_same(
    method: str, dtype: str, dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    """Bit for bit: it computes what the dense model would."""
    more = {"bf16": True} if dtype == "bfloat16" else {}
    if dtype == "bfloat16":
        dense = save_model(tmp_path / "dense")
        TINY["llama"]().to(torch.bfloat16).save_pretrained(dense)
        pruned = tmp_path / "sparse"
        assert command("prune", "--model_name_or_path", dense, "--pattern", "2:4", "--output_dir", pruned).code == 0
    for name, share in (("apart", {}), ("shared", {"share_teacher": True})):
        result = command(*words(pruned, dense, text, tmp_path / name, method=method, **BOTH, **share, **more))
        assert result.code == 0, result.err
    assert "of a second model" in result.out
    assert differing(tmp_path / "apart", pruned)
    assert not differing(tmp_path / "apart", tmp_path / "shared")
    MaskSet.load(tmp_path / "shared").verify(tensors(tmp_path / "shared"))


# -- targets on the disk ---------------------------------------------------------------------------------------------


def test_targets_are_made_once_and_the_teacher_may_go(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    teacher, cache = tmp_path / "teacher", tmp_path / "targets"
    shutil.copytree(dense, teacher)
    first = words(pruned, teacher, text, tmp_path / "one", teacher_cache=cache, teacher_top_k=96)
    result = command(*first)
    assert result.code == 0, result.err
    made = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in cache.iterdir()}
    assert CachedTargets.open(cache).k == 96 and CachedTargets.open(cache).teacher == str(teacher)
    assert command(*words(pruned, teacher, text, tmp_path / "direct")).code == 0
    shutil.rmtree(teacher)
    for name, given in {"two": None, "three": teacher}.items():
        again = command(*words(pruned, given, text, tmp_path / name, teacher_cache=cache))
        assert again.code == 0, again.err
        assert "(stored targets)" in again.out
        assert not differing(tmp_path / "one", tmp_path / name)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in cache.iterdir()} == made
    arguments = json.loads((tmp_path / "two" / "sparse_ft.json").read_text())["arguments"]
    assert (arguments["teacher_cache"], arguments["teacher_top_k"]) == (str(cache), 96)
    ours, its = tensors(tmp_path / "one"), tensors(tmp_path / "direct")
    start = tensors(pruned)
    moved = max(float((its[name] - start[name]).abs().max()) for name in its)
    apart = max(float((its[name] - ours[name]).abs().max()) for name in its)
    assert 0 < apart < 0.2 * moved, "all 96 tokens are kept, in bfloat16"


def test_a_killed_run_whose_targets_were_made_goes_on(
    dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    options = {"teacher_cache": tmp_path / "targets", "max_steps": 4, "save_steps": 2}
    assert command(*words(pruned, dense, text, tmp_path / "one", **options, keep_run=True)).code == 0
    shutil.copytree(run_dir_of(tmp_path / "one"), run_dir_of(tmp_path / "two"))
    shutil.rmtree(run_dir_of(tmp_path / "two") / "checkpoint-4")
    resumed = words(pruned, dense, text, tmp_path / "two", **options, resume_from_checkpoint="true")
    assert command(*resumed).code == 0
    assert not differing(tmp_path / "one", tmp_path / "two")


# -- killed runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"method": "full", "energy": "fixed"}, {"share_teacher": True}], ids=str)
def test_a_resumed_run_ends_with_the_same_weights(
    more: dict[str, object], dense: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    options = {**BOTH, **more, "max_steps": 4, "save_steps": 2}
    assert command(*words(pruned, dense, text, tmp_path / "one", **options, keep_run=True)).code == 0
    shutil.copytree(run_dir_of(tmp_path / "one"), run_dir_of(tmp_path / "two"))
    shutil.rmtree(run_dir_of(tmp_path / "two") / "checkpoint-4")
    resumed = words(pruned, dense, text, tmp_path / "two", **options, resume_from_checkpoint="true")
    assert command(*resumed).code == 0
    files = [directory / "model.safetensors" for directory in (tmp_path / "one", tmp_path / "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_teacher_is_another_run(place: Path, command: Command) -> None:
    options: dict[str, object] = {"teacher": place / "dense", **BOTH, "eval": "false", "max_steps": 2, "save_steps": 1}
    assert command(*retrain_words(place, **options, keep_run=True)).code == 0
    shutil.rmtree(place / "out")
    shutil.copytree(place / "dense", place / "other")
    changes = {"kl_weight": 0.25, "squarehead_weight": 0.2, "temperature": 2.0, "energy": "fixed", "ce_weight": 0.5}
    for name, value in {**changes, "distill_layers": "2", "teacher": place / "other"}.items():
        again = retrain_words(place, **{**options, name: value}, resume_from_checkpoint="true")
        refused(command, place, *again, naming=("out.run", f"was started with {name} "))


# -- packed weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_four_bits(which: str, text: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install sparse-ft[quant]")
    from adapters.wide_models import WIDE
    from cli.workspace import save_tokenizer

    torch.manual_seed(0)
    WIDE["llama"]().bfloat16().save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    source = tmp_path / "sparse"
    words_of_prune = ["--model_name_or_path", tmp_path / "dense", "--pattern", "2:4", "--output_dir", source]
    assert command("prune", *words_of_prune).code == 0
    more = {"quantization": "4bit"} if which == "student" else {"teacher_quantization": "4bit"}
    given = words(source, tmp_path / "dense", text, tmp_path / "out", bf16=True, **BOTH, **more)
    result = command(*given)
    assert result.code == 0, result.err
    assert differing(source, tmp_path / "out")
    MaskSet.load(tmp_path / "out").verify(tensors(tmp_path / "out"))
    assert all(entry["distill/kl"] > 0 for entry in teacher_log(tmp_path / "out", "mask_lora"))
