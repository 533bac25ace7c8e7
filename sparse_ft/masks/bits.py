"""Masking at the speed of memory: AND the bits of a float with 0 (pruned) or all ones (kept).

One byte per weight whatever the float's width, since -1 as int8 is extended to all ones; unlike a product it clears Inf
and NaN and never leaves a -0. Where even a byte is too much a mask stays packed, one bit per weight, and is turned into
bytes each time it is used: a look-up that takes a fraction of the masking itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparse_ft.masks.packing import check_packed

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_bits(mask: Tensor) -> Tensor:
    """Turn a bool mask (True = keep) into int8 of the same shape: -1 where kept, 0 where pruned.

    An int8 mask is returned as it is, and so is a packed one (uint8, see `pack_bits`).

    Raises:
        ValueError: if the mask is none of these.
    """
    if mask.dtype in (torch.int8, torch.uint8):
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask must be torch.bool, got {mask.dtype}; convert it with `mask != 0`.")
    return mask.to(torch.int8).neg_()


@torch.no_grad()
def mask_(values: Tensor, keep: Tensor) -> Tensor:
    """Set pruned values to +0 in place and return them; kept values do not change in a single bit.

    Args:
        values: floating point of any width, any shape; a parameter is changed without autograd's notice.
        keep: `keep_bits` of the same shape, or packed.

    Example:
        >>> mask_(torch.tensor([1.0, -2.0]), keep_bits(torch.tensor([True, False])))
        tensor([1., 0.])
    """
    keep = unpack_keep_bits(keep, values.shape) if keep.dtype == torch.uint8 else keep
    values.detach().view(_INTEGER_OF_SIZE[values.element_size()]).bitwise_and_(keep)
    return values


def unpack_keep_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """`keep_bits` of a packed mask, (ceil(numel / 8),) uint8, in its shape.

    Raises:
        ValueError: as `unpack_bits`; a uint8 mask with a byte per weight is no packed one.
    """
    numel = check_packed(packed, shape)
    eight = torch.index_select(_eight_bytes(packed.device), 0, packed.int()).view(torch.int8)
    return eight[:numel].view(torch.Size(shape))


@lru_cache
def _eight_bytes(device: torch.device) -> Tensor:
    """For each byte of a packed mask the `keep_bits` of its eight weights, side by side in one int64."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.to(torch.int8).neg_().view(torch.int64).view(-1).to(device)
