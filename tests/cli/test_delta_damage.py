"""The command `delta` on spoiled inputs, full disks and killed runs: nothing half is left, and nothing old is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.delta_place import write_place
from cli.refusals import DAMAGE, Command, change_weights, files_of_at_most, refused
from cli.workspace import tree
from deltas.pairs import read, same_bits
from tiny_models import TINY

from sparse_ft.deltas.store import DELTA_FILE, DeltaFile

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `tuned`, `text` and a delta of density 0.1, read only."""
    return write_place(tmp_path_factory.mktemp("delta"))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pruning(place: Path, *more: object) -> list[object]:
    words = ["delta", "--base", place / "base", "--finetuned", place / "tuned", "--output_dir", place / "out"]
    return [*words, *more]


def applying(place: Path, *more: object) -> list[object]:
    words = ["delta", "apply", place / "delta", "--base", place / "base", "--output_dir", place / "out"]
    return [*words, *more]


@pytest.mark.parametrize(("density", "source"), [(0, "base"), (1, "tuned")])
@pytest.mark.parametrize("method", ["dare", "magnitude", "structural"])
def test_the_ends_of_the_density(density: int, source: str, method: str, place: Path, command: Command) -> None:
    assert command(*pruning(place, "--density", density, "--method", method)).code == 0
    apply = ["delta", "apply", place / "out", "--base", place / "base", "--output_dir", place / "new"]
    assert command(*apply).code == 0
    found, expected = read(place / "new"), read(place / source)
    assert found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)


def test_darex_q_at_the_density_is_dare(place: Path, command: Command) -> None:
    for name, method in (("one", "dare"), ("two", "darex_q")):
        scale = ["--scale", 0.05] if method == "darex_q" else []
        words = [*pruning(place)[:-1], place / name, "--method", method, "--density", 0.05, *scale]
        assert command(*words).code == 0
        apply = ["delta", "apply", place / name, "--base", place / "base", "--output_dir", place / f"new-{name}"]
        assert command(*apply).code == 0
    first, second = read(place / "new-one"), read(place / "new-two")
    assert all(same_bits(first[name], second[name]) for name in first)


def test_a_base_that_is_another_model_is_told_with_the_number(place: Path, command: Command) -> None:
    TINY["llama"](seed=9).save_pretrained(place / "base")
    result = command(*pruning(place, "--density", 0.1))
    assert result.code == 0, result.err
    mean = json.loads((place / "out" / "delta.json").read_text())["mean_absolute_delta"]
    assert mean > 0.01 and f"mean |delta| is {mean:.2g}" in result.err and "check that the base" in result.err
    assert f"mean |delta| {mean:.3g}" in command("delta", "info", place / "out").out
    refused(command, place, *applying(place, "--overwrite"), naming=("digest",))


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(which: str, value: float, place: Path, command: Command) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 5] = value

    change_weights(place / which, spoil)
    for more in (["--density", 0.01], ["--density", 1], ["--density", 0], ["--method", "magnitude"]):
        refused(command, place, *pruning(place, *more), naming=(UP, "NaN"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["base", "tuned", "delta"])
def test_damaged_files(file: str, damage: str, place: Path, command: Command) -> None:
    target = place / file / (DELTA_FILE if file == "delta" else "model.safetensors")
    target.write_bytes(DAMAGE[damage](target))
    if file != "delta":
        refused(command, place, *pruning(place), naming=(target.name,))
    if file != "tuned":
        refused(command, place, *applying(place), naming=(target.name,))
    if file == "delta":
        refused(command, place, "delta", "info", place / "delta", naming=(target.name,))


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "..\\secret.safetensors"])
def test_an_index_that_leaves_its_directory(which: str, target: str, place: Path, command: Command) -> None:
    model = place / which
    shutil.copy(model / "model.safetensors", place / "secret.safetensors")
    names = list(read(model))
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(command, place, *pruning(place), naming=(target,))
    if which == "base":
        refused(command, place, *applying(place), naming=(target,))


def test_a_delta_file_that_is_a_link_elsewhere(place: Path, command: Command) -> None:
    (place / "delta" / DELTA_FILE).rename(place / "elsewhere.safetensors")
    (place / "delta" / DELTA_FILE).symlink_to(place / "elsewhere.safetensors")
    refused(command, place, *applying(place), naming=("link", "elsewhere.safetensors"))


@pytest.mark.parametrize("size", [100, 4_000])
def test_a_full_disk(size: int, place: Path, command: Command) -> None:
    (place / "out").mkdir()
    (place / "out" / "old.txt").write_text("the result of yesterday")
    before = tree(place)
    search = ["delta", "search", place / "delta", "--base", place / "base", "--dataset", place / "text"]
    for words in (
        pruning(place, "--overwrite", "--density", 0.5),
        applying(place, "--overwrite"),
        [*search, "--samples", 2, "--sequence_length", 16],
    ):
        with files_of_at_most(size):
            result = command(*words)
        assert result.code == 2 and result.complaint and "Traceback" not in result.err, result.err
        assert tree(place) == before, "a half-written file was left, or the old result was touched"


KILLED = """
import os, signal, sys
from sparse_ft.checkpoints import CheckpointWriter
from sparse_ft.deltas.store import DeltaWriter
kind, calls = {"spool": (DeltaWriter, "add_delta"), "file": (CheckpointWriter, "write")}[sys.argv[1]], 0
work = getattr(*kind)
def until_killed(*arguments, **options):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(*arguments, **options)
setattr(*kind, until_killed)
from sparse_ft.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("action", ["prune, while values are collected", "prune, while the file is laid out", "apply"])
def test_a_killed_run_leaves_the_old_result(action: str, place: Path, command: Command) -> None:
    words = applying(place) if action == "apply" else pruning(place, "--density", 0.1)
    assert command(*words).code == 0
    before = tree(place)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", KILLED, "spool" if "collected" in action else "file"]
    done = subprocess.run([*script, *map(str, words), "--overwrite"], env=environment, capture_output=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    after = tree(place)
    assert {name: after[name] for name in before} == before, "the old result was touched"
    assert len(after) > len(before), "it was killed before it had written anything"
    assert command(*words, "--overwrite").code == 0
    assert sorted(path.name for path in place.iterdir()) == ["base", "delta", "out", "text", "tuned"]
    if action != "apply":
        assert DeltaFile(place / "out").header.density == 0.1
