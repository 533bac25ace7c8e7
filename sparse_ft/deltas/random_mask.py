"""Random keep masks that are regenerated, never stored: each bit depends on (seed, role, tensor name, position) only.

The generator is written down bit by bit, so that a mask drawn today is the mask drawn by any later version, on any
machine, from any slice, shard or rank. Generator `splitmix-1`, for the element at flat index i and density d:

* The key is the first 16 bytes of sha256("<seed>\\0<role>\\0<name>"), read as two little-endian 64-bit words k0, k1.
* d > 1/32, *words*: bits 16 (i mod 4) to 16 (i mod 4) + 15 of output i // 4 of SplitMix64 seeded with k0 are compared
  with 65536 d. Below its whole part the element is kept, above it is dropped. On it (one element in 65536) output i
  of SplitMix64 seeded with k1 decides against the fraction, scaled to 64 bits. So d is met to 2^-80.
* d <= 1/32, *gaps*: elements are drawn in blocks of 2^20. Block b reads the 64-bit words of the Philox4x64-10 stream of
  key (k0, k1) from counter (0, 0, b, 1); each gives u = ((word >> 11) + 1) / 2^53 and skips floor(ln u / ln(1 - d))
  elements before the next kept one. Nothing is drawn for the weights that are dropped. Where u lies within rounding of
  the edge between two gaps, exact arithmetic decides, so no mathematics library can move a mask.

A Philox stream from a counter is meant as NumPy has it: its first four words are those of the counter plus one.

SplitMix64: Steele et al., OOPSLA 2014. Philox: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

Example:
    >>> random_keep(8, 0.5, seed=0, name="layers.0.q_proj.weight").sum() <= 8
    np.True_
"""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, localcontext

import numpy as np
from numpy.typing import NDArray

from sparse_ft.deltas.splitmix import keep_words

#: Name of the generator, written beside every mask that is to be regenerated.
GENERATOR = "splitmix-1"
#: Up to this density the positions of kept elements are drawn; above it, 16 bits per element.
GAPS_UP_TO = 1 / 32
#: Elements per independent run of gaps.
GAP_BLOCK = 1 << 20

_WORDS_PER_COUNT = 4  # 64-bit words for each count of the generator
_EDGE = 1e-9  # farther from a whole number than this, no rounding of a logarithm can matter


def check_density(density: float) -> float:
    """`density` as a float in [0, 1].

    Raises:
        ValueError: if it lies outside, or is no number.
    """
    if not 0.0 <= float(density) <= 1.0:
        raise ValueError(f"density is the share of entries kept and must lie in 0..1, got {density}.")
    return float(density)


def random_keep(
    numel: int, density: float, *, seed: int, name: str, role: str = "", start: int = 0,
    out: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:  # fmt: skip
    """Keep mask (True = keep) of the flat elements `start .. start + numel` of a tensor.

    Args:
        numel: number of elements wanted.
        density: probability that an element is kept, independently of all others.
        seed: any int.
        name: canonical name of the tensor; different names give independent masks.
        role: tells masks of one tensor apart, for instance the model the delta belongs to.
        start: flat index of the first element.
        out: (numel,) to write to; a new array without it.

    Raises:
        ValueError: a density outside 0..1.
    """
    density = check_density(density)
    keep = np.empty(numel, dtype=np.bool_) if out is None else out
    if density in (0.0, 1.0):
        keep[:] = density == 1.0
        return keep
    keys = _keys(seed, role, name)
    if density <= GAPS_UP_TO:
        keep[:] = False
        keep[_gap_positions(keys, density, start, start + numel) - start] = True
        return keep
    whole = int(density * 65536)
    fraction = int((density * 65536 - whole) * 2.0**64)
    key0, key1 = map(np.uint64, keys)
    keep_words(key0, key1, start, np.uint16(whole), np.uint64(fraction), keep.view(np.uint8))
    return keep


def random_positions(
    numel: int, density: float, *, seed: int, name: str, role: str = "", start: int = 0
) -> NDArray[np.int64]:
    """The kept positions of `random_keep` with the same arguments, ascending, counted from `start`.

    At a density of 1/32 or less the time and memory are those of the kept elements.
    """
    density = check_density(density)
    if 0.0 < density <= GAPS_UP_TO:
        return _gap_positions(_keys(seed, role, name), density, start, start + numel) - start
    return np.flatnonzero(random_keep(numel, density, seed=seed, name=name, role=role, start=start))


def random_uniform(numel: int, *, seed: int, name: str, role: str = "", start: int = 0) -> NDArray[np.float64]:
    """Numbers from [0, 1) of the flat elements `start .. start + numel` of a tensor, for probabilities that differ.

    The arguments are those of `random_keep`.
    """
    count = start // _WORDS_PER_COUNT
    skipped = start - count * _WORDS_PER_COUNT
    words = _philox(_keys(seed, role, name), (count, 0, 0, 2)).random_raw(skipped + numel)[skipped:]
    return np.asarray((words >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def _keys(seed: int, role: str, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}\0{role}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def _philox(keys: tuple[int, int], counter: tuple[int, int, int, int]) -> np.random.Philox:
    key, count = (np.array(words, dtype=np.uint64) for words in (keys, counter))
    return np.random.Philox(key=key, counter=count)


def _gap_positions(keys: tuple[int, int], density: float, start: int, stop: int) -> NDArray[np.int64]:
    """Flat positions kept in `start .. stop`, ascending."""
    pieces = [np.empty(0, dtype=np.int64)]
    for block in range(start // GAP_BLOCK, -(-stop // GAP_BLOCK)):
        inside = _block_positions(keys, density, block) + block * GAP_BLOCK
        low, high = np.searchsorted(inside, (start, stop))
        pieces.append(inside[low:high])
    return np.concatenate(pieces)


def _block_positions(keys: tuple[int, int], density: float, block: int) -> NDArray[np.int64]:
    """Positions kept in one block, counted from its beginning."""
    stream = _philox(keys, (0, 0, block, 1))
    expected = density * GAP_BLOCK
    pieces, last = [], -1
    while last < GAP_BLOCK:
        words = stream.random_raw(int(expected + 6 * math.sqrt(expected)) + 16)
        positions = np.cumsum(_gaps(words, density) + 1) + last
        pieces.append(positions)
        last = int(positions[-1])
    positions = np.concatenate(pieces)
    return positions[: np.searchsorted(positions, GAP_BLOCK)]


def _gaps(words: NDArray[np.uint64], density: float) -> NDArray[np.int64]:
    """Number of dropped elements before the next kept one, geometrically distributed; at most a block."""
    u = ((words >> np.uint64(11)) + np.uint64(1)).astype(np.float64) * 2.0**-53
    with np.errstate(over="ignore"):  # a density near the smallest float: infinitely many, cut to a block
        steps = np.minimum(np.log(u) / math.log1p(-density), float(GAP_BLOCK))
    gaps = np.floor(steps).astype(np.int64)
    nearest = np.rint(steps)
    for index in np.flatnonzero(np.abs(steps - nearest) < _EDGE * (1 + nearest)):
        gaps[index] = _exact_gap(float(u[index]), density, int(nearest[index]))
    return gaps


def _exact_gap(u: float, density: float, nearest: int) -> int:
    """The gap when ln u / ln(1 - density) lies at a whole number: `nearest` or one less."""
    with localcontext() as context:
        context.prec = 80
        survives = Decimal(u) <= (1 - Decimal(density)) ** nearest
    return min(nearest if survives else nearest - 1, GAP_BLOCK)
