"""What retraining leaves beside the weights: scalars in the reporters, and an adapter only together with the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cli.refusals import Command, refused, retrain_words
from cli.workspace import tree
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from sparse_ft.cli.retrain_run import run_identity
from sparse_ft.masks import MaskSet


class Board(TrainerCallback):
    """A reporter of the Trainer: writes what it is given where TensorBoard would, and remembers it."""

    seen: ClassVar[list[dict[str, Any]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.directory = Path(args.output_dir) / "runs" / "today"
        self.directory.mkdir(parents=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.seen.append(dict(logs))
        (self.directory / "events").write_text(json.dumps(self.seen))


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> type[Board]:
    """`Board` under the name tensorboard, whether that is installed or not."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Board)
    Board.seen.clear()
    return Board


@pytest.mark.parametrize("method", ["mask_lora", "full"])
def test_reporters_get_the_sparsity(method: str, place: Path, command: Command, board: type[Board]) -> None:
    words = retrain_words(place, report_to="tensorboard", method=method, max_steps=3, logging_steps=1)
    assert command(*words).code == 0
    assert len(board.seen) == 3 + 1
    assert all(entry["sparsity/total"] == 0.5 and entry["sparsity/kept_zero"] == 0 for entry in board.seen)
    assert [entry["loss"] for entry in board.seen[:3]]
    written = place / "out" / "runs" / "today" / "events"
    assert json.loads(written.read_text()) == board.seen, "what the reporter wrote outlives the run"
    assert not (place / "out.run").exists()
    assert command("eval", place / "out", "--dataset", place / "text").code == 0


def test_without_report_to_nothing_is_reported(place: Path, command: Command, board: type[Board]) -> None:
    assert command(*retrain_words(place)).code == 0
    assert not board.seen and not (place / "out" / "runs").exists()


def test_a_reporter_that_is_not_installed_is_refused(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    refused(command, place, *retrain_words(place, report_to="tensorboard"), naming=("tensorboard", "installed"))


def test_no_adapter_without_a_result(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that revives on the way to the file fails the whole command, adapter included; then it can go on."""
    import sparse_ft.cli.publishing as publishing

    def revived(directory: Path, masks: MaskSet) -> dict[str, Any]:
        return {name: 1.0 - masks[name].float() for name in masks}

    before = tree(place)
    words = retrain_words(place, save_adapter=place / "adapter", save_steps=1)
    monkeypatch.setattr(publishing, "written_weights", revived)
    result = command(*words)
    assert result.code == 1 and "not zero" in result.complaint
    left = {name: content for name, content in tree(place).items() if not name.startswith("out.run")}
    assert left == before
    monkeypatch.undo()
    result = command(*words, "--resume_from_checkpoint")
    assert result.code == 0, result.err
    assert (place / "adapter" / "adapter_config.json").is_file() and (place / "out" / "sparse_ft.json").is_file()


CHANGES: dict[str, Callable[[TrainingArguments], None]] = {
    "scheduler": lambda training: training.lr_scheduler_kwargs.update({"num_cycles": 2}),
    "optimizer options": lambda training: setattr(training, "optim_args", "beta1=0.5"),
    "noise": lambda training: setattr(training, "neftune_noise_alpha", 5.0),
    "last batch": lambda training: setattr(training, "dataloader_drop_last", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_weights_is_part_of_a_run(change: str, pruned: Path, tmp_path: Path) -> None:
    from sparse_ft.models import load_model

    def identity() -> dict[str, Any]:
        return run_identity(training, {}, MaskSet.load(pruned), model, 16)

    model = load_model(pruned)
    training = TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_kwargs={})
    before = identity()
    CHANGES[change](training)
    assert identity() != before
