"""Wanda on deltas: the score, exact counts in every row, and what has no score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deltas.delta_models import randn
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.deltas import magnitude_delta, wanda_delta, wanda_keep


@given(st.integers(1, 6), st.integers(4, 20), st.floats(0.2, 1))
def test_the_formula_written_again(rows: int, width: int, density: float) -> None:
    delta, inputs = randn(rows, width), randn(50, width, seed=1) * torch.linspace(0.1, 5, width)
    norms = np.sqrt((inputs.double().numpy() ** 2).sum(0))
    pruned = wanda_delta(delta, torch.from_numpy(norms), density=density)
    for row in range(rows):
        scores = np.abs(delta[row].double().numpy()) * norms
        keep = np.zeros(width, dtype=bool)
        keep[np.argsort(scores, kind="stable")[width - round(density * width) :]] = True
        assert np.array_equal(pruned[row].numpy(), np.where(keep, delta[row].numpy(), 0))


def test_equal_norms_are_magnitude_per_row_and_their_size_does_not_matter() -> None:
    delta, norms = randn(20, 40), torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(
        wanda_delta(delta, torch.full((40,), 3.0), density=0.2), magnitude_delta(delta, density=0.2, per="row")
    )
    assert torch.equal(wanda_keep(delta, norms, density=0.2), wanda_keep(delta, norms * 64, density=0.2))
    assert not torch.equal(wanda_delta(delta, norms, density=0.2), magnitude_delta(delta, density=0.2, per="row"))


def test_ends_and_stacked_experts() -> None:
    delta, norms = randn(3, 5, 8), randn(3, 1, 8, seed=1).abs()
    assert torch.equal(wanda_delta(delta, norms, density=1.0), delta)
    assert not wanda_delta(delta, norms, density=0.0).any()
    stacked = wanda_delta(delta, norms, density=0.5)
    for expert in range(3):
        assert torch.equal(stacked[expert], wanda_delta(delta[expert], norms[expert, 0], density=0.5))


def test_a_density_that_keeps_nothing_warns() -> None:
    with pytest.warns(UserWarning, match="density 0.01 of 8 inputs rounds to no entry"):
        assert not wanda_delta(randn(4, 8), torch.ones(8), density=0.01).any()


def test_refusals() -> None:
    delta, norms = randn(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"\(4, 8\) and the input norms \(4,\)"):
        wanda_delta(delta, torch.ones(4), density=0.5)
    with pytest.raises(ValueError, match="prune tensors without inputs by magnitude"):
        wanda_delta(randn(8), norms, density=0.5)
    with pytest.raises(ValueError, match="all zero"):
        wanda_delta(delta, torch.zeros(8), density=0.5)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input norms contain"):
            wanda_delta(delta, norms * bad, density=0.5)
    delta[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite entries"):
        wanda_delta(delta, norms, density=0.5)
