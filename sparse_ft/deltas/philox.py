"""The counter-based generator Philox4x64-10 as a compiled loop that compares its bytes with a threshold as they come.

The words are those of `numpy.random.Philox`; a keep mask is made in one go, several times faster than through arrays of
random numbers. Compiled by Numba at first use and kept on disk.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

#: Elements per count of the generator: four 64-bit words, one byte per element.
PER_COUNT = 32
_COUNTS = 128  # counts whose bytes are compared together: they stay in the first-level cache

_ROUNDS = 10
_ONES, _HIGHS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)  # in every byte
_M0, _M1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_W0, _W1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_GAMMA, _MIX0, _MIX1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@intrinsic
def _high_product(typing_context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two unsigned 64-bit numbers: one instruction, which Python cannot name."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        factors = [builder.zext(argument, wide) for argument in arguments]
        high = builder.lshr(builder.mul(*factors), ir.Constant(wide, 64))
        return builder.trunc(high, ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@njit(nogil=True, cache=True, inline="always")
def _splitmix64(seed: np.uint64, position: np.uint64) -> np.uint64:
    """Output number `position` (from 0) of the SplitMix64 generator."""
    z = seed + (position + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX0
    z = (z ^ (z >> np.uint64(27))) * _MIX1
    return z ^ (z >> np.uint64(31))


@njit(nogil=True, cache=True, inline="always")
def _round(key0: np.uint64, key1: np.uint64, a: np.uint64, b: np.uint64, c: np.uint64, d: np.uint64) -> Any:
    return _high_product(_M1, c) ^ b ^ key0, _M1 * c, _high_product(_M0, a) ^ d ^ key1, _M0 * a


@njit(nogil=True, cache=True)
def _fill(words: np.ndarray, key0: np.uint64, key1: np.uint64, count: np.uint64) -> None:
    """Four words of each count from `count` on. As in NumPy, the first output belongs to the count after the start.

    Two counts are worked on at a time: the products of one hide the latency of the other's.
    """
    zero = np.uint64(0)
    for i in range(words.shape[0]):
        a, b, c, d = count + np.uint64(2 * i + 1), zero, zero, zero
        e, f, g, h = count + np.uint64(2 * i + 2), zero, zero, zero
        k0, k1 = key0, key1
        for _ in range(_ROUNDS):
            a, b, c, d = _round(k0, k1, a, b, c, d)
            e, f, g, h = _round(k0, k1, e, f, g, h)
            k0 += _W0
            k1 += _W1
        pair = words[i]
        pair[0], pair[1], pair[2], pair[3] = a, b, c, d
        pair[4], pair[5], pair[6], pair[7] = e, f, g, h


@njit(nogil=True, cache=True)
def _compare(
    words: np.ndarray, kept: np.ndarray, whole: np.uint8, fraction: np.uint64, key: np.uint64, position: np.uint64
) -> None:
    """Bytes below `whole` are kept. One in 256 is equal: they are looked for eight at a time, so few branches fail."""
    random = words.view(np.uint8)
    for i in range(kept.size):
        kept[i] = random[i] < whole
    pattern = np.uint64(whole) * _ONES
    for word in range(words.size):
        difference = words[word] ^ pattern
        if (difference - _ONES) & ~difference & _HIGHS:  # some byte is zero
            for i in range(8 * word, 8 * word + 8):
                if random[i] == whole:
                    kept[i] = _splitmix64(key, position + np.uint64(i)) < fraction


@njit(nogil=True, cache=True)
def keep_bytes(
    key0: np.uint64, key1: np.uint64, start: int, whole: np.uint8, fraction: np.uint64, keep: np.ndarray
) -> None:
    """Which of the elements from `start` on are kept.

    Args:
        key0: first word of the key.
        key1: second word; it also seeds the generator that decides where a byte equals the threshold.
        start: flat index of the first element.
        whole: bytes below it keep their element.
        fraction: a byte equal to `whole` keeps its element with this probability, in 2^-64.
        keep: (n,) uint8, the answer as 0 or 1.
    """
    words, kept = np.empty(4 * _COUNTS, np.uint64), np.empty(PER_COUNT * _COUNTS, np.uint8)
    count, skipped, done = start // PER_COUNT, start % PER_COUNT, 0
    while done < keep.size:
        _fill(words.reshape(-1, 8), key0, key1, np.uint64(count))
        _compare(words, kept, whole, fraction, key1, np.uint64(count * PER_COUNT))
        usable = min(kept.size - skipped, keep.size - done)
        keep[done : done + usable] = kept[skipped : skipped + usable]
        count, skipped, done = count + _COUNTS, 0, done + usable
