"""Merges of spoiled, foreign and odd checkpoints, on full disks and killed: one sentence, or the bytes there should be.

What a merge refuses while it reads the YAML and the headers is tested in `merging/test_config.py`, `test_planning.py`,
`test_preflight.py` and `test_vocabulary.py`; here are whole commands.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli.workspace import Result, tree
from merging.checkpoints import near, read, tensors_of, write
from safetensors.torch import save_file

from sparse_ft.masks import MaskSet

Command = Callable[..., Result]
HEADER = "merge_method: task_arithmetic\nbase_model: @base\n"
TEXT = HEADER + "models: [{model: @a, parameters: {weight: 1}}, {model: @b, parameters: {weight: 0.5}}]\n"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and two fine-tunes of their own to spoil."""
    base = tensors_of(4)
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / "in" / name, near(base, seed) if seed else base, {"<unk>": 0, "x": 9})
    return tmp_path


def words_of(place: Path, text: str, out: str = "out") -> list[str]:
    """The command line of a merge; `@name` stands for a model."""
    (place / "merge.yaml").write_text(text.replace("@", f"{place}/in/"))
    return ["merge", str(place / "merge.yaml"), str(place / out)]


def refused(command: Command, place: Path, text: str = TEXT, *more: object) -> str:
    """The sentence with which a merge is refused; nothing is left of it and no input is touched."""
    before = tree(place / "in")
    result = command(*words_of(place, text), *more)
    assert result.code == 2, result.out + result.err
    assert tree(place / "in") == before
    assert sorted(path.name for path in place.iterdir()) == ["in", "merge.yaml"]
    return result.complaint


# -- models that do not fit --------------------------------------------------------------------------------------------


def test_another_architecture(place: Path, command: Command) -> None:
    write(place / "in" / "a", tensors_of(4), model_type="qwen2")
    assert "model_type is 'qwen2', not 'llama'" in refused(command, place)


def test_a_resized_vocabulary_says_what_becomes_of_the_rows(place: Path, command: Command) -> None:
    words = {"<unk>": 0, "x": 9, "new": 11}
    wide = near(tensors_of(4, rows=12), 1) | {name: read(place / "in" / "a")[name] for name in (UP,)}
    write(place / "in" / "a", wide, words)
    complaint = refused(command, place)
    assert "'" + f"{place}/in/base' has 10 embedding rows but" in complaint and "--truncate_embeddings" in complaint
    result = command(*words_of(place, TEXT), "--truncate_embeddings")
    assert result.code == 0 and "the last 2 embedding rows of" in result.out
    result = command(*words_of(place, TEXT + "tokenizer_source: base"), "--overwrite")
    assert result.code == 0 and "the first 'new': their rows are left out" in result.out
    result = command(*words_of(place, TEXT + "tokenizer_source: union"), "--overwrite")
    assert result.code == 0 and "lacks 1 of 3 tokens, the first 'new'" in result.out
    assert "left out" not in result.out


def test_missing_and_extra_tensors_are_said_and_merged_without(place: Path, command: Command) -> None:
    spoiled = read(place / "in" / "a")
    del spoiled[UP]
    spoiled["model.layers.1.mlp.bias"] = torch.ones(6)
    write(place / "in" / "a", spoiled)
    result = command(*words_of(place, TEXT))
    assert result.code == 0 and f"lacks '{UP}': merged without it" in result.out
    assert "the only model that has it: 'model.layers.1.mlp.bias'" in result.out
    out, base, b = (read(place / name) for name in ("out", "in/base", "in/b"))
    torch.testing.assert_close(out[UP], base[UP] + 0.5 * (b[UP] - base[UP]))
    assert torch.equal(out["model.layers.1.mlp.bias"], torch.ones(6))


