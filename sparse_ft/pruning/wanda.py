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

import math

from torch import Tensor

from sparse_ft.masks import Pattern, keep_largest_per_row, keep_n_of_m
from sparse_ft.pruning.validation import check_matrix, resolve_pattern


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
) -> Tensor:
    """Bool mask (o, d), True = keep: floor(d * sparsity) removed from each row, or n of m kept in each group.

    Args:
        weight: (o, d); unchanged.
        second_moment: (d,) mean of x_j^2 over tokens.
        pattern: `"unstructured"` or `"n:m"` (n kept of m; a tail of d % m columns stays dense).
        sparsity: share removed of every row.

    Raises:
        ValueError: invalid pattern or sparsity, shapes that do not fit, NaN/Inf in either tensor, or a second moment
            that is all zero (no token reached the layer: use magnitude).
    """
    parsed, share = resolve_pattern(pattern, sparsity)
    check_matrix(weight, second_moment, "second moment")
    scores = wanda_scores(weight, second_moment)
    if parsed.n is not None and parsed.m is not None:
        return keep_n_of_m(scores, parsed.n, parsed.m)
    width = weight.shape[1]
    # 0.29 * 100 is 28.999999999999996 in binary; the digits below 1e-6 are noise, not a fraction to cut off.
    return keep_largest_per_row(scores, width - math.floor(round(width * share, 6)))
