"""Two ways to write down which entries of a tensor are kept: one bit per entry, or the gaps between kept entries.

A gap is the number of dropped entries before a kept one, written with 7 bits to the byte, lowest first, the high bit
set in all bytes but its last (LEB128). At a density of 0.01 a gap takes one or two bytes, 1.3 on average. Where more
than about one entry in eight is kept, bits are smaller.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.masks import pack_bits, unpack_bits

Encoding = Literal["bits", "gaps"]


def encode_positions(positions: NDArray[np.int64], numel: int) -> tuple[Encoding, Tensor]:
    """The smaller of the two encodings; bits where they are equal.

    Args:
        positions: flat indices of the kept entries, ascending.
        numel: of the tensor.

    Returns:
        Name of the encoding and its bytes, uint8.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    if _gap_bytes(gaps) < math.ceil(numel / 8):
        return "gaps", torch.from_numpy(_encode_gaps(gaps))
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.from_numpy(positions)] = True
    return "bits", pack_bits(mask)


def decode_positions(encoding: Encoding, data: Tensor, numel: int) -> NDArray[np.int64]:
    """Undo `encode_positions`.

    Raises:
        ValueError: if the bytes are not those of a tensor of `numel` entries.
    """
    if encoding == "bits":
        return unpack_bits(data, (numel,)).numpy().nonzero()[0]
    positions = np.cumsum(_decode_gaps(data.numpy()) + 1) - 1
    if len(positions) and not 0 <= positions[-1] < numel:
        raise ValueError(f"Gaps lead to entry {positions[-1]} of a tensor with {numel}; the file is damaged.")
    return positions


def _gap_bytes(gaps: NDArray[np.int64]) -> int:
    return len(gaps) + sum(int(np.count_nonzero(gaps >= 1 << 7 * i)) for i in range(1, 9))


def _encode_gaps(gaps: NDArray[np.int64]) -> NDArray[np.uint8]:
    lengths = np.ones(len(gaps), dtype=np.int64)
    for i in range(1, 9):
        lengths += gaps >= 1 << 7 * i
    ends = np.cumsum(lengths)
    result = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for i in range(int(lengths.max(initial=0))):
        here = np.flatnonzero(lengths > i)
        more = np.where(lengths[here] > i + 1, 0x80, 0)
        result[ends[here] - lengths[here] + i] = (gaps[here] >> 7 * i & 0x7F) | more
    return result


def _decode_gaps(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    last = np.flatnonzero(data < 0x80)
    if not len(data):
        return np.empty(0, dtype=np.int64)
    lengths = np.diff(last, prepend=-1)
    if not len(last) or last[-1] != len(data) - 1 or lengths.max() > 8:
        raise ValueError("The gaps between kept entries do not end as they should; the file is damaged.")
    gaps = np.zeros(len(last), dtype=np.int64)
    for i in range(int(lengths.max())):
        here = np.flatnonzero(lengths > i)
        gaps[here] |= (data[last[here] - lengths[here] + 1 + i] & 0x7F).astype(np.int64) << 7 * i
    return gaps
