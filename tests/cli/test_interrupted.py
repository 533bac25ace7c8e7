"""A run that is killed loses nothing: the old result is whole, and the run goes on to the weights it would have had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.workspace import Result, tree

from sparse_ft.cli.retrain_run import bare_resume_flag, checkpoint_to_resume, run_dir_of
from sparse_ft.masks import MaskSet

Command = Callable[..., Result]
STEPS = 6


def words(source: Path, text: Path, target: Path, *more: object) -> list[str]:
    fixed: list[object] = ["retrain", "--model_name_or_path", source, "--output_dir", target, "--dataset", text]
    fixed += ["--sequence_length", 16, "--max_steps", STEPS, "--save_steps", 2, "--learning_rate", "1e-2", "--no_eval"]
    return [str(word) for word in (*fixed, *more)]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.fixture(scope="module", params=["mask_lora", "full"])
def straight(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pruned: Path, text: Path
) -> Path:
    """A run without interruption, its run directory kept."""
    from sparse_ft.cli.main import main

    target = tmp_path_factory.mktemp(f"straight_{request.param}") / "out"
    assert main(words(pruned, text, target, "--method", request.param, "--keep_run")) == 0
    return target


def method_of(directory: Path) -> str:
    return str(json.loads((directory / "sparse_ft.json").read_text())["arguments"]["method"])


@pytest.mark.parametrize("damage", ["last is half-written", "only the first is left", "none is left"])
def test_resumed_run_ends_with_the_same_weights(
    damage: str, straight: Path, pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    """What a kill leaves: a run directory without a result, its newest checkpoint perhaps half-written."""
    run = run_dir_of(tmp_path / "out")
    shutil.copytree(run_dir_of(straight), run)
    # save_total_limit keeps two: steps 4 and 6
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    if damage == "last is half-written":
        (run / "checkpoint-6" / "trainer_state.json").unlink()
    else:
        shutil.rmtree(run / "checkpoint-6")
    if damage == "none is left":
        shutil.rmtree(run / "checkpoint-4")
    result = command(
        *words(pruned, text, tmp_path / "out", "--method", method_of(straight)), "--resume_from_checkpoint"
    )
    assert result.code == 0, result.err
    assert weights(tmp_path / "out") == weights(straight)
    MaskSet.load(tmp_path / "out")
    assert not run.exists()


def test_a_failure_keeps_the_checkpoints_and_a_success_removes_them(
    pruned: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_ft.cli.retrain as retrain

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(retrain, "publish", full_disk)
    result = command(*words(pruned, text, tmp_path / "out"))
    assert result.code == 2 and "No space left" in result.complaint
    (note,) = [line for line in result.err.splitlines() if line.startswith("note: ")]
    assert str(tmp_path / "out.run") in note and "--resume_from_checkpoint true" in note and "remove it" in note
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run" / "checkpoint-6" / "trainer_state.json").is_file()
    monkeypatch.undo()
    assert command(*words(pruned, text, tmp_path / "out", "--resume_from_checkpoint", "true")).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_before_the_first_checkpoint_leaves_nothing(
    pruned: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_ft.cli.retrain as retrain

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(retrain, "_train", interrupted)
    result = command(*words(pruned, text, tmp_path / "out"))
    assert result.code == 130 and "note: " not in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["true", "True", "yes"])
def test_resuming_what_never_began_begins(flag: str, tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path / "out.run", {"r": 16}, flag) is None


@pytest.mark.parametrize("flag", [None, "false", "no"])
def test_not_resuming_refuses_a_left_over_run(flag: str | None, tmp_path: Path) -> None:
    (tmp_path / "out.run" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"out\.run.*--resume_from_checkpoint true"):
        checkpoint_to_resume(tmp_path / "out.run", {}, flag)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume_from_checkpoint", "false"]])
def test_a_left_over_run_is_told_before_the_model_is_looked_for(
    more: list[str], text: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "out.run" / "checkpoint-2").mkdir(parents=True)
    result = command(*words(tmp_path / "no model", text, tmp_path / "out", *more))
    assert result.code == 2 and "out.run' holds an earlier run" in result.complaint
    assert "which --overwrite does not" in result.complaint and (tmp_path / "out.run" / "checkpoint-2").is_dir()


def test_a_run_that_was_another_is_not_continued(tmp_path: Path) -> None:
    run = tmp_path / "out.run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"r": 8, "seed": 0}))
    with pytest.raises(ValueError, match="started with r 8 but now it is 16"):
        checkpoint_to_resume(run, {"r": 16, "seed": 0}, "true")
    (run / "run.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be continued"):
        checkpoint_to_resume(run, {"r": 16}, "true")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--resume_from_checkpoint"], ["--resume_from_checkpoint", "true"]),
        (["--resume-from-checkpoint", "--bf16"], ["--resume-from-checkpoint", "true", "--bf16"]),
        (["--resume_from_checkpoint", "c"], ["--resume_from_checkpoint", "c"]),
        (["--resume_from_checkpoint=c", "--bf16"], ["--resume_from_checkpoint=c", "--bf16"]),
        ([], []),
    ],
)
def test_bare_resume_flag(given: list[str], read: list[str]) -> None:
    assert bare_resume_flag(given) == read


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sparse_ft", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_kill_during_training_and_saving(straight: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL again and again, a little later each time, until the run gets through."""
    arguments = words(pruned, text, tmp_path / "out", "--method", method_of(straight), "--resume_from_checkpoint")
    run, kills = run_dir_of(tmp_path / "out"), 0
    for attempt in range(20):
        seen = {path.name: path.stat().st_mtime_ns for path in run.glob("checkpoint-*")}
        process = start(arguments)
        deadline = time.monotonic() + 120
        # wait for the next save to begin, then for a moment that differs from attempt to attempt
        while process.poll() is None and time.monotonic() < deadline:
            if any(
                seen.get(path.name) != path.stat().st_mtime_ns for path in run.glob("checkpoint-*") if path.exists()
            ):
                break
            time.sleep(0.005)
        time.sleep(0.3 * attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr and process.stderr.read().decode()
        if (tmp_path / "out").exists():  # killed between the result's rename and the end of the process
            break
    else:
        pytest.fail("the run never got through")
    assert kills >= 1
    assert weights(tmp_path / "out") == weights(straight)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("out", "out.run")], "temporaries were left"


@pytest.mark.slow
def test_kill_while_pruning_keeps_the_old_result(dense: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "out"
    options = ["prune", "--model_name_or_path", str(dense), "--output_dir", str(target)]
    assert command(*options, "--sparsity", "0.5").code == 0
    before = tree(target)
    process = start([*options, "--sparsity", "0.7", "--overwrite"])
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert tree(target) == before
    assert command(*options, "--sparsity", "0.7", "--overwrite").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "what the killed process left was not removed"
