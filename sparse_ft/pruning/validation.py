"""Checks that pruning makes before it starts: pattern, sparsity, options, and finite weights and statistics.

Example:
    >>> pattern, sparsity = resolve_pattern("2:4")
    >>> str(pattern), sparsity
    ('2:4', 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sparse_ft.masks import Pattern, check_sparsity

#: H + 1000 mean(diag H) I has condition number < 1 + d/1000: if factorising this fails, H is no Hessian.
MAX_DAMPING = 1e3


def resolve_pattern(pattern: str | Pattern, sparsity: float | None = None) -> tuple[Pattern, float]:
    """Parse `pattern` (n:m: n KEPT of m) and settle the share of weights it removes.

    Args:
        pattern: `"unstructured"` or `"n:m"`.
        sparsity: share removed, in [0, 1). Required when unstructured; with n:m left out or equal to 1 - n/m.

    Raises:
        ValueError: unknown pattern, missing or invalid sparsity, or a sparsity that contradicts n:m.
    """
    parsed = Pattern.parse(pattern)
    return parsed, check_sparsity(parsed, sparsity)


def share_of_row(width: int, sparsity: float) -> int:
    """floor(width * sparsity), how many of a row's weights a method that counts by row removes."""
    # 0.29 * 100 is 28.999999999999996 in binary; the digits below 1e-6 are noise, not a fraction to cut off.
    return math.floor(round(width * sparsity, 6))


def check_block_size(block_size: int) -> None:
    """Check SparseGPT's number of columns per slab.

    Raises:
        ValueError: if it is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size} but must be at least 1; 128 is the usual value.")


def check_damping(damping: float) -> None:
    """Check SparseGPT's relative damping.

    Raises:
        ValueError: if it is not a number in [0, `MAX_DAMPING`].
    """
    if not isinstance(damping, (int, float)) or not 0 <= damping <= MAX_DAMPING:
        raise ValueError(f"damping is {damping!r} but must lie in [0, {MAX_DAMPING:g}]; 0.01 is the usual value.")


def check_weight(weight: Tensor, name: str = "weight") -> None:
    """Check that `weight` is a non-empty floating-point tensor without NaN or infinite entries.

    Raises:
        ValueError: naming `name` and what is wrong with it.
    """
    if not weight.is_floating_point():
        raise ValueError(f"'{name}' has dtype {weight.dtype} but pruning needs floating point; dequantise it first.")
    if weight.numel() == 0:
        raise ValueError(f"'{name}' has shape {tuple(weight.shape)} and holds no weights; exclude it from pruning.")
    if not is_finite(weight):
        raise ValueError(f"'{name}' contains NaN or infinite weights; repair the checkpoint before pruning.")


def check_matrix(weight: Tensor, statistic: Tensor, label: str) -> None:
    """Check that `weight` is a finite (o, d) matrix and that a finite `statistic` (d,) or (d, d) of its inputs fits.

    Args:
        weight: the matrix to prune.
        statistic: what calibration collected about its d inputs.
        label: name of the statistic in the message.

    Raises:
        ValueError: naming what is wrong, with the two sizes where sizes differ.
    """
    size = statistic.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != size:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but the {label} was collected for {size} inputs; "
            "pass the (out, in) matrix view of the layer that received those inputs."
        )
    check_weight(weight)
    check_statistic(statistic, label)


def check_statistic(statistic: Tensor, label: str) -> None:
    """Check that a second moment (d,) or Hessian (d, d) is finite and that some input was ever non-zero.

    Raises:
        ValueError: naming `label`.
    """
    if not is_finite(statistic):
        raise ValueError(f"The {label} contains NaN or Inf; check the calibration inputs and the model's dtype.")
    if not bool(statistic.any()):
        raise ValueError(
            f"The {label} is all zero, no calibration token reached this layer; "
            "calibrate on more tokens or prune the layer by magnitude."
        )


def check_all_finite(tensors: Iterable[tuple[str, Tensor]], source: str | Path) -> None:
    """Check that the tensors of a checkpoint are finite; integers, 8-bit floats and empty ones are not looked at.

    Args:
        tensors: (name, tensor), asked for one at a time.
        source: the checkpoint, for the message.

    Raises:
        ValueError: naming the first tensor that is not.
    """
    for name, tensor in tensors:
        comparable = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
        if comparable and not is_finite(tensor):
            raise ValueError(f"'{name}' in '{source}' contains NaN or infinite weights; repair the checkpoint.")


def is_finite(tensor: Tensor) -> bool:
    """True if no entry is NaN or infinite, in one pass without a temporary of the tensor's size."""
    low, high = torch.aminmax(tensor.detach())  # NaN propagates to both
    return bool(torch.isfinite(low) & torch.isfinite(high))
