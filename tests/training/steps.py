"""What several tests of masked training use: copies of weights, the test of pruned ones, an optimizer mixing rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from sparse_ft.masks import MaskSet
from sparse_ft.models import named_weights


def copies(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def pruned_are_positive_zero(model: PreTrainedModel, masks: MaskSet) -> bool:
    weights = named_weights(model)
    pruned = [weights[name].detach()[~mask] for name, mask in masks.items()]
    return all(bool((values == 0).all()) and not bool(values.signbit().any()) for values in pruned)


class AtEachStep(TrainerCallback):
    """Calls a function with the model after every optimizer step."""

    def __init__(self, function: Callable[[PreTrainedModel], None], event: str = "on_step_end") -> None:
        setattr(self, event, lambda args, state, control, model, **kwargs: function(model))


class RowMixer(torch.optim.Optimizer):
    """Not element-wise: each row of the update is the row's mean gradient, as in a crude preconditioner."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    mean = parameter.grad.mean(-1, keepdim=True)
                    parameter.add_(parameter.grad + mean, alpha=-group["lr"])
