"""What training leaves in the record and the report: logs of every retraining, trained weights, reconstruction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cli.workspace import Result

from sparse_ft.checkpoints import read_sidecars
from sparse_ft.cli.publishing import Outcome, publish, thinned
from sparse_ft.masks import MaskSet

Command = Callable[..., Result]


def retrain(command: Command, source: Path, target: Path, text: Path, *words: object) -> dict[str, Any]:
    """Retrain for a few steps; the record."""
    fixed = ["--dataset", text, "--sequence_length", 16, "--logging_steps", 1, "--no_eval"]
    result = command("retrain", "--model_name_or_path", source, "--output_dir", target, *fixed, *words)
    assert result.code == 0, result.err
    return json.loads((target / "sparse_ft.json").read_text())


def test_each_retraining_keeps_its_log(pruned: Path, text: Path, tmp_path: Path, command: Command) -> None:
    first = retrain(command, pruned, tmp_path / "a", text, "--method", "full", "--max_steps", 4)
    log = first["training"]["logs"]["full"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    for key in ("loss", "learning_rate", "grad_norm", "sparsity/total"):
        assert all(key in entry for entry in log[:4]), key
    second = retrain(command, tmp_path / "a", tmp_path / "b", text, "--max_steps", 3)
    assert [step["training"] for step in second["history"]] == [{}, first["training"]]
    assert len([e for e in second["training"]["logs"]["mask_lora"] if "loss" in e]) == 3
    page = (tmp_path / "b" / "report.html").read_text()
    assert "2. retrain full" in page and "3. retrain mask_lora" in page
    trainable = second["training"]["trainable"]
    assert trainable["groups"]["mask_lora"]["tensors"] == 28 and f"{trainable['trainable']:,}" in page


def test_a_page_made_anew_from_the_record_has_the_curves(
    pruned: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    retrain(command, pruned, tmp_path / "a", text, "--max_steps", 3)
    before = (tmp_path / "a" / "report.html").read_text()
    for name in ("report.html", "report.json"):
        (tmp_path / "a" / name).unlink()
    assert command("report", tmp_path / "a").code == 0
    after = (tmp_path / "a" / "report.html").read_text()

    def training(page: str) -> str:
        return page[page.index("<h2>Training</h2>") : page.index("<h2>What changed</h2>")]

    assert training(after) == training(before)


def test_windows_of_a_reconstruction_are_kept_and_drawn(pruned: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(pruned, own)
    windows = [{"block": "model.layers.0", "window": "mlp", "loss_before": 0.5, "loss_after": 0.1, "iterations": 8}]
    outcome = Outcome("retrain", [], "m", "reconstruct", {"method": "reconstruct"}, reconstruction=windows)
    publish(own, MaskSet.load(own), outcome)
    _, record = read_sidecars(own)
    assert record.training == {"reconstruction": windows}
    assert "mlp: mean squared error of its output" in (own / "report.html").read_text()


def test_another_text_of_the_same_name_is_another_run(
    pruned: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped goes on with the text it began with, wherever that lies, and with no other."""
    own = tmp_path / "text"
    shutil.copytree(text, own)
    words: list[object] = ["retrain", "--model_name_or_path", pruned, "--output_dir", tmp_path / "out"]
    words += ["--dataset", own, "--sequence_length", 16, "--max_steps", 2, "--save_steps", 1, "--no_eval"]
    monkeypatch.setattr("sparse_ft.cli.retrain.publish", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    assert command(*words).code == 2
    monkeypatch.undo()
    before = (own / "train.txt").read_text()
    (own / "train.txt").write_text(before.replace("fox", "dog", 1))
    result = command(*words, "--resume_from_checkpoint", "true")
    assert result.code == 2 and "started with train_text_digest" in result.complaint
    (own / "train.txt").write_text(before)
    result = command(*words, "--resume_from_checkpoint", "true")
    assert result.code == 0, result.err


@pytest.mark.parametrize("count", [0, 1, 999, 1000, 1001, 12_345])
def test_long_logs_are_thinned_evenly(count: int) -> None:
    entries: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        entries.append({"step": step, "loss": 2.0})
        if step % 500 == 0:
            entries.append({"step": step, "eval_loss": 2.0})
    kept = thinned(entries)
    steps = [entry["step"] for entry in kept if "loss" in entry]
    assert len(steps) <= 1000 and len(steps) >= min(count, 500)
    assert [entry for entry in kept if "eval_loss" in entry] == [entry for entry in entries if "eval_loss" in entry]
    assert steps == sorted(steps) and steps[-1:] == list(range(1, count + 1))[-1:]
    assert len({after - before for before, after in pairwise(steps)}) <= 1
    assert count > 1000 or kept == entries
