"""From scores to the mask of one tensor: the step that magnitude and random pruning share."""

from __future__ import annotations

from torch import Tensor

from sparse_ft.masks import Pattern, keep_largest, keep_n_of_m
from sparse_ft.pruning.validation import resolve_pattern


def keep_scores(
    scores: Tensor,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    removed: int | None = None,
) -> Tensor:
    """Bool mask (True = keep) of the largest `scores`; ties are removed lowest flat index first.

    Args:
        scores: (..., d), the input dimension last.
        pattern: `"unstructured"` over the whole tensor, or `"n:m"` (n kept of m along d, a tail of d % m kept).
        sparsity: share removed; unstructured removes exactly round(sparsity * numel).
        removed: exact number to remove instead of `sparsity`, as an allocation returns it; unstructured only.

    Raises:
        ValueError: invalid pattern, sparsity or count, or NaN scores.
    """
    if removed is not None:
        return _keep_all_but(scores, Pattern.parse(pattern), sparsity, removed)
    parsed, share = resolve_pattern(pattern, sparsity)
    if parsed.n is not None and parsed.m is not None:
        return keep_n_of_m(scores, parsed.n, parsed.m)
    return keep_largest(scores, scores.numel() - round(share * scores.numel()))


def _keep_all_but(scores: Tensor, pattern: Pattern, sparsity: float | None, removed: int) -> Tensor:
    if pattern.is_structured or sparsity is not None:
        raise ValueError(
            f"removed={removed} was given with pattern '{pattern}' and sparsity {sparsity}; "
            "it replaces the sparsity of an unstructured pattern, so give only one of them."
        )
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"Cannot remove {removed} of {scores.numel()} weights; the count must lie between the two.")
    return keep_largest(scores, scores.numel() - removed)
