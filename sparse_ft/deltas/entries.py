"""The kept entries of one live tensor: read them, add a delta to them, put them back; everything else stays untouched.

    flat[index] = base + values / scale        fp32, cast once

A bfloat16 tensor in the memory of this machine is worked on by compiled loops, which read each kept entry once and
write it once, in blocks that stay in the first-level cache. Everything else goes through torch, with the same bits.
The loops are compiled by Numba at first use, see `sparse_ft.compiling`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.compiling import compiled

_BLOCK = 1024  # entries worked on together
_ROUND = np.uint32(0x7FFF)
_INFINITE = np.uint32(0x7F80)
_SIXTEEN = np.uint32(16)
_ONE = np.uint32(1)


@torch.no_grad()
def add_kept(base: Tensor, values: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """base + values / scale, in fp32, cast once; where a value is zero the base's bits are kept.

    Args:
        base: (kept,), the base's values at the kept entries.
        values: (kept,), unscaled.
        scale: q.
        dtype: of the result.

    Raises:
        ValueError: if a result is not finite.
    """
    divisor = torch.tensor(scale, device=base.device)  # CUDA turns a division by a number into a product
    delta = values.to(base.device).float() / divisor
    result = torch.where(delta != 0, (base.float() + delta).to(dtype), base.to(dtype))
    if not bool(result.isfinite().all()):
        raise _not_finite(dtype, scale)
    return result


@torch.no_grad()
def add_entries(
    flat: Tensor,
    index: Tensor,
    values: Tensor,
    scale: float,
    *,
    leaving: tuple[Tensor, Tensor] | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """Add a delta to the kept entries of a tensor, in place.

    Args:
        flat: (n,), written to.
        index: (kept,), ascending positions, int32 or int64, on its device.
        values: (kept,), unscaled.
        scale: q.
        leaving: index and values of `put_entries`, to be put back in the same visit of the tensor, before the sum.
        room: (kept,) in the dtype of `flat`, to be used for what is returned: new memory costs as much as the sum.

    Returns:
        (kept,), what the entries were before.

    Raises:
        ValueError: if a result is not finite; the tensor is as before then, with what was leaving put back.

    Example:
        >>> old = add_entries(weight.view(-1), index, values, scale=0.01)
        >>> put_entries(weight.view(-1), index, old)      # the bits of before
    """
    if not has_loop(flat) or values.dtype != torch.bfloat16:
        if leaving is not None:
            put_entries(flat, *leaving)
        old = flat.index_select(0, index)
        flat.index_copy_(0, index.long(), add_kept(old, values, scale, flat.dtype))
        return old
    fits = room is not None and room.dtype == flat.dtype and room.shape == index.shape and room.device == flat.device
    old = room if room is not None and fits else torch.empty(len(index), dtype=flat.dtype)
    gone, back = (index[:0], old[:0]) if leaving is None else leaving
    finite = _add(
        _bits(flat), _unsigned(index), _bits(values), _bits(old), np.float32(scale), _unsigned(gone), _bits(back)
    )
    _note_write(flat)
    if not finite:
        put_entries(flat, index, old)
        raise _not_finite(flat.dtype, scale)
    return old


@torch.no_grad()
def put_entries(flat: Tensor, index: Tensor, values: Tensor) -> None:
    """flat[index] = values, in place; the arguments are those of `add_entries`, values in the dtype of `flat`."""
    if not has_loop(flat):
        flat.index_copy_(0, index.long(), values)
        return
    _put(_bits(flat), _unsigned(index), _bits(values))
    _note_write(flat)


def has_loop(flat: Tensor) -> bool:
    """Whether a compiled loop works on the tensor."""
    return type(flat) is Tensor and flat.dtype == torch.bfloat16 and flat.device.type == "cpu"


def _not_finite(dtype: torch.dtype, scale: float) -> ValueError:
    return ValueError(f"A weight becomes infinite or NaN in {dtype} with scale {scale:g}; use a larger scale.")


def _bits(tensor: Tensor) -> NDArray[np.uint16]:
    bits: NDArray[np.uint16] = tensor.view(torch.uint16).numpy()
    return bits


def _unsigned(index: Tensor) -> NDArray[np.unsignedinteger[Any]]:
    """The positions as numbers that a loop need not look at for a minus sign."""
    positions = index.numpy()
    return positions.view(np.uint32 if index.dtype == torch.int32 else np.uint64)


def _note_write(tensor: Tensor) -> None:
    """torch counts the writes to a tensor and does not see those of a loop."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


# error_model="numpy": a check for division by zero would keep the loops from using vector instructions.
@compiled(error_model="numpy")
def _add(
    flat: np.ndarray,
    index: np.ndarray,
    values: np.ndarray,
    old: np.ndarray,
    scale: np.float32,
    gone: np.ndarray,
    back: np.ndarray,
) -> bool:
    """Whether all results are finite."""
    base, delta = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    new = np.empty(_BLOCK, np.uint16)
    worst = _ONE & _SIXTEEN
    place = 0  # in `gone`
    for start in range(0, len(index), _BLOCK):
        stop = min(start + _BLOCK, len(index))
        here, before, count = index[start:stop], old[start:stop], stop - start
        last = here[count - 1]
        while place < len(gone) and gone[place] <= last:
            flat[gone[place]] = back[place]
            place += 1
        for i in range(count):  # many reads on their way at once
            before[i] = flat[here[i]]
        _sum(before, values[start:stop], scale, base[:count], delta[:count])
        worst |= _cast(base[:count].view(np.uint32), delta[:count], before, new[:count])
        for i in range(count):
            flat[here[i]] = new[i]
    for i in range(place, len(gone)):
        flat[gone[i]] = back[i]
    return bool(worst == 0)


@compiled(error_model="numpy")
def _sum(before: np.ndarray, values: np.ndarray, scale: np.float32, base: np.ndarray, delta: np.ndarray) -> None:
    """delta = values / scale and base = before + delta, from the bits of bfloat16."""
    base_bits, delta_bits = base.view(np.uint32), delta.view(np.uint32)
    for i in range(len(base)):
        base_bits[i] = np.uint32(before[i]) << _SIXTEEN
        delta_bits[i] = np.uint32(values[i]) << _SIXTEEN
    for i in range(len(base)):
        delta[i] = delta[i] / scale
        base[i] = base[i] + delta[i]


@compiled(error_model="numpy")
def _cast(bits: np.ndarray, delta: np.ndarray, before: np.ndarray, new: np.ndarray) -> np.uint32:
    """Round fp32 bits to bfloat16, to nearest, ties to even; not 0 if one is infinite or NaN."""
    worst = _ONE & _SIXTEEN
    for i in range(len(bits)):
        cut = bits[i] >> _SIXTEEN  # the rounding of a NaN can end anywhere, so it is looked for before
        rounded = (bits[i] + _ROUND + (cut & _ONE)) >> _SIXTEEN
        if delta[i] == 0:
            rounded = np.uint32(before[i])
        worst |= np.uint32((rounded & _INFINITE) == _INFINITE) | np.uint32((cut & _INFINITE) == _INFINITE)
        new[i] = np.uint16(rounded)
    return worst


@compiled()
def _put(flat: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
    for i in range(len(index)):
        flat[index[i]] = values[i]
