"""Magnitude masks: exact counts, invariances, and the best n:m choice by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.pruning.magnitude import magnitude_mask


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 17), sparsity=st.floats(0, 0.999), ties=st.booleans())
def test_removes_exactly_the_rounded_count(rows, columns, sparsity, ties):
    weight = torch.ones(rows, columns) if ties else matrix(rows, columns)
    mask = magnitude_mask(weight, sparsity=sparsity)
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == round(sparsity * rows * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_kept_weight_is_smaller_than_a_removed_one(dtype):
    weight = matrix(32, 48).to(dtype)
    mask = magnitude_mask(weight, sparsity=0.7)
    assert weight[mask].abs().min() >= weight[~mask].abs().max()
    assert int((~mask).sum()) == round(0.7 * 32 * 48)


@pytest.mark.parametrize("request_", [{"sparsity": 0.6}, {"pattern": "2:4"}, {"pattern": "3:8"}])
def test_scale_and_sign_do_not_matter(request_):
    weight = matrix(16, 24)
    flips = torch.where(matrix(16, 24, seed=1) > 0, 1.0, -1.0)
    expected = magnitude_mask(weight, **request_)
    assert torch.equal(magnitude_mask(weight * 4, **request_), expected)
    assert torch.equal(magnitude_mask(weight * flips, **request_), expected)


def test_higher_sparsity_keeps_a_subset_even_with_ties():
    weight = (matrix(20, 30) * 2).round()  # many equal magnitudes
    masks = [magnitude_mask(weight, sparsity=s) for s in (0.0, 0.2, 0.5, 0.51, 0.9)]
    for loose, tight in itertools.pairwise(masks):
        assert not (tight & ~loose).any()
    assert masks[0].all()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 4)])
def test_group_choice_is_the_best_of_all(kept, group):
    weight = matrix(6, 2 * group)
    mask = magnitude_mask(weight, pattern=f"{kept}:{group}")
    for row, keep in zip(weight.view(-1, group), mask.view(-1, group), strict=True):
        best = max(itertools.combinations(range(group), kept), key=lambda c: float(row[list(c)].abs().sum()))
        assert keep.nonzero().flatten().tolist() == list(best)


def test_tail_of_an_incomplete_group_stays_dense():
    mask = magnitude_mask(matrix(8, 11), pattern="2:4")
    assert mask[:, 8:].all()
    assert (mask[:, :8].view(8, 2, 4).sum(-1) == 2).all()


def test_transposed_storage_gives_the_same_mask():
    weight = matrix(12, 20)
    stored_transposed = weight.T.contiguous().T
    assert torch.equal(magnitude_mask(stored_transposed, sparsity=0.4), magnitude_mask(weight, sparsity=0.4))
    assert torch.equal(magnitude_mask(stored_transposed, pattern="2:4"), magnitude_mask(weight, pattern="2:4"))


def test_exact_number_removed_replaces_the_sparsity():
    weight = matrix(5, 7)
    assert int((~magnitude_mask(weight, removed=13)).sum()) == 13
    assert int(magnitude_mask(weight, removed=35).sum()) == 0
    for wrong in ({"removed": 36}, {"removed": -1}, {"removed": 3, "sparsity": 0.5}, {"removed": 3, "pattern": "2:4"}):
        with pytest.raises(ValueError, match="remove"):
            magnitude_mask(weight, **wrong)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": -0.1}, "-0.1"),
        ({"sparsity": float("nan")}, "nan"),
        ({"sparsity": "half"}, "half"),
        ({}, "sparsity"),
        ({"pattern": "5:4"}, "5:4"),
        ({"pattern": "rows", "sparsity": 0.5}, "rows"),
        ({"pattern": "2:4", "sparsity": 0.6}, "2:4"),
    ],
)
def test_refuses_what_makes_no_sense(request_, message):
    with pytest.raises(ValueError, match=message):
        magnitude_mask(matrix(4, 8), **request_)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(value):
    weight = matrix(4, 8)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        magnitude_mask(weight, sparsity=0.5)


def test_refuses_integer_and_empty_weights():
    with pytest.raises(ValueError, match="int8"):
        magnitude_mask(torch.ones(4, 4, dtype=torch.int8), sparsity=0.5)
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        magnitude_mask(torch.ones(0, 4), sparsity=0.5)
