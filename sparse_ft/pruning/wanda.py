"""Wanda: |weight| times the norm of the input feature it multiplies, compared within each output row.

    score_ij = |W_ij| * ||X_j||_2

Example:
    >>> moment = SecondMoment(64)
    >>> moment.add(inputs)                                             # (T, 64)
    >>> mask = wanda_mask(weight, moment.second_moment(), sparsity=0.5)

Limits: weights are not updated; unstructured removes floor(d * s) of each row, so the total can be a little below s.

Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1.
"""

from __future__ import annotations

from torch import Tensor

from sparse_ft.masks import Pattern, keep_largest_per_row, keep_n_of_m
from sparse_ft.pruning.inside import check_room, hide_removed
from sparse_ft.pruning.validation import check_matrix, resolve_pattern, share_of_row


def wanda_scores(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|W| * sqrt(second_moment) in fp32.

    Args:
        weight: (o, d).
        second_moment: (d,) mean of x_j^2 over tokens, from `SecondMoment` or `Hessian`; its scale does not matter.
    """
    return weight.detach().abs() * second_moment.float().sqrt()


def wanda_mask(
    weight: Tensor,
    second_moment: Tensor,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Bool mask (o, d), True = keep: floor(d * sparsity) removed from each row, or n of m kept in each group.

    Args:
        weight: (o, d); unchanged.
        second_moment: (d,) mean of x_j^2 over tokens.
        pattern: `"unstructured"` or `"n:m"` (n kept of m; a tail of d % m columns stays dense).
        sparsity: share removed of every row.
        inside: (o, d) bool, an older mask of the weight; what it removed stays removed.

    Raises:
        ValueError: invalid pattern or sparsity, shapes that do not fit, NaN/Inf in either tensor, a second moment that
            is all zero (no token reached the layer: use magnitude), or no such mask inside the older one.
    """
    parsed, share = resolve_pattern(pattern, sparsity)
    check_matrix(weight, second_moment, "second moment")
    width = weight.shape[1]
    removed = share_of_row(width, share)
    if inside is not None:
        check_room(inside, parsed, removed_per_row=removed)
    scores = hide_removed(wanda_scores(weight, second_moment), inside)
    if parsed.n is not None and parsed.m is not None:
        mask = keep_n_of_m(scores, parsed.n, parsed.m)
        return mask if inside is None else mask.logical_and_(inside)  # a tail of d % m columns is kept as it was
    return keep_largest_per_row(scores, width - removed)
