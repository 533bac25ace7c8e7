"""One bit per weight: bit i of byte j is element 8j + i of the flattened mask (least significant bit first)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape into uint8 `(ceil(numel / 8),)`; unused high bits of the last byte are 0.

    Raises:
        ValueError: if the mask is not bool (`~` on integer masks is bitwise, so they are never accepted).
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"A mask must be torch.bool, got {mask.dtype}; convert it with `mask != 0`.")
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    packed = bits[:, 0].clone()
    for i in range(1, 8):
        packed |= bits[:, i] << i
    return packed


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack_bits`: uint8 `(ceil(numel / 8),)` back to a bool mask of `shape`.

    Raises:
        ValueError: if the number of bytes does not fit the shape, or padding bits are set.
    """
    numel = check_packed(packed, shape)
    values = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] & values).ne_(0).view(-1)
    return bits[:numel].to(torch.bool).view(torch.Size(shape))


def count_bits(packed: Tensor, shape: Sequence[int]) -> int:
    """Number of kept weights of a packed mask, without unpacking it.

    Raises:
        ValueError: as `unpack_bits`.
    """
    check_packed(packed, shape)
    how_often = torch.bincount(packed, minlength=256).tolist()
    return sum(count * byte.bit_count() for byte, count in enumerate(how_often))


def check_packed(packed: Tensor, shape: Sequence[int]) -> int:
    """The number of weights, if the bytes are as many as it needs and the bits after the last weight are 0."""
    numel = int(torch.Size(shape).numel())
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(
            f"A packed mask of shape {tuple(shape)} needs {(numel + 7) // 8} bytes of uint8, "
            f"got {tuple(packed.shape)} of {packed.dtype}."
        )
    if numel % 8 and int(packed[-1]) >> numel % 8:
        raise ValueError(f"A packed mask of shape {tuple(shape)} has bits set after its last element; it is damaged.")
    return numel
