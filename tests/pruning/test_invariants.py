"""What holds for every method on every architecture, and on the weights that break careless code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tiny_models import TINY
from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import Target, find_targets, matrix_view
from sparse_ft.pruning import METHODS, magnitude_mask, prune, random_mask, sparsegpt, wanda_mask


def matrices(target: Target, tensor: Tensor) -> list[Tensor]:
    view = matrix_view(tensor, target.input_dim)
    return list(view) if target.kind == "experts" else [view]


def with_scaled_targets(model: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for target in find_targets(model):
            model.get_parameter(target.name).mul_(factor)
    return model


@pytest.mark.parametrize(
    "arguments", [dict(sparsity=0.6), dict(pattern="1:4"), dict(sparsity=0.6, allocation="global")]
)
@pytest.mark.parametrize("name", TINY)
def test_magnitude_ignores_scale_and_sign(name: str, arguments: dict[str, Any]) -> None:
    plain = prune(TINY[name](), progress=False, **arguments)
    assert prune(with_scaled_targets(TINY[name](), -4.0), progress=False, **arguments) == plain


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("name", TINY)
def test_a_higher_sparsity_keeps_a_subset(name: str, method: str) -> None:
    masks = [prune(TINY[name](), sparsity=s, method=method, progress=False) for s in (0.2, 0.5, 0.51, 0.9)]
    assert all(tight <= loose for loose, tight in itertools.pairwise(masks))


@pytest.mark.parametrize("name", TINY)
def test_global_magnitude_cuts_at_one_threshold(name: str) -> None:
    model, dense = TINY[name](), TINY[name]()
    masks = prune(model, sparsity=0.6, allocation="global", min_keep=0.0, progress=False)
    kept = torch.cat([dense.get_parameter(n).detach()[mask].abs() for n, mask in masks.items()])
    gone = torch.cat([dense.get_parameter(n).detach()[~mask].abs() for n, mask in masks.items()])
    assert len(gone) == round(0.6 * (len(gone) + len(kept)))
    assert float(gone.max()) <= float(kept.min())


@pytest.mark.parametrize("name", TINY)
def test_the_floor_of_global_magnitude_holds_for_each_matrix(name: str) -> None:
    model, min_keep = TINY[name](), 0.004
    targets = find_targets(model)
    with torch.no_grad():  # one block so faint that a single threshold would empty it
        for target in targets:
            if target.block == targets[0].block:
                model.get_parameter(target.name).mul_(1e-4)
    masks = prune(model, sparsity=0.7, allocation="global", min_keep=min_keep, progress=False)
    total = sum(t.numel for t in targets)
    floor = int(total * min_keep)
    assert sum(t - k for k, t in masks.counts().values()) == round(0.7 * total)
    parts = [m for target in targets for m in matrices(target, masks[target.name])]
    assert all(int(m.sum()) >= min(m.numel(), floor) for m in parts)
    assert any(int(m.sum()) == floor for m in parts), "the floor was never needed"


@pytest.mark.parametrize("name", TINY)
def test_erk_keeps_the_total_with_one_factor_for_all(name: str) -> None:
    model = TINY[name]()
    targets = find_targets(model)
    masks = prune(model, sparsity=0.7, allocation="erk", progress=False)
    total = sum(t.numel for t in targets)
    assert sum(t - k for k, t in masks.counts().values()) == round(0.7 * total)
    parts = [m for target in targets for m in matrices(target, masks[target.name])]
    factors = [int(m.sum()) / sum(m.shape) for m in parts if not m.all()]  # kept / (out + in)
    assert max(factors) - min(factors) <= 2 / min(sum(m.shape) for m in parts)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def awkward() -> dict[str, Tensor]:
    """(o, d) weights: d that 4 and 8 do not divide, zero rows, ties everywhere, and bf16 near its smallest numbers."""
    w = torch.randn(8, 12, generator=generator())
    zero_row = w.clone()
    zero_row[3] = 0
    tiny = (torch.randn(8, 16, generator=generator()) * 2.0**-130).bfloat16()
    assert bool((tiny.abs() < torch.finfo(torch.bfloat16).tiny).any()) and int((tiny == 0).sum()) < tiny.numel() / 2
    stored_in_out = torch.randn(16, 16, generator=generator()).T  # a square Conv1D: nothing in its shape tells
    return {
        "8x12": w, "5x16": torch.randn(5, 16, generator=generator()), "conv1d": stored_in_out, "zero row": zero_row,
        "all equal": torch.full((8, 12), 0.25), "all zero": torch.zeros(8, 12), "subnormal": tiny,
        "13 inputs": torch.randn(6, 13, generator=generator()),
    }  # fmt: skip


def masked(method: str, weight: Tensor, **request: Any) -> Tensor:
    """The method's mask, calibrated on inputs of which one feature is always zero."""
    x = torch.randn(200, weight.shape[1], generator=generator())
    x[:, 2] = 0
    if method == "magnitude":
        return magnitude_mask(weight, **request)
    if method == "random":
        return random_mask(tuple(weight.shape), "w", 0, **request)
    if method == "wanda":
        return wanda_mask(weight, x.square().mean(0), **request)
    result = sparsegpt(weight, 2 / len(x) * x.T @ x, block_size=8, **request)
    assert torch.isfinite(result.weight).all() and not result.weight[~result.mask].any()
    return result.mask


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", awkward())
@pytest.mark.parametrize(
    "request_", [dict(sparsity=0.5), dict(sparsity=0.77), dict(pattern="2:4"), dict(pattern="3:8")]
)
def test_counts_are_exact_on_awkward_weights(kind: str, method: str, request_: dict[str, Any]) -> None:
    weight = awkward()[kind]
    before = weight.clone()
    mask = masked(method, weight, **request_)
    rows, width = weight.shape
    assert torch.equal(weight, before)
    if "pattern" in request_:
        n, m = (int(part) for part in request_["pattern"].split(":"))
        whole = width // m * m
        assert mask[:, whole:].all()
        assert (mask[:, :whole].reshape(rows, -1, m).sum(-1) == n).all()
    elif method == "wanda":
        assert (mask.sum(1) == width - math.floor(width * request_["sparsity"])).all()
    else:
        assert int((~mask).sum()) == round(request_["sparsity"] * rows * width)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:.*only zeros")
def test_the_mask_is_the_truth_where_kept_weights_underflow(method: str, dtype: torch.dtype) -> None:
    """Kept weights that are zero in the model's dtype stay kept, in the masks and in their file's counts."""
    model = with_scaled_targets(TINY["llama"](), 1e-6 if dtype == torch.float16 else 1e-38).to(dtype)
    calibration = [torch.randint(3, 96, (8, 16), generator=generator())]
    masks = prune(model, pattern="2:4", method=method, calibration=calibration, progress=False)
    assert all(2 * kept == total for kept, total in masks.counts().values())
    surprises = masks.surprises(model)
    assert surprises and all(s.kept_zero and not s.pruned_nonzero for s in surprises.values())
    assert MaskSet.from_zeros(model).sparsity() > 0.5, "the zeros alone would say something else"
