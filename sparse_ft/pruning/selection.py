"""From scores to the mask of one tensor: the step that magnitude and random pruning share."""

from __future__ import annotations

from torch import Tensor

from sparse_ft.masks import Pattern, keep_largest, keep_n_of_m
from sparse_ft.pruning.inside import check_room, hide_removed
from sparse_ft.pruning.validation import resolve_pattern


def keep_scores(
    scores: Tensor,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    removed: int | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Bool mask (True = keep) of the largest `scores`; ties are removed lowest flat index first.

    Args:
        scores: (..., d), the input dimension last.
        pattern: `"unstructured"` over the whole tensor, or `"n:m"` (n kept of m along d, a tail of d % m kept).
        sparsity: share removed; unstructured removes exactly round(sparsity * numel).
        removed: exact number to remove instead of `sparsity`, as an allocation returns it; unstructured only.
        inside: bool, an older mask of the shape of `scores`; what it removed stays removed.

    Raises:
        ValueError: invalid pattern, sparsity or count, NaN scores, or no such mask inside the older one.
    """
    if removed is not None:
        parsed = _check_removed(scores, Pattern.parse(pattern), sparsity, removed)
    else:
        parsed, share = resolve_pattern(pattern, sparsity)
        removed = round(share * scores.numel())
    if inside is not None:
        check_room(inside, parsed, removed=removed)
        scores = hide_removed(scores, inside)
    if parsed.n is None or parsed.m is None:
        return keep_largest(scores, scores.numel() - removed)
    mask = keep_n_of_m(scores, parsed.n, parsed.m)
    # A tail of d % m columns is kept as it was.
    return mask if inside is None else mask.logical_and_(inside.to(mask.device))


def _check_removed(scores: Tensor, pattern: Pattern, sparsity: float | None, removed: int) -> Pattern:
    if pattern.is_structured or sparsity is not None:
        raise ValueError(
            f"removed={removed} was given with pattern '{pattern}' and sparsity {sparsity}; "
            "it replaces the sparsity of an unstructured pattern, so give only one of them."
        )
    if not 0 <= removed <= scores.numel():
        raise ValueError(f"Cannot remove {removed} of {scores.numel()} weights; the count must lie between the two.")
    return pattern
