"""The inner loops of a merge, compiled: from the bytes that were read to those to be written, each entry visited once.

A chunk is worked on in blocks that stay in the first-level cache, with the arithmetic of plain fp32 loops (nothing is
reordered or contracted), so no chunk boundary shows in a result. Tensors come and go as float32, or as the bits of
bfloat16 in uint16. Inner loops run over slices from zero: an index that may be negative for all the compiler knows
would keep it from using vectors. Compiled by Numba at first use and kept on disk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparse_ft.compiling import compiled
from sparse_ft.merging.bits import INFINITE, larger, narrow_like, plus, widen

_BLOCK = 2048
_LONG_BLOCK = 4096  # where fewer sums are kept
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled()
def subtract(values: np.ndarray, base: np.ndarray) -> bool:
    """values - base, in place; both (n,) fp32. Whether a difference is NaN or infinite."""
    worst = np.uint32(0)
    for i in range(values.size):
        difference = values[i] - base[i]
        worst = larger(worst, difference)
        values[i] = difference
    return bool(worst >= INFINITE)


@compiled()
def drop(values: np.ndarray, keep: np.ndarray) -> None:
    """Set the (n,) fp32 values to +0 where `keep` (n,) uint8 is 0, in place."""
    for i in range(values.size):
        values[i] = values[i] if keep[i] else _ZERO


@compiled()
def drop_small(values: np.ndarray, threshold: np.float32, before: int) -> None:
    """Set (n,) fp32 values to +0 that are smaller than a threshold, in place, and from `before` on also equal ones."""
    first, rest = values[:before], values[before:]
    for i in range(first.size):
        first[i] = first[i] if abs(first[i]) >= threshold else _ZERO
    for i in range(rest.size):
        rest[i] = rest[i] if abs(rest[i]) > threshold else _ZERO


@compiled()
def _flagged(flags: np.ndarray, places: np.ndarray) -> int:
    """Write the indices of flags (n,) uint8 that are 1 to `places` (n,), and count them; n is a multiple of 8.

    Few are, so eight at a time are passed over, and among eight no branch depends on them.
    """
    words, found = flags.view(np.uint64), 0
    for word in range(words.size):
        if words[word]:
            for i in range(8 * word, 8 * word + 8):
                places[found] = i
                found += flags[i]
    return found


@compiled()
def collect(
    base: np.ndarray, model: np.ndarray, low: np.float32, high: np.float32, found: np.ndarray
) -> tuple[int, int, int, int, bool]:
    """Count absolute values of a delta below a bracket and at its ends, and gather those between.

    The ends are counted apart because on the lattice of bf16 deltas they are what occurs most.

    Args:
        base: (n,) the base.
        model: (n,) the model, of the same dtype.
        low: lower end of the bracket.
        high: upper end; where it is the lower one, none count as being at it.
        found: (n,) fp32, receives the absolute values between, in order.

    Returns:
        How many lie below, at the lower end, at the upper end and between, and whether any is not finite.
    """
    flags, places = np.zeros(_BLOCK, np.uint8), np.empty(_BLOCK, np.int32)
    counts, inside, worst = np.zeros(3, np.int64), 0, np.uint32(0)
    for start in range(0, base.size, _BLOCK):
        old, new = base[start : start + _BLOCK], model[start : start + _BLOCK]
        worst = max(worst, _compare(new, old, low, high, flags, counts))
        flags[old.size :] = 0
        count = _flagged(flags, places)
        room = found[inside : inside + count]
        for i in range(count):
            room[i] = abs(widen(new[places[i]]) - widen(old[places[i]]))
        inside += count
    return counts[0], counts[1], counts[2] if high > low else 0, inside, bool(worst >= INFINITE)


@compiled()
def _compare(
    model: np.ndarray, old: np.ndarray, low: np.float32, high: np.float32, flags: np.ndarray, counts: np.ndarray
) -> np.uint32:
    """Flag what lies between and count what is below, at the lower and at the upper end.

    Returns:
        The bits of the largest absolute difference: from `INFINITE` on, not all are finite.
    """
    worst, below, at_low, at_high = np.uint32(0), np.uint32(0), np.uint32(0), np.uint32(0)
    for i in range(old.size):
        difference = widen(model[i]) - widen(old[i])
        worst = larger(worst, difference)
        size = abs(difference)
        below, at_low, at_high = plus(below, size < low), plus(at_low, size == low), plus(at_high, size == high)
        flags[i] = (size > low) & (size < high)
    counts[0] += below
    counts[1] += at_low
    counts[2] += at_high
    return worst


@compiled()
def sizes(base: np.ndarray, model: np.ndarray, out: np.ndarray) -> None:
    """out = |model - base|, all (n,), `out` fp32 and the others of one dtype."""
    for i in range(out.size):
        out[i] = abs(widen(model[i]) - widen(base[i]))


@compiled()
def place_of(base: np.ndarray, model: np.ndarray, value: np.float32, number: int) -> int:
    """Index of entry number `number` (from 1) of those whose |model - base| is `value`; n if there are fewer."""
    flags, places, seen = np.zeros(_BLOCK, np.uint8), np.empty(_BLOCK, np.int32), 0
    for start in range(0, base.size, _BLOCK):
        old, new = base[start : start + _BLOCK], model[start : start + _BLOCK]
        for i in range(old.size):
            flags[i] = abs(widen(new[i]) - widen(old[i])) == value
        flags[old.size :] = 0
        count = _flagged(flags, places)
        if seen + count >= number:
            return start + places[number - seen - 1]
        seen += count
    return base.size


class Deltas(NamedTuple):
    """A chunk of K models, and what is to be dropped from their differences to the base.

    Attributes:
        models: (K, n) in the base's dtype.
        ready: these are sparsified deltas already, and the rest does not count.
        keep: (K, n) uint8, which entries are kept.
        masked: (K,) bool, whether `keep` counts for a model.
        above: (K,) fp32, otherwise entries are dropped whose absolute value is not above this.
        early: (K,) fp32, what counts instead of `above` for the first entries.
        befores: (K,) int64, how many these are.
        strange: (K,) bool, set where an entry of a delta is not finite.
    """

    models: np.ndarray
    ready: bool
    keep: np.ndarray
    masked: np.ndarray
    above: np.ndarray
    early: np.ndarray
    befores: np.ndarray
    strange: np.ndarray


class Election(NamedTuple):
    """How signs are elected and what is merged; one entry per model.

    Attributes:
        votes: (K,) fp32, the factors of the deltas whose sum has the elected sign.
        apart: whether they are more than a positive number times `factors`.
        signs: (K,) fp32, 1, or -1 for deltas that are merged where the other sign is elected.
        factors: (K,) fp32, the factors of the deltas in the merged sum.
        weights: (K,) fp32, what a delta adds to the divisor.
        least: a divisor smaller than this counts as 1.
        normalize: whether there is a divisor.
    """

    votes: np.ndarray
    apart: bool
    signs: np.ndarray
    factors: np.ndarray
    weights: np.ndarray
    least: np.float32
    normalize: bool


@compiled()
def _load(source: np.ndarray, target: np.ndarray) -> None:
    """Convert a block to fp32."""
    for i in range(source.size):
        target[i] = widen(source[i])


@compiled()
def _add(
    model: np.ndarray, old: np.ndarray, keep: np.ndarray, above: np.float32, factor: np.float32, total: np.ndarray
) -> np.uint32:
    """total += factor * (model - old) where that is kept and its absolute value is above a threshold, in one block.

    Returns:
        The bits of the largest absolute difference: from `INFINITE` on, not all are finite.
    """
    worst = np.uint32(0)
    for i in range(model.size):
        difference = widen(model[i]) - old[i]
        worst = larger(worst, difference)
        kept = (keep[i] != 0) & (abs(difference) > above)
        total[i] += factor * (difference if kept else _ZERO)
    return worst


@compiled()
def _sort(
    model: np.ndarray, old: np.ndarray, keep: np.ndarray, above: np.float32, factor: np.float32, sign: np.float32,
    weight: np.float32, sums: np.ndarray,
) -> np.uint32:  # fmt: skip
    """As `_add`, but into one total for each sign of the delta times `sign`, and the weight into one divisor for each.

    `sums` holds them one after another, so that the compiler knows that they do not overlap.
    """
    up, down = sums[:_BLOCK], sums[_BLOCK : 2 * _BLOCK]
    for_up, for_down = sums[2 * _BLOCK : 3 * _BLOCK], sums[3 * _BLOCK :]
    worst = np.uint32(0)
    for i in range(model.size):
        difference = widen(model[i]) - old[i]
        worst = larger(worst, difference)
        kept = (keep[i] != 0) & (abs(difference) > above)
        signed = sign * (difference if kept else _ZERO)
        term = factor * difference
        up[i] += term if signed > _ZERO else _ZERO
        down[i] += term if signed < _ZERO else _ZERO
        for_up[i] += weight if signed > _ZERO else _ZERO
        for_down[i] += weight if signed < _ZERO else _ZERO
    return worst


@compiled()
def _tally(vote: np.ndarray, sums: np.ndarray, flags: np.ndarray) -> int:
    """Flag the entries without a majority to whom it matters; by how many positive signs outnumber negative ones."""
    up, down = sums[:_BLOCK], sums[_BLOCK : 2 * _BLOCK]
    positive, negative = np.uint32(0), np.uint32(0)
    for i in range(flags.size):
        positive, negative = plus(positive, vote[i] > _ZERO), plus(negative, vote[i] < _ZERO)
        flags[i] = (vote[i] == _ZERO) & ((up[i] != _ZERO) | (down[i] != _ZERO))
    return int(positive) - int(negative)


@compiled(error_model="numpy")
def _elect(
    old: np.ndarray, vote: np.ndarray, sums: np.ndarray, least: np.float32, lam: np.float32, out: np.ndarray
) -> None:
    """out = old + lam * the total of the elected sign over its divisor; a divisor smaller than `least` counts as 1."""
    up, down = sums[:_BLOCK], sums[_BLOCK : 2 * _BLOCK]
    for_up, for_down = sums[2 * _BLOCK : 3 * _BLOCK], sums[3 * _BLOCK :]
    for i in range(out.size):
        above, below, divisor, other = up[i], down[i], for_up[i], for_down[i]  # all are read, so there is no branch
        total = below if vote[i] < _ZERO else above
        divisor = other if vote[i] < _ZERO else divisor
        out[i] = narrow_like(old[i] + lam * (total / (divisor if abs(divisor) >= least else _ONE)), out)


@compiled()
def _add_delta(
    deltas: Any, k: int, start: int, old: np.ndarray, all_kept: np.ndarray, factor: np.float32, total: np.ndarray
) -> None:
    """`_add` with the entries of delta k from `start` on, as many as `total` has."""
    stop = min(start + total.size, deltas.models.shape[1])
    model, keep = deltas.models[k, start:stop], deltas.keep[k, start:stop] if deltas.masked[k] else all_kept
    cut = min(max(deltas.befores[k] - start, 0), model.size)
    if cut == 0:
        worst = _add(model, old, keep, deltas.above[k], factor, total)
    else:
        worst = _add(model[:cut], old, keep, deltas.early[k], factor, total)
        worst = max(worst, _add(model[cut:], old[cut:], keep[cut:], deltas.above[k], factor, total[cut:]))
    deltas.strange[k] |= worst >= INFINITE


@compiled()
def weighted_sum(out: np.ndarray, base: np.ndarray, deltas: Any, factors: np.ndarray, lam: np.float32) -> None:
    """out = base + lam * sum_k factors_k delta_k.

    Args:
        out: (n,) receives the result; float32 or uint16.
        base: (n,) float32 or uint16.
        deltas: a `Deltas`.
        factors: (K,) fp32.
        lam: factor on the sum.
    """
    total, old = np.empty(_LONG_BLOCK, np.float32), np.empty(_LONG_BLOCK, np.float32)
    nothing, all_kept = np.zeros(_LONG_BLOCK, np.float32), np.ones(_LONG_BLOCK, np.uint8)
    for start in range(0, base.size, _LONG_BLOCK):
        raw = base[start : start + _LONG_BLOCK]
        _load(raw, old)
        total[:] = _ZERO
        for k in range(factors.size):
            _add_delta(deltas, k, start, nothing if deltas.ready else old, all_kept, factors[k], total)
        _finish(old, total, lam, out[start : start + raw.size])


@compiled()
def _finish(old: np.ndarray, total: np.ndarray, lam: np.float32, out: np.ndarray) -> None:
    """out = old + lam * total."""
    for i in range(out.size):
        out[i] = narrow_like(old[i] + lam * total[i], out)


@compiled()
def _sort_delta(
    deltas: Any, k: int, start: int, old: np.ndarray, all_kept: np.ndarray, election: Any, sums: np.ndarray
) -> None:
    """`_sort` with the entries of delta k from `start` on."""
    stop = min(start + _BLOCK, deltas.models.shape[1])
    model, keep = deltas.models[k, start:stop], all_kept
    if deltas.masked[k]:
        keep = deltas.keep[k, start:stop]
    factor, sign, weight = election.factors[k], election.signs[k], election.weights[k]
    cut = min(max(deltas.befores[k] - start, 0), model.size)
    if cut == model.size:
        worst = _sort(model, old, keep, deltas.early[k], factor, sign, weight, sums)
    elif cut == 0:
        worst = _sort(model, old, keep, deltas.above[k], factor, sign, weight, sums)
    else:  # in this one block both thresholds hold: what the other one keeps is masked out
        early, late = np.zeros(model.size, np.uint8), np.zeros(model.size, np.uint8)
        early[:cut], late[cut:] = keep[:cut], keep[cut : model.size]
        worst = _sort(model, old, early, deltas.early[k], factor, sign, weight, sums)
        _sort(model, old, late, deltas.above[k], factor, sign, weight, sums)
    deltas.strange[k] |= worst >= INFINITE


@compiled()
def elected_sum(
    out: np.ndarray, base: np.ndarray, deltas: Any, election: Any, lam: np.float32, negative: np.ndarray,
    places: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """The sum of the deltas that agree with the sign they elect.

    An entry's sign is that of sum_k votes_k delta_k. Of the deltas with that sign (after a factor of signs_k), the sum
    of factors_k delta_k is divided by that of weights_k if `normalize`, and lam times that is added to the base. A sum
    of votes of exactly zero counts as positive; what a negative sign would give there is noted beside.

    Args:
        out: (n,) receives the result; float32 or uint16.
        base: (n,) float32 or uint16.
        deltas: a `Deltas`.
        election: an `Election`.
        lam: factor on the merged delta.
        negative: (n,) fp32, receives the results for a negative sign where the votes of some cancel to zero.
        places: (n,) int32, receives their indices; both empty if nobody asks.

    Returns:
        How many entries there are of those, and by how many positive signs outnumber negative ones.
    """
    sums, vote, old = np.empty(4 * _BLOCK, np.float32), np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    nothing, all_kept = np.zeros(_BLOCK, np.float32), np.ones(_BLOCK, np.uint8)
    flags, open_ = np.zeros(_BLOCK, np.uint8), np.empty(_BLOCK, np.int32)
    undecided, majority = 0, 0
    for start in range(0, base.size, _BLOCK):
        raw = base[start : start + _BLOCK]
        _load(raw, old)
        sums[:], vote[:] = _ZERO, _ZERO
        subtrahend = nothing if deltas.ready else old
        for k in range(election.factors.size):
            _sort_delta(deltas, k, start, subtrahend, all_kept, election, sums)
            if election.apart:
                _add_delta(deltas, k, start, subtrahend, all_kept, election.votes[k], vote)
        if not election.apart:
            for i in range(vote.size):
                vote[i] = sums[i] + sums[_BLOCK + i]
        if not election.normalize:
            sums[2 * _BLOCK :] = _ONE
        majority += _tally(vote, sums, flags[: raw.size])
        _elect(old, vote, sums, election.least, lam, out[start : start + raw.size])
        if places.size:
            flags[raw.size :] = 0
            for i in range(_flagged(flags, open_)):
                place = open_[i]
                divisor = sums[3 * _BLOCK + place]
                merged = sums[_BLOCK + place] / (divisor if abs(divisor) >= election.least else _ONE)
                places[undecided], negative[undecided] = start + place, old[place] + lam * merged
                undecided += 1
    return undecided, majority
