"""Checks that every pruning of a delta makes before it starts: dtype, finite entries, scale, and the number kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_delta(delta: Tensor, name: str | None = None) -> float:
    """Check that a delta is floating point and finite.

    Args:
        delta: any shape, also empty.
        name: of the tensor, for the message.

    Returns:
        The largest absolute entry, 0 for an empty tensor.

    Raises:
        ValueError: another dtype, or NaN or infinite entries.
    """
    label = "The delta" if not name else f"The delta of '{name}'"
    if not delta.is_floating_point():
        raise ValueError(f"{label} has dtype {delta.dtype}; only floating point is pruned, copy other tensors whole.")
    if not delta.numel():
        return 0.0
    low, high = torch.aminmax(delta.detach())  # NaN propagates to both
    largest = max(-float(low), float(high))
    if not math.isfinite(float(low)) or not math.isfinite(float(high)):
        raise ValueError(f"{label} contains NaN or infinite entries; repair the base or the fine-tuned checkpoint.")
    return largest


def check_scale(scale: float, largest: float = 0.0) -> float:
    """`scale` as a float, checked to be a divisor of fp32 numbers up to `largest`.

    Raises:
        ValueError: a scale that is not positive and finite, or so small that delta / scale leaves fp32's range.
    """
    scale = float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale is {scale} but a delta is divided by it; it must be positive and finite.")
    if largest / scale > torch.finfo(torch.float32).max or scale < torch.finfo(torch.float32).tiny:
        raise ValueError(
            f"scale is {scale:g}: entries up to {largest:g} divided by it overflow fp32; use a larger one."
        )
    return scale


def check_keep(keep: Tensor, delta: Tensor) -> Tensor:
    """The mask on the device of `delta`.

    Raises:
        ValueError: if it is not bool or has another shape.
    """
    if keep.dtype != torch.bool or keep.shape != delta.shape:
        raise ValueError(
            f"keep is {keep.dtype} {tuple(keep.shape)} but the delta has shape {tuple(delta.shape)}; "
            "pass a torch.bool mask of that shape, True = keep."
        )
    return keep.to(delta.device)


def number_kept(numel: int, density: float) -> int:
    """round(density * numel), how many entries of a group a ranked method keeps."""
    return round(density * numel)