def test_another_base_is_a_warning_with_its_number(place: Path, command: Command) -> None:
    write(place / "in" / "base", tensors_of(4, seed=9))
    result = command(*words_of(place, TEXT), "--dry_run")
    warning = next(line for line in result.out.splitlines() if "another base" in line)
    shown = float(warning.split("differs from the base by ")[1].split(" ")[0])
    names = [name for name in tensors_of(4) if ".layers." in name]
    base, a = read(place / "in" / "base"), read(place / "in" / "a")
    means = [float((a[name] - base[name]).abs().mean()) for name in names]
    assert result.code == 0 and min(means) * 0.9 < shown < max(means) * 1.1


@pytest.mark.parametrize("density", [".nan", "nan", ".inf", "-0.1", "many"])
def test_densities_that_are_none(place: Path, command: Command, density: str) -> None:
    text = TEXT.replace("task_arithmetic", "ties").replace("weight: 1}", f"weight: 1, density: {density}}}")
    complaint = refused(command, place, text)
    assert "density" in complaint and ("finite" in complaint or "between 0 and 1" in complaint)


def test_the_same_model_twice_and_keys_that_do_not_exist(place: Path, command: Command) -> None:
    assert "lists the model" in refused(command, place, TEXT.replace("@b,", "@a,"))
    shutil.copytree(place / "in" / "a", place / "in" / "copy")
    (place / "in" / "link").symlink_to("a")
    assert "are the same model" in refused(command, place, TEXT.replace("@b,", "@link,"))
    assert command(*words_of(place, TEXT.replace("@b,", "@copy,"))).code == 0, "a copy is a model of its own"
    shutil.rmtree(place / "out")
    assert "Did you mean 'dtype'" in refused(command, place, TEXT + "dtyp: float32")
    assert "Did you mean 'density'" in refused(command, place, TEXT.replace("weight: 1}", "densty: 1}"))


def test_files_that_lie(place: Path, command: Command) -> None:
    file = place / "in" / "a" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert "is truncated" in refused(command, place)
    file.write_bytes(whole)
    file.rename(place / "in" / "elsewhere.safetensors")
    index = place / "in" / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors_of(4), "../elsewhere.safetensors")}))
    assert "outside the directory" in refused(command, place)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors_of(4), "model-00001-of-00001.safetensors")}))
    assert "model-00001-of-00001.safetensors" in refused(command, place)


