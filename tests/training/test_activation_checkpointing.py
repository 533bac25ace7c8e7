"""Frozen embeddings under activation checkpointing: the same gradients as without, or a sentence instead of nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from training.steps import AtEachStep, copies
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from sparse_ft.adapters import LoraPruneConfig, MaskLoraConfig, ScaleLoraConfig
from sparse_ft.masks import MaskSet
from sparse_ft.training import MaskCallback, watch_gradient_flow
from sparse_ft.training.gradient_flow import check_gradients_came

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]

# transformers for Python 3.10 has the older name only
OPTION = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
#: transformers before 5.23 checkpoints a block together with its hooks
HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)
WAYS: dict[str, dict[str, Any]] = {
    "default": {OPTION: True},
    "reentrant": {OPTION: True, f"{OPTION}_kwargs": {"use_reentrant": True}},
    "not reentrant": {OPTION: True, f"{OPTION}_kwargs": {"use_reentrant": False}},
}
if OPTION == "activation_checkpointing":
    WAYS["every second block"] = {OPTION: True, f"{OPTION}_kwargs": {"use_reentrant": True, "every_n_layers": 2}}


ADAPTERS = {"mask_lora": MaskLoraConfig, "scale_lora": ScaleLoraConfig, "lora_prune": LoraPruneConfig}


def trained_in_part(what: str, model: PreTrainedModel, masks: MaskSet) -> Any:
    """The model with a part of it trainable and the embedding frozen."""
    torch.manual_seed(0)
    if what in ADAPTERS:
        return get_peft_model(model, ADAPTERS[what](r=4, masks=masks, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln_" in name)
    return model


class Gradients(TrainerCallback):
    """The gradients at every step, as clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        parameters = model.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})


PAIRS = [(what, "llama") for what in (*ADAPTERS, "norms")]
PAIRS += [(what, name) for what in ("mask_lora", "norms") for name in ("gpt2", "mixtral")]


@pytest.mark.parametrize(("what", "name"), PAIRS)
def test_gradients_are_those_without_checkpointing(
    what: str, name: str, sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    runs: dict[str, list[dict[str, torch.Tensor]]] = {}
    for way, arguments in {"none": {}, **WAYS}.items():
        model, masks = sparse_model(name)
        for dropout in [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
            dropout.p = 0.0
        model = trained_in_part(what, model, masks)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        gradients = Gradients()
        make_trainer(model, [gradients, MaskCallback(masks)], max_steps=3, **arguments).train()
        assert gradients.steps[0].keys() == trainable, "everything trainable gets a gradient"
        runs[way] = gradients.steps
    for way in WAYS:
        for ours, plain in zip(runs[way], runs["none"], strict=True):
            assert all(torch.equal(gradient, plain[key]) for key, gradient in ours.items()), way


class Forgetful(TrainerCallback):
    """Undoes what transformers does for models that take `input_ids`, as a model with another input leaves it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        model.disable_input_require_grads()


@pytest.mark.parametrize("what", ["mask_lora", "norms"])
def test_a_block_without_gradient_is_said_in_one_sentence(
    what: str, sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    model = trained_in_part(what, model, masks)
    before = copies(model)
    trainer = make_trainer(model, [Forgetful(), MaskCallback(masks)], **WAYS["reentrant"])
    message = r"trainable tensors in 'model\.layers\.0' gets a gradient.*enable_input_require_grads"
    if HOOKS_INSIDE:  # the adapters' is torch's own message: the loss has no gradient at all
        message = r"trainable tensors in the blocks gets a gradient|does not require grad"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items()), "nothing was trained"
    trainer.remove_callback(Forgetful)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in copies(model).items())


def test_norms_would_have_stayed_as_they_were(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    """Why it is an error: only the final norm, behind the blocks, trains, and nothing says so."""
    model, masks = sparse_model()
    model = trained_in_part("norms", model, masks)
    before = copies(model)
    make_trainer(model, [Forgetful()], **WAYS["reentrant"]).train()
    assert [name for name, weight in copies(model).items() if not torch.equal(weight, before[name])] == [
        "model.norm.weight"
    ]


def test_without_reentrant_checkpointing_nothing_is_refused(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    for arguments in ({}, WAYS["not reentrant"]):
        model, masks = sparse_model()
        model = trained_in_part("norms", model, masks)
        hooks: list[int] = []
        watch = AtEachStep(lambda model, seen=hooks: seen.append(sum(len(m._forward_hooks) for m in model.modules())))
        make_trainer(model, [Forgetful(), MaskCallback(masks), watch], eval_strategy="steps", **arguments).train()
        assert hooks == [0] * 6, "the look at the first step leaves nothing behind"


def test_a_model_without_trainable_parameters_is_refused(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        make_trainer(model, [MaskCallback(masks)], optimizers=(optimizer, None)).train()


def test_an_evaluation_before_training_is_no_reason_to_refuse(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    model = trained_in_part("norms", model, masks)
    trainer = make_trainer(model, [MaskCallback(masks)], eval_strategy="steps", eval_on_start=True, **WAYS["reentrant"])
    trainer.train()
    assert watch_gradient_flow(model), "checkpointing is still on: each block would be looked at again"


def test_blocks_without_gradients_are_noticed_after_the_backward_pass(sparse_model: SparseModel) -> None:
    model, masks = sparse_model()
    model = trained_in_part("norms", model, masks)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    check_gradients_came(model)  # nothing is checkpointed: an optimizer may have taken them
    enable = getattr(model, f"{OPTION}_enable")
    enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="None of the 4 trainable tensors in the blocks gets a gradient"):
        check_gradients_came(model)
    norm = model.model.layers[1].input_layernorm.weight
    norm.grad = torch.ones_like(norm)
    check_gradients_came(model)
    check_gradients_came(model.requires_grad_(False))  # a head alone needs nothing from the blocks
