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

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_ft.merging.chunks import Job

_SAMPLE_BLOCK = 1024
_SIGMAS = 5.0  # sample blocks are neighbours and so a little alike: wider than independent entries would need
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

    def largest(self, sizes: NDArray[np.float32], start: int, out: NDArray[np.bool_]) -> None:
        """Which entries are among the largest.

        Args:
            sizes: (n,) absolute values of the elements from `start` on.
            start: flat index of the first.
            out: (n,) the answer.
        """
        before = min(max(self.position - start, 0), len(sizes))
        np.greater_equal(sizes[:before], np.float32(self.value), out=out[:before])
        np.greater(sizes[before:], np.float32(self.value), out=out[before:])

    def smallest(self, sizes: NDArray[np.float32], start: int, out: NDArray[np.bool_]) -> None:
        """Which entries are among the smallest; as `largest`."""
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
class _Search:
    """The search for one cut: entry number `rank` of the ascending order is the value."""

    wanted: Wanted
    numel: int
    low: float = 0.0
    high: float = math.inf
    below: int = 0
    pieces: list[tuple[int, NDArray[np.float32], NDArray[np.int64]]] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return 0 < self.wanted.count < self.numel

    @property
    def rank(self) -> int:
        return self.numel - self.wanted.count if self.wanted.largest else self.wanted.count - 1

    @property
    def hit(self) -> bool:
        return self.below <= self.rank < self.below + sum(int(counts.sum()) for _, _, counts in self.pieces)

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

    def add(self, start: int, sizes: NDArray[np.float32], lower: NDArray[np.bool_], inside: NDArray[np.bool_]) -> None:
        """Count and collect one chunk; the two arrays of bools are room to work in."""
        np.less(sizes, np.float32(self.low), out=lower)
        np.less_equal(sizes, np.float32(self.high), out=inside)
        below = int(np.count_nonzero(lower))
        self.below += below
        count = int(np.count_nonzero(inside)) - below
        if not count:
            return
        if self.low == self.high:
            self.pieces.append((start, np.array([self.low], dtype=np.float32), np.array([count])))
            return
        np.not_equal(lower, inside, out=inside)
        values = sizes[np.flatnonzero(inside)]
        # On a lattice thousands of values are a handful of different ones.
        found, counts = np.unique(values, return_counts=True) if count > 256 else (values, np.ones(count, np.int64))
        self.pieces.append((start, found, counts))

    def cut(self, job: Job) -> Cut:
        """The result, after a pass whose bracket held the rank."""
        values = np.concatenate([found for _, found, _ in self.pieces])
        counts = np.concatenate([numbers for _, _, numbers in self.pieces])
        order = np.argsort(values)
        up_to = self.below + np.cumsum(counts[order])
        value = values[order][np.searchsorted(up_to, self.rank, side="right")]
        less = self.below + int(counts[values < value].sum())
        equal = int(counts[values == value].sum())
        outside = self.numel - less - equal if self.wanted.largest else less
        return Cut(float(value), self._position(job, value, self.wanted.count - outside))

    def _position(self, job: Job, value: np.float32, ties: int) -> int:
        """The flat index behind tie number `ties`."""
        for start, found, counts in self.pieces:
            here = int(counts[found == value].sum())
            if ties <= here:
                stop = min(stop for first, stop in job.ranges() if first == start)
                sizes = _sizes(job, self.wanted.model, job.read_base(start, stop), start, stop)
                return start + int(np.flatnonzero(sizes == value)[ties - 1]) + 1
            ties -= here
        raise AssertionError("fewer ties than were counted")


def _sizes(job: Job, k: int, base: torch.Tensor | None, start: int, stop: int) -> NDArray[np.float32]:
    sizes: NDArray[np.float32] = job.read_delta(k, base, start, stop).abs_().numpy()
    return sizes


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
    blocks = min(max(job.numel // 64, 16384), 131072) // _SAMPLE_BLOCK
    spread = np.linspace(0, max(job.numel - _SAMPLE_BLOCK, 0), min(blocks, -(-job.numel // _SAMPLE_BLOCK)))
    samples: dict[int, list[NDArray[np.float32]]] = {k: [] for k in by_model}
    for start in dict.fromkeys(int(place) for place in spread):
        stop = min(start + _SAMPLE_BLOCK, job.numel)
        base = job.read_base(start, stop)
        for k in by_model:
            samples[k].append(_sizes(job, k, base, start, stop).copy())
    for k, own in by_model.items():
        sample = np.sort(np.concatenate(samples[k]))
        for search in own:
            search.bracket(sample)


def _collect(job: Job, searches: Sequence[_Search]) -> None:
    """One pass over the tensor for the brackets as they are."""
    by_model = _models(searches)
    for search in searches:
        search.below, search.pieces = 0, []
    for start, stop in job.ranges() if by_model else ():
        base = job.read_base(start, stop)
        lower, inside = (job.workspace.bools(name, stop - start) for name in ("lower", "inside"))
        for k, own in by_model.items():
            sizes = _sizes(job, k, base, start, stop)
            for search in own:
                search.add(start, sizes, lower, inside)


def _take_histograms(job: Job, searches: Sequence[_Search]) -> None:
    """Bracket every search by the bin of a histogram over the leading bits: positive floats order as their bits do."""
    by_model = _models(searches)
    histograms = {k: np.zeros(1 << (32 - _BIN_SHIFT), dtype=np.int64) for k in by_model}
    for start, stop in job.ranges():
        base = job.read_base(start, stop)
        for k, histogram in histograms.items():
            bins = _sizes(job, k, base, start, stop).view(np.uint32) >> np.uint32(_BIN_SHIFT)
            histogram += np.bincount(bins, minlength=len(histogram))
    for k, own in by_model.items():
        up_to = np.cumsum(histograms[k])
        for search in own:
            bin_ = int(np.searchsorted(up_to, search.rank, side="right"))
            edges = np.array([bin_ << _BIN_SHIFT, ((bin_ + 1) << _BIN_SHIFT) - 1], dtype=np.uint32).view(np.float32)
            search.low, search.high = float(edges[0]), float(edges[1])
