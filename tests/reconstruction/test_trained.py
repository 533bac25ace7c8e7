"""What is trained in one window: ranks and scales of adapters matrix by matrix."""

from __future__ import annotations

import pytest
import torch
from reconstruction.pairs import QUICK, pair, texts
from torch import nn

from sparse_ft.reconstruction import reconstruct
from sparse_ft.reconstruction.trained import ADAPTERS, TrainedWindow


class Narrow(nn.Module):
    """Matrices of shorter sides 3, 4 and 16; the name of one is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 16)
        self.wide = nn.ModuleDict({"fc": nn.Linear(16, 20), "v": nn.Linear(20, 3)})


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("lora_alpha", "scale"), [(None, 2.0), (24, 3.0)])
def test_each_matrix_has_a_rank_it_can_have(adapter: str, lora_alpha: int | None, scale: float) -> None:
    """And the scale that was asked for: lora_alpha / r, whatever its own rank."""
    module = Narrow()
    masks = {name: torch.rand(p.shape) > 0.5 for name, p in module.named_parameters() if p.ndim == 2}
    for name, mask in masks.items():
        mask[0, 0] = True
        module.get_parameter(name).data *= mask
    alpha = None if adapter == "scale_lora" else lora_alpha
    trained = TrainedWindow(module, adapter, masks, [], r=8, lora_alpha=alpha)
    layers = {name.rpartition("base_model.model.")[2]: m for name, m in trained._module.named_modules()}
    for name, rank in {"fc": 4, "wide.fc": 8, "wide.v": 3}.items():
        layer = layers[name]
        assert layer.r["default"] == rank
        if adapter != "scale_lora":
            assert layer.scaling["default"] == pytest.approx(scale)
    assert len(trained.parameters) == 6


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("train", ["mask_lora", "scale_lora+norms"])
def test_a_rank_above_a_matrix_is_cut_to_it(name: str, train: str) -> None:
    """With grouped heads keys and values are narrower than the rest of their window."""
    model, masks, dense = pair(name)
    narrowest = min(min(masks.shape(key)[-2:]) for key in masks)
    widest = max(min(masks.shape(key)[-2:]) for key in masks)
    r = widest + 8 if narrowest == widest else widest
    result = reconstruct(model, masks, dense, calibration=texts(), train=train, r=r, **QUICK | {"learning_rate": 5e-4})
    assert all(row.improved for row in result.windows)
    masks.verify(model)
