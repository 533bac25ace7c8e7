"""A dense weight out of a sparse one: kept values stay where they are, pruned ones are held apart and put between them.

    D[i] = W[i]  where the mask keeps i,   D[i] = v[zeros of the mask before i]  elsewhere.

On a CPU this is one compiled pass of about half a nanosecond per weight; elsewhere it is torch's `masked_scatter`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_ft.compiling import compiled
from sparse_ft.masks.bits import unpack_keep_bits
from sparse_ft.masks.blocks import PIECE, ranges

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def restore(weight: Tensor, packed: Tensor, values: Tensor, starts: Tensor) -> Tensor:
    """The dense weight: `weight` where the mask keeps, the next of `values` elsewhere.

    Args:
        weight: any shape, contiguous; its pruned values are not looked at.
        packed: `pack_bits` of its mask, in which something is pruned.
        values: (number of pruned weights,), in the order of the mask's zeros.
        starts: `first_zeros` of the mask.

    Returns:
        A new tensor.
    """
    if weight.device.type != "cpu":
        return restore_anywhere(weight, packed, values)
    dense = torch.empty_like(weight)
    integer = _INTEGER_OF_SIZE[weight.element_size()]
    out, kept, pruned = (tensor.view(-1).view(integer).numpy() for tensor in (dense, weight, values))
    bits, offsets = packed.numpy(), _offsets()

    def fill(piece: tuple[tuple[int, int], int]) -> None:
        (start, stop), zeros = piece
        _fill(out[start:stop], kept[start:stop], bits[start // 8 :], pruned, zeros, offsets)

    pieces = list(zip(ranges(out.size), starts.tolist(), strict=True))
    threads = min(torch.get_num_threads(), len(pieces) // 2)
    if threads < 2:
        for piece in pieces:
            fill(piece)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, pieces))
    return dense


def restore_anywhere(weight: Tensor, packed: Tensor, values: Tensor) -> Tensor:
    """`restore` by torch's own operations, on any device."""
    return weight.masked_scatter(unpack_keep_bits(packed, weight.shape) == 0, values)


def first_zeros(packed: Tensor, numel: int) -> Tensor:
    """How many zeros of a packed mask come before each piece of `masks.blocks.ranges`, int64."""
    counts = torch.tensor([8 - byte.bit_count() for byte in range(256)], device=packed.device)
    pieces = [int(counts[part.int()].sum()) for part in packed.split(PIECE // 8)]
    return torch.tensor([0, *pieces[:-1]], device=packed.device).cumsum(0)


@compiled()
def _fill(
    out: np.ndarray, kept: np.ndarray, bits: np.ndarray, values: np.ndarray, zeros: int, offsets: np.ndarray
) -> None:
    """Write a piece (n,) of a weight as integers, eight at a time and without branches; n / 8 bytes of bits.

    Indices are unsigned, since one that may be negative costs a comparison.
    """
    at, last, eight = np.uint64(zeros), np.uint64(values.size - 1), np.uint64(8)
    for byte in range(np.uint64(out.size // 8)):
        first, pattern = eight * byte, np.uint64(bits[byte])
        here = min(at, last)  # past the last zero everything is kept, but something is read all the same
        for i in range(eight):
            keep = -(np.int64(pattern >> i) & 1)
            value = values[here + np.uint64(offsets[eight * pattern + i])]
            out[first + i] = value ^ ((value ^ kept[first + i]) & keep)
        at += np.uint64(offsets[np.uint64(2048) + pattern])
    for j in range(out.size // 8 * 8, out.size):
        if bits[j // 8] >> (j % 8) & 1:
            out[j] = kept[j]
        else:
            out[j] = values[at]
            at += np.uint64(1)


@lru_cache
def _offsets() -> np.ndarray:
    """For each byte of a mask which of the next values goes to each of its eight places; then its numbers of zeros."""
    zeros = 1 - (np.arange(256)[:, None] >> np.arange(8) & 1)
    # a place that is kept reads a value that is there, the one before
    which = np.maximum(zeros.cumsum(axis=1) - 1, 0)
    return np.concatenate([which.reshape(-1), zeros.sum(axis=1)]).astype(np.uint8)


class PrunedValues(nn.Module):
    """A parametrisation: the weight it is given, the student's, with the original's values where it is pruned.

    A stack of experts is read once for each expert by some forward passes: it is held until the pass has ended.

    Args:
        packed: bits of the mask, shared with the `MaskSet`.
        values: (number of pruned weights,), in the order of the mask's zeros.
        numel: of the weight.
    """

    packed: Tensor
    values: Tensor
    starts: Tensor

    def __init__(self, packed: Tensor, values: Tensor, numel: int) -> None:
        super().__init__()
        self.bits_of_set = packed  # stays where it is when the teacher is moved
        self.register_buffer("packed", packed.to(values.device), persistent=False)
        self.register_buffer("values", values)
        self.register_buffer("starts", first_zeros(self.packed, numel), persistent=False)
        self.holding = False
        self._held: Tensor | None = None

    @torch.no_grad()
    def forward(self, weight: Tensor) -> Tensor:
        """The dense weight, a new tensor unless it is held."""
        dense = restore(weight, self.packed, self.values, self.starts) if self._held is None else self._held
        if self.holding:
            self._held = dense
        return dense

    def hold(self, holding: bool) -> None:
        """Keep the weight once it has been rebuilt, or let go of it."""
        self.holding, self._held = holding, None


def add_pruned_values(module: nn.Module, attribute: str, weight: Tensor, packed: Tensor, values: Tensor) -> None:
    """Make a module's weight one that is rebuilt whenever it is read.

    Args:
        module: has a parameter of that name and of the weight's shape; it is let go of.
        attribute: name of the parameter.
        weight: contiguous, shared; its pruned values are not looked at.
        packed: bits of its mask, shared where they are on the weight's device.
        values: as in `restore`.
    """
    first = not parametrize.is_parametrized(module)
    empty = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    setattr(module, attribute, empty)  # registering sets a tensor anew, which a shared one should not see
    parametrize.register_parametrization(module, attribute, PrunedValues(packed, values, weight.numel()), unsafe=True)
    parts: Any = module.parametrizations
    parts[attribute].original = nn.Parameter(weight.detach(), requires_grad=False)
    if first and weight.ndim == 3:
        module.register_forward_pre_hook(partial(_hold, holding=True))
        module.register_forward_hook(partial(_hold, holding=False), always_call=True)


def _hold(module: Any, inputs: Any, output: Any = None, *, holding: bool) -> None:
    for parts in module.parametrizations.values():
        parts[0].hold(holding)
