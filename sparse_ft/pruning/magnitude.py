"""Magnitude pruning: the score of a weight is its absolute value.

    score_ij = |W_ij|

Unstructured pruning removes exactly round(s * numel) of the tensor, n:m keeps the n largest of each m along the input.

Example:
    >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), pattern="2:4")
    tensor([[False,  True,  True, False]])

Limits: blind to the inputs; one threshold for a whole tensor, so pass fused tensors (experts, qkv) part by part.

Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks".
"""

from __future__ import annotations

from torch import Tensor

from sparse_ft.masks import Pattern
from sparse_ft.pruning.selection import keep_scores
from sparse_ft.pruning.validation import check_weight


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W| in fp32, same shape as `weight`."""
    return weight.detach().abs().float()


def magnitude_mask(
    weight: Tensor,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    removed: int | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Bool mask (True = keep) of the largest |W|.

    Args:
        weight: (..., d) with the input dimension last.
        pattern: `"unstructured"` or `"n:m"` (n kept of m).
        sparsity: share removed over the whole tensor; exactly round(sparsity * numel) entries go.
        removed: exact number of entries to remove instead of `sparsity`, as an allocation gives it; unstructured only.
        inside: bool, an older mask of the shape of `weight`; what it removed stays removed.

    Returns:
        Mask of the shape of `weight`. Ties are removed lowest flat index first.

    Raises:
        ValueError: invalid pattern, sparsity or count, NaN/Inf in `weight`, or no such mask inside the older one.
    """
    check_weight(weight)
    return keep_scores(magnitude_scores(weight), pattern=pattern, sparsity=sparsity, removed=removed, inside=inside)