def test_a_file_that_shrinks_during_the_merge(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_ft.merging import merge

    execute, file = merge.execute, place / "in" / "b" / "model.safetensors"

    def shrink_first(*args: object, **options: object) -> object:
        with open(file, "r+b") as opened:
            opened.truncate(file.stat().st_size - 40)
        return execute(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(merge, "execute", shrink_first)
    result = command(*words_of(place, TEXT))
    assert result.code == 2 and "is truncated" in result.complaint and not (place / "out").exists()


def test_an_output_that_is_an_input_or_leads_to_one(place: Path, command: Command) -> None:
    (place / "in" / "link").symlink_to("a")
    for out in ("in/a", "in/link", "in/../in/a"):
        before = tree(place / "in")
        result = command(*words_of(place, TEXT, out), "--overwrite")
        assert result.code == 2 and "is also an input" in result.complaint, out
        assert tree(place / "in") == before


# -- disks that are full -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 64 kB, where one may be mounted."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def large(place: Path) -> str:
    """A merge of a few hundred kilobytes."""
    for seed, name in enumerate(("big", "bigger")):
        write(place / "in" / name, near({UP: torch.zeros(300, 300)}, seed))
    return "merge_method: linear\nmodels: [{model: @big}, {model: @bigger}]\nparameters: {weight: 1}\n"


def test_a_disk_without_room_is_told_before_any_work(place: Path, small_disk: Path, command: Command) -> None:
    words = words_of(place, large(place))
    result = command(*words[:2], small_disk / "out")
    assert result.code == 2 and "GB free and the checkpoint needs" in result.complaint
    assert list(small_disk.iterdir()) == [] or not (small_disk / "out").exists()


def test_a_disk_that_fills_up_during_the_merge(
    place: Path, small_disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10**12})
    monkeypatch.setattr("sparse_ft.checkpoints.writer.shutil.disk_usage", lambda path: usage)
    words = words_of(place, large(place))
    result = command(*words[:2], small_disk / "out")
    assert result.code == 2 and "No space left on device" in result.complaint and not (small_disk / "out").exists()


@pytest.mark.parametrize("writes", [0, 3, 9])
def test_after_space_is_made_the_same_command_goes_on(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    words = [*words_of(place, TEXT), "--max_shard_size", "200", "--threads", "1"]
    assert command(*words[:2], place / "straight", *words[3:]).code == 0
    real, left = os.pwrite, [writes]

    def pwrite(*args: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", pwrite)
        result = command(*words)
    assert result.code == 2 and "No space left on device" in result.complaint and not (place / "out").exists()
    result = command(*words)
    assert result.code == 0, result.err
    assert weights(place / "out") == weights(place / "straight")
    assert ("from the interrupted run" in result.out) == (writes > 0)


def weights(directory: Path) -> dict[str, bytes]:
    """Everything but what names the command and the output."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name not in ("merge.json", "README.md", "sparse_ft.json")
    }


# -- killed ------------------------------------------------------------------------------------------------------------

# Tells its parent of every piece written: it is killed after a share of the work, not after a time.
TALKING = """
import os, sys, time
write = os.pwrite
def talk(*args):
    done = write(*args)
    print("wrote", flush=True)
    time.sleep(0.005)
    return done
os.pwrite = talk
from sparse_ft.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def killed_after(words: list[str], writes: int, finished: Callable[[], bool] = lambda: True) -> bool:
    """Start a merge and kill it when it has written so often, counted from when `finished` holds; False if it ended."""
    command = [sys.executable, "-c", TALKING, *words, "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        writes -= line.startswith("wrote") and finished()
        if writes <= 0:
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.close()
    return process.wait() == -signal.SIGKILL


@pytest.mark.distributed
def test_a_killed_command_goes_on_to_the_same_bytes(place: Path, command: Command) -> None:
    """Killed twice while it merges and once while it imposes the masks."""
    masks = MaskSet.from_scores({UP: torch.rand(6, 4), UP.replace("1", "2"): torch.rand(6, 4)}, sparsity=0.5)
    base = read(place / "in" / "base")
    masks.apply_({name: base[name] for name in masks})
    save_file(base, place / "in" / "base" / "model.safetensors")
    masks.save(place / "in" / "base")
    text = "merge_method: dare_ties\nbase_model: @base\npreserve_masks: base\nseed: 5\nmodels:\n"
    text += (
        "- {model: @a, parameters: {weight: 1, density: 0.5}}\n- {model: @b, parameters: {weight: 1, density: 0.4}}\n"
    )
    words = [*words_of(place, text), "--max_shard_size", "200"]
    assert command(*words[:2], place / "straight", *words[3:]).code == 0
    notes = place / ".out.unfinished" / ".resume" / "finished.json"
    files = len(list((place / "straight").glob("*.safetensors"))) - 1  # without the masks

    def done() -> list[str]:
        return list(json.loads(notes.read_text())) if notes.exists() else []

    seen: list[str] = []
    for writes in (8, 7):
        assert killed_after(words, writes)
        assert not (place / "out").exists() and set(seen) <= set(done()), "what was finished stays finished"
        seen = done()
    assert 0 < len(seen) < files
    assert killed_after(words, 1, lambda: len(done()) == files), "while masks are imposed"
    result = command(*words)
    assert result.code == 0 and f"{files} files, {files} of them from the interrupted run" in result.out
    assert weights(place / "out") == weights(place / "straight")
    assert not list(place.glob(".out*"))
    MaskSet.load(place / "out").verify(read(place / "out"))
