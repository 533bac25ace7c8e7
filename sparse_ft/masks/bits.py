"""Masking at the speed of memory: AND the bits of a float with 0 (pruned) or all ones (kept).

One byte per weight whatever the float's width, since -1 as int8 is extended to all ones; unlike a product it clears Inf
and NaN and never leaves a -0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_bits(mask: Tensor) -> Tensor:
    """Turn a bool mask (True = keep) into int8 of the same shape: -1 where kept, 0 where pruned.

    An int8 mask is returned as it is.

    Raises:
        ValueError: if the mask is neither bool nor int8.
    """
    if mask.dtype == torch.int8:
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask must be torch.bool, got {mask.dtype}; convert it with `mask != 0`.")
    return mask.to(torch.int8).neg_()


@torch.no_grad()
def mask_(values: Tensor, keep: Tensor) -> Tensor:
    """Set pruned values to +0 in place and return them; kept values do not change in a single bit.

    Args:
        values: floating point of any width, any shape; a parameter is changed without autograd's notice.
        keep: `keep_bits` of the same shape.

    Example:
        >>> mask_(torch.tensor([1.0, -2.0]), keep_bits(torch.tensor([True, False])))
        tensor([1., 0.])
    """
    values.detach().view(_INTEGER_OF_SIZE[values.element_size()]).bitwise_and_(keep)
    return values
