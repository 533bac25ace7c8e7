"""A packed mask taken piece by piece: whole n:m groups at a time, so that no tensor's mask is ever unpacked whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_ft.masks.packing import pack_bits, unpack_bits
from sparse_ft.masks.pattern import Pattern

#: Elements of a piece: about a megabyte of work, and whole bytes of a packed mask.
PIECE = 1 << 18


def ranges(numel: int) -> Iterator[tuple[int, int]]:
    """Pieces `start .. stop` of a flat tensor that begin at a whole byte of its packed mask."""
    for start in range(0, numel, PIECE):
        yield start, min(start + PIECE, numel)


def group_blocks(shape: Sequence[int], axis: int, m: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Consecutive pieces of a flat tensor that cut no group of m inputs.

    Args:
        shape: of the tensor.
        axis: of the inputs.
        m: size of a group; the last `shape[axis] % m` inputs form none and stay with the last whole one or alone.

    Yields:
        Flat index of a piece's first element, and its shape as (rows, inputs, elements behind the inputs).
    """
    width, inner = shape[axis], math.prod(shape[axis + 1 :])
    outer = math.prod(shape[:axis])
    if not outer * width * inner:
        return
    if inner == 1 and width <= PIECE:
        rows = PIECE // width
        for first in range(0, outer, rows):
            yield first * width, (min(rows, outer - first), width, 1)
        return
    step = max(PIECE // inner // m, 1) * m
    for row in range(outer):
        for first in range(0, width, step):
            yield (row * width + first) * inner, (1, min(step, width - first), inner)


def unpack_range(packed: Tensor, start: int, stop: int) -> Tensor:
    """The bits `start .. stop` of a packed mask as bool (stop - start,)."""
    first, last = start // 8, -(-stop // 8)
    return unpack_bits(packed[first:last], ((last - first) * 8,))[start - first * 8 : stop - first * 8]


def violations(packed: Tensor, shape: Sequence[int], axis: int, pattern: Pattern) -> int:
    """`Pattern.violations` of a packed mask.

    Args:
        packed: (ceil(numel / 8),) uint8.
        shape: of the mask.
        axis: of the inputs.
        pattern: n:m; an unstructured one is never broken.
    """
    if pattern.m is None:
        return 0
    return sum(
        pattern.violations(unpack_range(packed, start, start + math.prod(block)).view(block).transpose(1, 2))
        for start, block in group_blocks(shape, axis, pattern.m)
    )


class BitWriter:
    """Packs a mask that arrives in pieces of any length, in order."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._rest = torch.zeros(0, dtype=torch.bool)

    def add(self, keep: Tensor) -> None:
        """The next bits, bool (n,)."""
        bits = torch.cat([self._rest, keep]) if self._rest.numel() else keep
        whole = bits.numel() // 8 * 8
        self._pieces.append(pack_bits(bits[:whole]))
        self._rest = bits[whole:].clone()

    def packed(self) -> Tensor:
        """All of them, as `pack_bits` of the whole mask would be."""
        return torch.cat([*self._pieces, pack_bits(self._rest)])
