"""Wanda on a delta: keep the entries whose product with the input's norm is largest, row by row, unscaled.

    score_ij = |delta_ij| * ||X_j||_2        kept = the round(density * d) largest of each output row

X are the inputs of the layer in the fine-tuned model over calibration tokens. Norms of several processes are joined as
sums of squares, `InputMoments` of `darex_moments.py` does it.

Example:
    >>> pruned = wanda_delta(delta, moments["model.layers.0.mlp.up_proj.weight"].norms(), density=0.1)

Limits: tensors without inputs (norms, biases, embeddings) have no such score: use `magnitude_delta` or keep them dense.
Few inputs at a low density round to no entry of a row; a warning says so.

Source: Sun et al. 2023, arXiv 2306.11695, equation 1; applied to deltas by Deng et al. 2024, arXiv 2410.09344.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparse_ft.deltas.checks import check_delta, number_kept
from sparse_ft.deltas.random_mask import check_density
from sparse_ft.masks import keep_largest_per_row


@torch.no_grad()
def wanda_keep(delta: Tensor, input_norms: Tensor, *, density: float) -> Tensor:
    """Bool mask (True = keep) of the largest |delta| * norm of every row.

    Args:
        delta: (out, in), or (E, out, in) for stacked experts. Give GPT-2's Conv1D weight transposed.
        input_norms: (in,), or (E, 1, in): 2-norm of each input feature over tokens; a common factor does not matter.
        density: share of every row kept, 0..1: exactly round(density * in) entries.

    Raises:
        ValueError: a density outside 0..1, sizes that do not fit, a vector, NaN, negative or all-zero norms, an integer
            tensor, or NaN or infinite entries.
    """
    density = check_density(density)
    check_delta(delta)
    if delta.ndim < 2 or input_norms.shape[-1:] != delta.shape[-1:]:
        raise ValueError(
            f"The delta has shape {tuple(delta.shape)} and the input norms {tuple(input_norms.shape)}; pass an "
            "(out, in) delta and one norm per input, and prune tensors without inputs by magnitude."
        )
    if not bool((input_norms >= 0).all()) or not bool(input_norms.isfinite().all()):
        raise ValueError("The input norms contain negative, NaN or infinite values; check the calibration inputs.")
    if not bool(input_norms.any()):
        raise ValueError("The input norms are all zero, no token reached this layer; prune it by magnitude.")
    keep = number_kept(delta.shape[-1], density)
    if density > 0 and keep == 0:
        warnings.warn(
            f"density {density:g} of {delta.shape[-1]} inputs rounds to no entry per row: the whole delta is dropped; "
            "rank by tensor with magnitude_delta, or use a higher density.",
            stacklevel=3,
        )
    scores = delta.detach().abs().float() * input_norms.to(delta.device).float()
    return keep_largest_per_row(scores, keep)


@torch.no_grad()
def wanda_delta(delta: Tensor, input_norms: Tensor, *, density: float) -> Tensor:
    """Keep the entries with the largest |delta| * norm of every row and set the others to zero; no rescale.

    Args:
        delta: finetuned - base, (out, in) or (E, out, in); unchanged.
        input_norms: (in,), or (E, 1, in): 2-norm of each input feature over calibration tokens.
        density: share of every row kept, 0..1.

    Returns:
        fp32 tensor of the shape of `delta`.

    Raises:
        ValueError: as `wanda_keep`.

    Example:
        >>> wanda_delta(torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 1.0]), density=0.5)
        tensor([[1., 0.]])

    Source: arXiv 2306.11695, equation 1, and 2410.09344, section 5.
    """
    return torch.where(wanda_keep(delta, input_norms, density=density), delta.float(), 0.0)
