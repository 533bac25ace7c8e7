"""Exact selection of the weights to keep: the right count always, ties broken by position.

All functions order entries by (score, index) and drop the lowest first, so of two equal scores the one with the lower
index goes. One fixed order makes masks nested: what is kept at a higher sparsity is kept at every lower one. A
threshold comparison (`score <= kth`) has neither property: in bf16 it drops every tie of the threshold.

Thresholds come from selection (`kthvalue`), never from a full sort.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def keep_largest(scores: Tensor, keep: int) -> Tensor:
    """Keep exactly `keep` entries with the largest scores of the whole tensor.

    Args:
        scores: real, any shape.
        keep: how many entries to keep, 0 to scores.numel().

    Returns:
        Bool mask of the shape of `scores`, True = keep.

    Raises:
        ValueError: if `keep` is out of range or a score is NaN.

    Example:
        >>> keep_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
        tensor([ True, False,  True])
    """
    return keep_largest_per_row(scores.reshape(1, -1), keep).reshape(scores.shape)


def keep_largest_per_row(scores: Tensor, keep: int) -> Tensor:
    """Keep exactly `keep` entries with the largest scores of every row.

    Args:
        scores: real `(..., d)`; rows run along the last dimension.
        keep: how many entries of each row to keep, 0 to d.

    Returns:
        Bool mask `(..., d)`.

    Raises:
        ValueError: if `keep` is out of range or a score is NaN.
    """
    size = scores.shape[-1]
    if not 0 <= keep <= size:
        raise ValueError(f"Cannot keep {keep} of {size} weights; the count must be between 0 and {size}.")
    _check_scores(scores)
    drop = size - keep
    if drop == 0 or scores.numel() == 0:
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if keep == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    threshold = torch.kthvalue(scores, drop, dim=-1, keepdim=True).values
    mask = scores > threshold
    tied = scores == threshold
    # The threshold itself is dropped; of the entries equal to it the last ones may be needed to reach `keep`.
    missing = keep - mask.sum(-1, keepdim=True)
    if bool((missing > 0).any()):
        rank_from_end = tied.flip(-1).cumsum(-1).flip(-1)
        mask |= tied & (rank_from_end <= missing)
    return mask


def keep_largest_globally(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Drop a share of the entries of all tensors together, round(share * numel) of them: those with the lowest scores.

    Args:
        scores: real, any shapes, by name.
        share: of the entries to drop, in [0, 1).

    Returns:
        Bool masks by name.
    """
    flat = torch.cat([score.reshape(-1).float() for score in scores.values()])
    mask = keep_largest(flat, flat.numel() - round(share * flat.numel()))
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep exactly the n largest scores of every m consecutive entries of a row.

    Args:
        scores: real `(..., d)`, inputs last. If d is no multiple of m, the last d % m entries are all kept: groups
            never cross rows.
        n: entries kept per group, 1 <= n <= m.
        m: entries per group.

    Returns:
        Bool mask `(..., d)`.

    Raises:
        ValueError: if n is not in [1, m] or a score is NaN.
    """
    if not 1 <= n <= m:
        raise ValueError(f"Cannot keep {n} of every {m} weights; n must be between 1 and m.")
    _check_scores(scores)
    mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    whole = scores.shape[-1] // m * m
    groups = scores[..., :whole].unflatten(-1, (-1, m))
    mask[..., :whole] = keep_largest_of_group(groups, n).flatten(-2)
    return mask


def keep_largest_of_group(groups: Tensor, n: int) -> Tensor:
    """Keep the n largest of each group by counting, for every entry, how many of its group come after it.

    Args:
        groups: real `(..., m)`; m is small, the work is m² comparisons per group and no sort.
        n: entries to keep.

    Returns:
        Bool mask `(..., m)`.
    """
    m = groups.shape[-1]
    columns = groups.unbind(-1)
    kept = []
    for i in range(m):
        ahead = torch.zeros(columns[i].shape, dtype=torch.uint8, device=groups.device)
        for j in range(m):
            if j != i:
                # A later entry wins a tie: the lower index is dropped first.
                ahead += (columns[j] > columns[i]) if j < i else (columns[j] >= columns[i])
        kept.append(ahead < n)
    return torch.stack(kept, -1)


def _check_scores(scores: Tensor) -> None:
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError(
            f"{int(scores.isnan().sum())} of {scores.numel()} scores are NaN; "
            f"check the weights and the calibration statistics for NaN or Inf."
        )
