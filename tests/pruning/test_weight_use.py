"""Weights that a model uses without calling their modules: what happens to them is said as it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import TINY
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

import sparse_ft
from sparse_ft.masks import MaskSet
from sparse_ft.models import named_weights
from sparse_ft.pruning.weight_use import WeightUse

BATCHES = [torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, state_size=4, time_step_rank=8)
    return MambaForCausalLM(MambaConfig(num_hidden_layers=2, **sizes)).eval()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_weight_used_without_its_module_is_pruned_by_magnitude_and_named(method: str) -> None:
    model = mamba()
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    with pytest.warns(UserWarning, match="without calling their modules") as caught:
        masks = sparse_ft.prune(model, pattern="2:4", method=method, calibration=BATCHES)
    [message] = [str(entry.message) for entry in caught if entry.category is UserWarning]
    names = [f"backbone.layers.{i}.mixer.dt_proj.weight" for i in (0, 1)]
    assert message.startswith("The model uses 2 weights without") and all(name in message for name in names)
    assert "give more calibration data" not in message and "in_proj" not in message
    by_magnitude = MaskSet.from_scores({name: before[name].abs() for name in masks}, pattern="2:4")
    for name in masks:
        assert torch.equal(masks[name], by_magnitude[name]) == (name in names), name


def test_a_weight_that_nothing_reaches_still_asks_for_more_data() -> None:
    """An expert that is a module of its own and gets no token is not used at all."""

    class Mlp(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.old, self.idle = old, nn.Linear(32, 32)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.old(hidden) if hidden.shape[-1] == 32 else self.idle(hidden)

    model = TINY["llama"]()
    for layer in model.model.layers:
        layer.mlp = Mlp(layer.mlp)
    with pytest.warns(UserWarning, match=r"2 matrices saw fewer than 32 calibration tokens.*idle.*give more") as caught:
        sparse_ft.prune(model, pattern="2:4", method="wanda", calibration=BATCHES)
    assert len([entry for entry in caught if entry.category is UserWarning]) == 1


def test_tensors_that_stay_dense_are_not_said_to_be_pruned() -> None:
    """ERK at a low sparsity leaves small tensors dense; they need no statistic."""
    model = TINY["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        masks = sparse_ft.prune(model, sparsity=0.1, allocation="erk", method="wanda", calibration=BATCHES)
    assert any(kept == total for kept, total in masks.counts().values())
    assert any(kept < total for kept, total in masks.counts().values())


def test_a_use_is_any_function_that_is_given_the_weight() -> None:
    one, two, three = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
    with WeightUse({"one": one, "two": two, "three": three}) as use:
        torch.ones(2, 4) @ one
        nn.functional.linear(torch.ones(2, 4), weight=two)
    torch.ones(2, 4) @ three
    assert use.used == {"one", "two"}
