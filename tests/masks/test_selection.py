"""Selection keeps exactly the right number, the largest, and breaks ties by position."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.masks import keep_largest, keep_largest_per_row, keep_n_of_m

# Few distinct values, so that ties are the rule and not the exception.
tied = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=40)


def reference(scores: list[float], keep: int) -> list[bool]:
    """Sort by (score, index) and drop the first ones."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    kept = set(order[len(scores) - keep :])
    return [i in kept for i in range(len(scores))]


@settings(deadline=None)
@given(tied, st.data())
def test_keep_largest_is_the_sorted_order(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(scores)))
    assert keep_largest(torch.tensor(scores), keep).tolist() == reference(scores, keep)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 13), st.integers(0, 2**31), st.data())
def test_rows_are_independent(rows: int, size: int, seed: int, data: st.DataObject) -> None:
    scores = torch.randint(0, 4, (rows, size), generator=torch.Generator().manual_seed(seed)).float()
    keep = data.draw(st.integers(0, size))
    mask = keep_largest_per_row(scores, keep)
    assert mask.tolist() == [reference(row.tolist(), keep) for row in scores]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_all_equal_scores_give_exact_counts(dtype: torch.dtype) -> None:
    scores = torch.ones(7, 9, dtype=dtype)
    assert int(keep_largest(scores, 20).sum()) == 20
    assert keep_largest_per_row(scores, 4).sum(-1).tolist() == [4] * 7
    assert keep_n_of_m(scores[:, :8], 2, 4).sum(-1).tolist() == [4] * 7


def test_masks_are_nested() -> None:
    scores = torch.randint(0, 5, (6, 10)).float()
    masks = [keep_largest(scores, k) for k in range(61)]
    assert all(bool((b | ~a).all()) for a, b in itertools.pairwise(masks))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5), (4, 4)])
def test_n_of_m_is_the_best_of_all_masks(n: int, m: int) -> None:
    """Brute force over every candidate of a group: none keeps a larger sum of scores."""
    scores = torch.rand(5, 2 * m)
    mask = keep_n_of_m(scores, n, m)
    candidates = [torch.tensor([i in c for i in range(m)]) for c in itertools.combinations(range(m), n)]
    for row, kept in zip(scores.view(-1, m), mask.view(-1, m), strict=True):
        assert int(kept.sum()) == n
        assert float(row[kept].sum()) == pytest.approx(max(float(row[c].sum()) for c in candidates))


def test_n_of_m_ties_drop_the_lowest_index() -> None:
    assert keep_n_of_m(torch.ones(1, 8), 2, 4).tolist() == [[False, False, True, True] * 2]
    assert keep_n_of_m(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 2, 4).tolist() == [[False, False, True, True]]


def test_tail_of_an_indivisible_row_stays_dense_and_groups_do_not_cross_rows() -> None:
    scores = torch.rand(6, 10)
    mask = keep_n_of_m(scores, 1, 4)
    assert bool(mask[:, 8:].all())
    assert mask[:, :8].view(6, 2, 4).sum(-1).eq(1).all()
    assert torch.equal(mask[3], keep_n_of_m(scores[3:4], 1, 4)[0])


def test_experts_are_independent_matrices() -> None:
    scores = torch.rand(3, 4, 8)
    mask = keep_n_of_m(scores, 2, 4)
    assert all(torch.equal(mask[e], keep_n_of_m(scores[e], 2, 4)) for e in range(3))


def test_bad_arguments_name_the_values() -> None:
    with pytest.raises(ValueError, match="keep 5 of 4"):
        keep_largest(torch.rand(4), 5)
    with pytest.raises(ValueError, match="keep 5 of every 4"):
        keep_n_of_m(torch.rand(4), 5, 4)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        keep_largest(torch.tensor([1.0, float("nan")]), 1)
    with pytest.raises(ValueError, match="1 of 4 scores are NaN"):
        keep_n_of_m(torch.tensor([1.0, float("nan"), 2.0, 3.0]), 2, 4)
