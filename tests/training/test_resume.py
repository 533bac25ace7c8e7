"""Runs that end by kill -9 and go on as if nothing had happened, and the choice of the checkpoint to go on from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from training import killed_run
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.checkpoints import check_weights, read_sidecars
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import load_model, named_weights
from sparse_ft.training import MaskCallback, is_complete_checkpoint, latest_complete_checkpoint

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]
SCRIPT = Path(__file__).with_name("killed_run.py")
REPOSITORY = SCRIPT.parent.parent.parent


# what there is to resume from after each; MaskCallback's files come last
RESUMES_AT = {
    "training": 4,
    "half the weights": 2,
    "weights only": 2,
    "half the optimizer": 2,
    "half the state": 2,
    "before older checkpoints go": 4,
    "before the masks": 4,
}
QUICK = ("training", "half the optimizer")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of the run that nobody kills."""
    model = killed_run.run(tmp_path_factory.mktemp("straight"))
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in killed_run.MOMENTS]
)
def test_kill_loses_nothing(moment: str, straight: dict[str, torch.Tensor], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), moment],
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    checkpoint = latest_complete_checkpoint(tmp_path)
    assert checkpoint == str(tmp_path / f"checkpoint-{RESUMES_AT[moment]}")
    model = killed_run.run(tmp_path, resume=checkpoint)
    for name, weight in named_weights(model).items():
        assert torch.equal(weight.detach(), straight[name]), f"{name} differs from the straight run's"
    assert latest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "mask_lora"])
def test_resumed_run_is_the_straight_run(
    optim: str, adapter: bool, sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    results = []
    for name, stop in (("straight", None), ("resumed", 3)):
        arguments: dict[str, Any] = {
            "output_dir": str(tmp_path / name),
            "optim": optim,
            "optim_args": "momentum=0.9" if optim == "sgd" else None,
            "lr_scheduler_type": "linear",
            "save_strategy": "steps",
            "save_steps": 3,
        }
        for resume in (False, True):
            if resume and stop is None:
                continue
            model, masks = sparse_model()
            if adapter:
                torch.manual_seed(0)
                model = get_peft_model(model, MaskLoraConfig(r=2, masks=masks, task_type="CAUSAL_LM"))
            callbacks = [MaskCallback(masks)] + ([StopAt(stop)] if stop and not resume else [])
            found = latest_complete_checkpoint(tmp_path / name)
            assert (found is not None) == resume
            make_trainer(model, callbacks, **arguments).train(resume_from_checkpoint=found)
        results.append({n: w.detach().clone() for n, w in named_weights(model).items()})
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


def test_masks_of_a_resumed_run_come_from_its_checkpoint(
    sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """A kept weight that became zero in training is a zero of the checkpoint, but not of the masks."""
    model, masks = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    place = tuple(masks[name].nonzero()[0])

    class MakeZero(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named_weights(model)[name].detach()[place] = 0.0

    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(model, [MakeZero(), MaskCallback(masks)], max_steps=2, **saving)
    trainer.train()
    assert trainer.state.log_history[-1]["sparsity/kept_zero"] == 1
    checkpoint = latest_complete_checkpoint(tmp_path / "run")
    resumed = load_model(str(checkpoint))
    assert named_weights(resumed)[name][place] == 0
    callback = MaskCallback()
    make_trainer(resumed, [callback], max_steps=4, **saving).train(resume_from_checkpoint=checkpoint)
    assert callback.masks == masks
    assert named_weights(resumed)[name][place] != 0


def test_a_checkpoint_is_a_sparse_checkpoint(
    sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model, masks = sparse_model()
    make_trainer(model, [MaskCallback(masks)], max_steps=4, save_strategy="steps", save_steps=2).train()
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        saved, record = read_sidecars(checkpoint)
        loaded = load_model(checkpoint)
        assert saved == masks
        saved.verify(loaded)
        check_weights(saved, record, loaded)
        assert "masks" not in json.loads((checkpoint / "config.json").read_text())


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "one byte short" else path.read_bytes()[: len(how)])


@pytest.fixture
def two_checkpoints(sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path) -> Path:
    model, masks = sparse_model()
    make_trainer(model, [MaskCallback(masks)], max_steps=2, save_strategy="steps", save_steps=1).train()
    return tmp_path / "run"


def test_which_checkpoint_is_complete(two_checkpoints: Path) -> None:
    first, second = two_checkpoints / "checkpoint-1", two_checkpoints / "checkpoint-2"
    assert latest_complete_checkpoint(two_checkpoints) == str(second)
    (two_checkpoints / "checkpoint-10").mkdir()
    (two_checkpoints / "checkpoint-best").mkdir()
    (two_checkpoints / "checkpoint-11").write_text("a file")
    assert latest_complete_checkpoint(two_checkpoints) == str(second)
    for file, ways in {
        "trainer_state.json": ("missing", "empty", "one byte short", "half"),
        "model.safetensors": ("missing", "empty", "one byte short", "half"),
        "optimizer.pt": ("empty", "one byte short", "half"),
        "rng_state.pth": ("empty", "half"),
        MASKS_FILE: ("empty", "one byte short"),
    }.items():
        path = second / file
        whole = path.read_bytes()
        for how in ways:
            damage(path, how)
            if file == "trainer_state.json" and how == "one byte short":
                assert whole.endswith(b"}\n"), "what is missing is only the line's end"
                assert is_complete_checkpoint(second)
            else:
                assert not is_complete_checkpoint(second), f"{file} {how}"
                assert latest_complete_checkpoint(two_checkpoints) == str(first)
            path.write_bytes(whole)
    (second / MASKS_FILE).unlink()
    assert is_complete_checkpoint(second), "the Trainer deletes older checkpoints before the masks are written"
    renamed = second.rename(two_checkpoints / "checkpoint-7")
    assert not is_complete_checkpoint(renamed), "its state is of another step"


def test_a_model_without_an_optimizer_is_not_resumed_from(
    two_checkpoints: Path, sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    """The Trainer would start again with empty moments at the first learning rate, and not say so."""
    model, masks = sparse_model()
    third = two_checkpoints / "checkpoint-3"
    saving: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    make_trainer(model, [MaskCallback(masks)], **saving).train()
    assert (third / "trainer_state.json").is_file() and not is_complete_checkpoint(third)
    with pytest.warns(UserWarning, match=r"checkpoint-3' holds a model without .* goes on from 'checkpoint-2'"):
        assert latest_complete_checkpoint(two_checkpoints) == str(two_checkpoints / "checkpoint-2")
    for step in (1, 2):
        (two_checkpoints / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="goes on from the beginning"):
        assert latest_complete_checkpoint(two_checkpoints) is None


def test_the_highest_step_is_the_latest(two_checkpoints: Path) -> None:
    tenth = two_checkpoints / "checkpoint-10"
    shutil.copytree(two_checkpoints / "checkpoint-1", tenth)
    state = json.loads((tenth / "trainer_state.json").read_text())
    (tenth / "trainer_state.json").write_text(json.dumps({**state, "global_step": 10}))
    assert latest_complete_checkpoint(two_checkpoints) == str(tenth), "10 comes after 2, in numbers"


def test_sharded_checkpoint_needs_every_shard(two_checkpoints: Path) -> None:
    checkpoint = two_checkpoints / "checkpoint-2"
    model = load_model(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) > 2 and is_complete_checkpoint(checkpoint)
    shards[1].unlink()
    assert not is_complete_checkpoint(checkpoint)


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_complete_checkpoint(tmp_path) is None
    assert latest_complete_checkpoint(tmp_path / "not there") is None
