"""Random keep bits as a compiled loop over SplitMix64, the counter-based generator whose outputs are drawn in vectors.

Four elements share a 64-bit output, 16 bits each. Compiled by Numba at first use, see `sparse_ft.compiling`.

Source: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np

from sparse_ft.compiling import compiled

#: Elements per 64-bit output.
PER_WORD = 4
_BLOCK = 2048  # elements whose bits stay in the first-level cache
_GAMMA, _MIX0, _MIX1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)


@compiled(inline="always")
def _output(seed: np.uint64, position: np.uint64) -> np.uint64:
    """Output number `position` (from 0)."""
    z = seed + (position + _ONE) * _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _MIX0
    z = (z ^ (z >> np.uint64(27))) * _MIX1
    return z ^ (z >> np.uint64(31))


@compiled()
def _fill(words: np.ndarray, seed: np.uint64, first: np.uint64) -> None:
    """Outputs number `first` and following."""
    for i in range(words.size):
        words[i] = _output(seed, first + np.uint64(i))


@compiled()
def _compare(pieces: np.ndarray, keep: np.ndarray, whole: np.uint16) -> bool:
    """Keep what is below `whole`; whether anything is equal to it."""
    equal = False
    for i in range(pieces.size):
        keep[i] = pieces[i] < whole
        equal |= pieces[i] == whole
    return equal


@compiled()
def _decide(
    pieces: np.ndarray, keep: np.ndarray, whole: np.uint16, fraction: np.uint64, seed: np.uint64, start: int
) -> None:
    """Settle the pieces that are equal to `whole`, one in 65536, by a generator of their own."""
    for i in range(pieces.size):
        if pieces[i] == whole:
            keep[i] = _output(seed, np.uint64(start + i)) < fraction


@compiled()
def keep_words(
    key0: np.uint64, key1: np.uint64, start: int, whole: np.uint16, fraction: np.uint64, keep: np.ndarray
) -> None:
    """Which of the elements from `start` on are kept.

    Args:
        key0: seed of the stream whose 16-bit pieces, lowest first, belong to the elements.
        key1: seed of a second stream, with one output per element, that decides where a piece equals the threshold.
        start: flat index of the first element.
        whole: pieces below it keep their element.
        fraction: a piece equal to `whole` keeps its element if the second stream's output is below this.
        keep: (n,) uint8, the answer as 0 or 1.
    """
    words = np.empty(_BLOCK // PER_WORD, np.uint64)
    pieces = words.view(np.uint16)
    position, done = start - start % PER_WORD, 0
    while done < keep.size:
        _fill(words, key0, np.uint64(position // PER_WORD))
        skipped = start + done - position
        usable = min(_BLOCK - skipped, keep.size - done)
        mine, target = pieces[skipped : skipped + usable], keep[done : done + usable]
        if _compare(mine, target, whole):
            _decide(mine, target, whole, fraction, key1, position + skipped)
        position, done = position + _BLOCK, done + usable
