"""`MaskCallback` at the edges of the Trainer's events: while a checkpoint is saved, after a failure, in the logs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import named_weights
from sparse_ft.training import MaskCallback, is_complete_checkpoint, latest_complete_checkpoint

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]


class LateVandal(TrainerCallback):
    """Revives one weight after the callbacks before it have seen the step, as the Trainer is about to save."""

    def __init__(self, masks: MaskSet) -> None:
        self.masks = masks

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if control.should_save and state.global_step == 2:
            name = next(iter(self.masks))
            named_weights(model)[name].detach()[tuple((~self.masks[name]).nonzero()[0])] = 1e-3


def test_a_weight_revived_while_saving_is_found(
    sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    model, masks = sparse_model()
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    with pytest.raises(RuntimeError, match=r"1 pruned weights in 1 tensors are not zero.*at the save of step 2"):
        make_trainer(model, [MaskCallback(masks), LateVandal(masks)], **arguments).train()
    refused = tmp_path / "run" / "checkpoint-2"
    assert (refused / "model.safetensors").is_file() and not (refused / MASKS_FILE).exists()
    assert not is_complete_checkpoint(refused)
    checkpoint = latest_complete_checkpoint(tmp_path / "run")
    assert checkpoint == str(tmp_path / "run" / "checkpoint-1"), "the one before is sound"
    model, _ = sparse_model()
    make_trainer(model, [MaskCallback(masks)], **arguments).train(resume_from_checkpoint=checkpoint)
    masks.verify(model)
    assert is_complete_checkpoint(refused), "the resumed run has written over it"


def test_a_weight_packed_in_four_bits_is_refused_in_one_sentence(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    """As bitsandbytes leaves it: two weights per byte, in one column."""
    model, masks = sparse_model()
    layer = model.model.layers[0].self_attn.q_proj
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        ValueError, match=r"q_proj\.weight' is packed, uint8 \(512, 1\) in place of \(32, 32\)"
    ) as caught:
        make_trainer(model, [MaskCallback(masks)], max_steps=1).train()
    assert "\n" not in str(caught.value) and "MaskLoraConfig" in str(caught.value)


class Failure(TrainerCallback):
    """Stops the first run at its second step, and counts the hooks on a weight at every step."""

    def __init__(self, name: str) -> None:
        self.name, self.failed, self.hooks = name, False, set[int]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.hooks.add(len(named_weights(model)[self.name]._post_accumulate_grad_hooks))
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("the power went out")


def test_training_again_after_a_failure_has_each_hook_once(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    callback, failure = MaskCallback(masks), Failure(next(iter(masks)))
    with pytest.raises(RuntimeError, match="the power went out"):
        make_trainer(model, [callback, failure]).train()
    make_trainer(model, [callback, failure]).train()
    assert failure.hooks == {1}
    masks.verify(model)


def test_the_logged_sparsity_counts_kept_weights_that_are_zero(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    name = next(iter(masks))
    weight = named_weights(model)[name].requires_grad_(False)
    weight.zero_()
    trainer = make_trainer(model, [MaskCallback(masks)], max_steps=1)
    trainer.train()
    zeros = sum(int((named_weights(model)[n] == 0).sum()) for n in masks)
    for entry in trainer.state.log_history:
        assert entry["sparsity/kept_zero"] == int(masks[name].sum()) > 0
        assert entry["sparsity/total"] == pytest.approx(zeros / sum(mask.numel() for mask in masks.values()), abs=1e-9)


class Spoiler(TrainerCallback):
    """Puts NaN into a kept weight, into every weight, or into a gradient, at step 2."""

    def __init__(self, masks: MaskSet, what: str) -> None:
        self.name, self.what = next(iter(masks)), what
        self.place = tuple(masks[self.name].nonzero()[0])

    def on_step_begin(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        weight = named_weights(model)[self.name]
        if self.what == "gradient" and state.global_step == 1:
            weight.register_hook(lambda gradient: gradient * float("nan"))

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        weight = named_weights(model)[self.name].detach()
        if self.what != "gradient" and state.global_step == 2:
            weight[self.place if self.what == "kept weight" else ...] = float("nan")


@pytest.mark.parametrize("what", ["kept weight", "whole tensor"])
def test_weights_that_are_no_numbers_are_not_called_revived(
    what: str, sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Nor are they saved."""
    model, masks = sparse_model()
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    message = rf"1 tensors are not finite, the first '{next(iter(masks))}', after step 2; lower the learning rate"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(model, [Spoiler(masks, what), MaskCallback(masks)], **arguments).train()
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_frozen_weights_that_are_no_numbers(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    named_weights(model)[next(iter(masks))].requires_grad_(False).fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"1 tensors are not finite.*when training begins.*repair the model"):
        make_trainer(model, [MaskCallback(masks)]).train()


def test_a_gradient_that_is_no_number_stops_at_the_log(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    trainer = make_trainer(model, [Spoiler(masks, "gradient"), MaskCallback(masks)], logging_steps=1)
    with pytest.raises(RuntimeError, match="the gradient is not finite at step 2; lower the learning rate"):
        trainer.train()


def test_a_scaler_may_see_such_a_gradient(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    """It leaves the step out and lowers its scale."""
    model, masks = sparse_model()
    trainer, callback = make_trainer(model), MaskCallback(masks)
    logs = {"grad_norm": float("nan")}
    trainer.args.fp16 = True
    callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    trainer.args.fp16 = False
    with pytest.raises(RuntimeError, match="the gradient is not finite"):
        callback.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
