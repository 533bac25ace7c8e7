"""Magnitude pruning of deltas: exact counts, stable ties, no rescale, and the global threshold in two passes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from deltas.delta_models import randn
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from sparse_ft.deltas import global_magnitude, magnitude_delta, magnitude_keep


def largest(values: np.ndarray, keep: int) -> np.ndarray:
    """Brute force: sort by (|value|, index) and keep the last."""
    order = sorted(range(values.size), key=lambda index: (abs(float(values[index])), index))
    mask = np.zeros(values.size, dtype=bool)
    mask[order[values.size - keep :]] = True
    return mask


# the two last differ in the lower half of their bits only
VALUES = [0.0, -0.0, 0.5, -0.5, -2.0, 1.0, -(1 + 2.0**-20)]
TIED = arrays(np.float32, st.integers(1, 40), elements=st.sampled_from(VALUES))


@given(TIED, st.floats(0, 1))
def test_exact_counts_and_stable_ties(values: np.ndarray, density: float) -> None:
    keep = magnitude_keep(torch.from_numpy(values), density=density)
    assert np.array_equal(keep.numpy(), largest(values, round(density * values.size)))
    pruned = magnitude_delta(torch.from_numpy(values), density=density)
    assert np.array_equal(pruned.numpy(), np.where(keep.numpy(), values, 0))


@given(st.integers(1, 5), st.integers(1, 12), st.floats(0, 1))
def test_rows_on_their_own(rows: int, width: int, density: float) -> None:
    delta = randn(rows, width).round(decimals=1)
    keep = magnitude_keep(delta, density=density, per="row")
    for row, mask in zip(delta, keep, strict=True):
        assert np.array_equal(mask.numpy(), largest(row.numpy(), round(density * width)))


def test_kept_scores_are_no_smaller_than_dropped_ones_and_nothing_is_rescaled() -> None:
    delta = randn(60, 50).bfloat16()
    pruned = magnitude_delta(delta, density=0.1)
    keep = pruned != 0
    assert int(keep.sum()) == 300 and pruned.dtype == torch.float32
    assert float(delta[keep].abs().min()) >= float(delta[~keep].abs().max())
    assert torch.equal(pruned[keep], delta[keep].float())


def test_identity_and_zeros_at_the_ends() -> None:
    delta = randn(9, 4)
    assert torch.equal(magnitude_delta(delta, density=1.0), delta)
    assert torch.equal(magnitude_delta(delta, density=0.0), torch.zeros(9, 4))
    assert torch.equal(magnitude_delta(torch.zeros(3), density=0.5), torch.zeros(3))
    assert magnitude_delta(torch.tensor(3.0), density=0.9).item() == 3.0


def test_a_rescale_is_refused_unless_forced() -> None:
    delta = randn(40)
    with pytest.raises(ValueError, match=r"scale is 0\.1, .*force_scale=True"):
        magnitude_delta(delta, density=0.1, scale=0.1)
    forced = magnitude_delta(delta, density=0.1, scale=0.1, force_scale=True)
    torch.testing.assert_close(forced * 0.1, magnitude_delta(delta, density=0.1))


def stream(tensors: dict[str, Tensor], order: list[str] | None = None) -> Callable[[], Iterator[tuple[str, Tensor]]]:
    return lambda: ((name, tensors[name]) for name in (order or list(tensors)))


def assert_global(tensors: dict[str, Tensor], density: float) -> None:
    names = sorted(tensors)
    flat = np.concatenate([tensors[name].float().numpy().reshape(-1) for name in names])
    expected = largest(flat, round(density * flat.size))
    for order in (names, names[::-1]):
        chosen = global_magnitude(stream(tensors, order), density=density)
        found = np.concatenate([chosen.keep(name, tensors[name]).numpy().reshape(-1) for name in names])
        assert np.array_equal(found, expected)
        assert chosen.kept == expected.sum() and chosen.numel == flat.size


@given(st.lists(TIED, min_size=1, max_size=4), st.floats(0, 1))
def test_global_threshold_with_ties_in_any_order(parts: list[np.ndarray], density: float) -> None:
    assert_global({f"t{index}": torch.from_numpy(part) for index, part in enumerate(parts)}, density)


@pytest.mark.parametrize("density", [0.0, 1e-3, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_threshold_on_many_sizes(density: float, dtype: torch.dtype) -> None:
    scales = {"a": 1e-3, "b": 1.0, "c": 1e-30, "d": 1e-42, "e": 1e30}
    tensors = {n: (randn(30, 20, seed=i) * s).to(dtype) for i, (n, s) in enumerate(scales.items())}
    assert_global(tensors, density)


def test_global_threshold_differs_from_a_threshold_per_tensor() -> None:
    tensors = {"small": randn(100) * 1e-3, "large": randn(100)}
    chosen = global_magnitude(stream(tensors), density=0.3)
    assert int(chosen.keep("small", tensors["small"]).sum()) == 0
    assert int(chosen.keep("large", tensors["large"]).sum()) == 60


def test_refusals() -> None:
    delta = randn(4)
    for bad in (float("nan"), float("inf")):
        broken = delta.clone()
        broken[2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            magnitude_delta(broken, density=0.5)
        with pytest.raises(ValueError, match="'b' contains NaN or infinite"):
            global_magnitude(stream({"a": delta, "b": broken}), density=0.5)
    with pytest.raises(ValueError, match=r"density .* got -0\.1"):
        magnitude_delta(delta, density=-0.1)
    with pytest.raises(ValueError, match="per is 'column'"):
        magnitude_delta(delta, density=0.5, per="column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tensors"):
        global_magnitude(stream({}), density=0.5)
    with pytest.raises(ValueError, match="'a' comes twice"):
        global_magnitude(lambda: [("a", delta), ("a", delta)], density=0.5)
    with pytest.raises(ValueError, match="second pass"):
        once = iter([("a", delta)])
        global_magnitude(lambda: once, density=0.5)
    with pytest.raises(ValueError, match="'z' was not among the 1"):
        global_magnitude(stream({"a": delta}), density=0.5).keep("z", delta)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        magnitude_delta(delta, density=1e-3)
