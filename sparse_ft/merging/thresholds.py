"""Exact thresholds on the absolute values of a delta that is only ever seen in chunks.

The value of a given rank is found in one pass: a sample of the delta gives a bracket that very likely holds it, the
pass counts what lies below the bracket and collects the few values inside. If the rank falls outside after all, a
histogram over the bits of the values gives a bracket that cannot miss. Nothing is sorted but samples and brackets.

A threshold alone is not exact: deltas of bf16 checkpoints lie on a lattice, where whole percents of the entries are
equal (and a quarter are zero). Entries are ordered by absolute value and among equal ones by flat index, so a `Cut` has
a value and a position: entries of that value lie on one side before the position and on the other from it on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_ft.merging.chunks import Job, as_array
from sparse_ft.merging.kernels import collect, place_of, sizes

_SAMPLE_BLOCK, _SAMPLE_BLOCKS = 1024, 16  # entries of a block at least, and blocks at most
_SIGMAS = 5.0  # sample blocks are neighbours and so a little alike: wider than independent entries would need
_MOST_HELD = 1 << 22  # values inside a bracket that are held as they are
_BIN_SHIFT = 16  # bits of a float below the histogram's: a bin spans less than a percent of its value


@dataclass(frozen=True)
class Wanted:
    """A cut to be found: the `count` largest (or smallest) entries of model `model`."""

    model: int
    count: int
    largest: bool


@dataclass(frozen=True)
class Cut:
    """Where a delta is cut in two: at `value`, equal entries before flat index `position` on the wanted side."""

    value: float
    position: int

    def smallest(self, sizes: NDArray[np.float32], start: int, out: NDArray[np.bool_]) -> None:
        """Which entries are among the smallest.

        Args:
            sizes: (n,) absolute values of the elements from `start` on.
            start: flat index of the first.
            out: (n,) the answer.
        """
        before = min(max(self.position - start, 0), len(sizes))
        np.less_equal(sizes[:before], np.float32(self.value), out=out[:before])
        np.less(sizes[before:], np.float32(self.value), out=out[before:])


def find_cuts(job: Job, wanted: Sequence[Wanted]) -> list[Cut]:
    """All cuts of one tensor, found together in one pass over the base and each delta.

    Args:
        job: the tensor.
        wanted: any number per model.

    Returns:
        One cut for each wanted.
    """
    searches = [_Search(w, job.numel) for w in wanted]
    open_ = [search for search in searches if search.is_open]
    _take_samples(job, open_)
    _collect(job, open_)
    missed = [search for search in open_ if not search.hit]
    if missed:
        _take_histograms(job, missed)
        _collect(job, missed)
    return [search.cut(job) if search.is_open else search.trivial() for search in searches]


@dataclass
class _Piece:
    """What one chunk has in a bracket: how often its ends, and what lies between, each as often as it occurs.

    With `counts` each value between stands once, with its count.
    """

    start: int
    at_low: int
    at_high: int
    between: NDArray[np.float32]
    counts: NDArray[np.int64] | None = None

    def all_counts(self) -> NDArray[np.int64]:
        return np.ones(len(self.between), np.int64) if self.counts is None else self.counts

    def count(self, chosen: NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(chosen) if self.counts is None else self.counts[chosen].sum())

    @property
    def numel(self) -> int:
        return self.at_low + self.at_high + int(self.all_counts().sum())


@dataclass
class _Search:
    """The search for one cut: entry number `rank` of the ascending order is the value."""

    wanted: Wanted
    numel: int
    low: float = 0.0
    high: float = math.inf
    below: int = 0
    held: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return 0 < self.wanted.count < self.numel

    @property
    def rank(self) -> int:
        return self.numel - self.wanted.count if self.wanted.largest else self.wanted.count - 1

    @property
    def hit(self) -> bool:
        return self.below <= self.rank < self.below + sum(piece.numel for piece in self.pieces)

    def trivial(self) -> Cut:
        """The cut of everything or nothing."""
        everything = self.wanted.count > 0
        return Cut(-math.inf if everything == self.wanted.largest else math.inf, 0)

    def bracket(self, sample: NDArray[np.float32]) -> None:
        """Set the bracket from a sorted sample."""
        share, size = (self.rank + 0.5) / self.numel, len(sample)
        middle, reach = share * size, _SIGMAS * math.sqrt(share * (1 - share) * size) + 2
        first, last = math.floor(middle - reach), math.ceil(middle + reach)
        self.low = float(sample[first]) if first >= 0 else 0.0
        self.high = float(sample[last]) if last < size else math.inf

    def add(self, start: int, base: NDArray[Any], model: NDArray[Any], room: NDArray[np.float32]) -> bool:
        """Count and collect one chunk; `room` for as many values is overwritten. Whether any is not finite."""
        found = collect(base, model, np.float32(self.low), np.float32(self.high), room)
        below, at_low, at_high, count, strange = found
        self.below += below
        self.held += count
        if self.held <= _MOST_HELD:
            self.pieces.append(_Piece(start, at_low, at_high, room[:count].copy()))
        else:  # deltas of bf16 weights lie on a lattice: thousands of values are a handful of different ones
            self.pieces.append(_Piece(start, at_low, at_high, *np.unique(room[:count], return_counts=True)))
        return bool(strange)

    def cut(self, job: Job) -> Cut:
        """The result, after a pass whose bracket held the rank."""
        rank = self.rank - self.below
        at_low, at_high = (sum(getattr(piece, end) for piece in self.pieces) for end in ("at_low", "at_high"))
        inside = sum(piece.numel for piece in self.pieces)
        if rank < at_low:
            value, less, equal = np.float32(self.low), 0, at_low
        elif rank >= inside - at_high:
            value, less, equal = np.float32(self.high), inside - at_high, at_high
        else:
            value = self._between(rank - at_low)
            less = at_low + sum(piece.count(piece.between < value) for piece in self.pieces)
            equal = sum(piece.count(piece.between == value) for piece in self.pieces)
        less += self.below
        outside = self.numel - less - equal if self.wanted.largest else less
        return Cut(float(value), self._position(job, value, self.wanted.count - outside))

    def _between(self, rank: int) -> np.float32:
        """Number `rank` of the ascending values between the ends of the bracket."""
        values = np.concatenate([piece.between for piece in self.pieces])
        if all(piece.counts is None for piece in self.pieces):
            return np.float32(np.partition(values, rank)[rank])
        order = np.argsort(values)
        up_to = np.cumsum(np.concatenate([piece.all_counts() for piece in self.pieces])[order])
        return np.float32(values[order][np.searchsorted(up_to, rank, side="right")])

    def _position(self, job: Job, value: np.float32, ties: int) -> int:
        """The flat index behind tie number `ties`."""
        for piece in self.pieces:
            ends = {np.float32(self.high): piece.at_high, np.float32(self.low): piece.at_low}
            here = ends[value] if value in ends else piece.count(piece.between == value)
            if ties <= here:
                stop = next(stop for start, stop in job.ranges() if start == piece.start)
                base, models = _raw(job, [self.wanted.model], piece.start, stop)
                return piece.start + int(place_of(base, models[0], value, ties)) + 1
            ties -= here
        raise AssertionError("fewer ties than were counted")


def _models(searches: Sequence[_Search]) -> dict[int, list[_Search]]:
    by_model: dict[int, list[_Search]] = {}
    for search in searches:
        by_model.setdefault(search.wanted.model, []).append(search)
    return by_model


def _take_samples(job: Job, searches: Sequence[_Search]) -> None:
    """Bracket every search by evenly spread blocks of its delta; a small tensor is its own sample."""
    by_model = _models(searches)
    if not by_model:
        return
    size = min(max(job.numel // 64, 16384), 131072)
    block = max(size // _SAMPLE_BLOCKS, _SAMPLE_BLOCK)
    spread = np.linspace(0, max(job.numel - block, 0), min(size // block, -(-job.numel // block)))
    samples: dict[int, list[NDArray[np.float32]]] = {k: [] for k in by_model}
    for start in dict.fromkeys(int(place) for place in spread):
        base, models = _raw(job, list(by_model), start, min(start + block, job.numel))
        for k, model in zip(by_model, models, strict=True):
            samples[k].append(np.empty(len(base), np.float32))
            sizes(base, model, samples[k][-1])
    for k, own in by_model.items():
        sample = np.sort(np.concatenate(samples[k]))
        for search in own:
            search.bracket(sample)


def _collect(job: Job, searches: Sequence[_Search]) -> None:
    """One pass over the tensor for the brackets as they are."""
    by_model = _models(searches)
    for search in searches:
        search.below, search.held, search.pieces = 0, 0, []
    for start, stop in job.ranges() if by_model else ():
        base, models = _raw(job, list(by_model), start, stop)
        room = job.workspace.get("sizes", stop - start).numpy()
        for model, (k, own) in zip(models, by_model.items(), strict=True):
            for search in own:
                if search.add(start, base, model, room):
                    raise job.not_finite(k)


def _raw(job: Job, chosen: Sequence[int], start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """A chunk of the base and of the models; without a base, zeros, so that the deltas are the models."""
    if job.base is not None:
        base, models = job.read_raw(chosen, start, stop)
        return as_array(base), as_array(models)
    whole = job.workspace.get("deltas", len(chosen) * (stop - start)).view(len(chosen), -1)
    for row, k in zip(whole, chosen, strict=True):
        job.read_delta(k, None, start, stop, row)
    return np.zeros(stop - start, np.float32), whole.numpy()


def _take_histograms(job: Job, searches: Sequence[_Search]) -> None:
    """Bracket every search by the bin of a histogram over the leading bits: positive floats order as their bits do."""
    by_model = _models(searches)
    histograms = {k: np.zeros(1 << (32 - _BIN_SHIFT), dtype=np.int64) for k in by_model}
    for start, stop in job.ranges():
        base, models = _raw(job, list(by_model), start, stop)
        room = job.workspace.get("sizes", stop - start).numpy()
        for model, histogram in zip(models, histograms.values(), strict=True):
            sizes(base, model, room)
            histogram += np.bincount(room.view(np.uint32) >> np.uint32(_BIN_SHIFT), minlength=len(histogram))
    for k, own in by_model.items():
        up_to = np.cumsum(histograms[k])
        for search in own:
            bin_ = int(np.searchsorted(up_to, search.rank, side="right"))
            edges = np.array([bin_ << _BIN_SHIFT, ((bin_ + 1) << _BIN_SHIFT) - 1], dtype=np.uint32).view(np.float32)
            search.low, search.high = float(edges[0]), float(edges[1])
