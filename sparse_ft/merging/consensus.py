"""How sparsified deltas become one: as a weighted sum, or as the sum of those that agree with an elected sign.

Sparsifying happens before, chunk by chunk: a `Sparsify` zeroes entries of delta k in place and has one factor per
model that makes up for them. `merge_deltas` is the common end of all methods that work on deltas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.merging.chunks import Job, Merge, Patch, as_array, no_second_look
from sparse_ft.merging.kernels import Deltas, Election, drop, drop_small, elected_sum, weighted_sum
from sparse_ft.merging.thresholds import Cut

_LEAST_DIVISOR = 1e-6
_MOST_KEPT = 1 << 21  # 8 bytes each


class Sparsify(Protocol):
    """What a method drops from a delta, and the factor on what it keeps."""

    #: One factor per model.
    scales: Sequence[float]

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Zero the dropped ones of the elements `start .. stop` of delta k, in place."""


class Masking:
    """A `Sparsify` that drops what a threshold or a mask says and changes nothing else; this one drops nothing.

    Compiled loops do the dropping where entries are merged; here it is done on a delta by itself.

    Args:
        job: the tensor.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.scales: Sequence[float] = [1.0] * len(job.models)
        #: Of the models of which only the largest entries are kept.
        self.cuts: Mapping[int, Cut] = {}

    def keep(self, k: int, start: int, stop: int, out: NDArray[np.uint8]) -> bool:
        """Write to `out` which of the elements `start .. stop` of model k are kept; False if no mask says that."""
        return False

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Zero what is below the threshold or outside the mask of delta k, in place."""
        room = self._job.workspace.get("keep", stop - start, torch.uint8).numpy()
        if k in self.cuts:
            before = min(max(self.cuts[k].position - start, 0), stop - start)
            drop_small(delta.numpy(), np.float32(self.cuts[k].value), before)
        elif self.keep(k, start, stop, room):
            drop(delta.numpy(), room)


def l1_scales(job: Job, sparsify: Sparsify) -> list[float]:
    """mergekit's rescale: the factor per model that gives the kept part of a delta the L1 norm of the whole.

    ||delta|| / ||kept||, each over the tensor; 1 where one of the two is below 1e-7. Takes a pass over the tensor.
    """
    whole, kept = np.zeros(len(job.models)), np.zeros(len(job.models))
    for start, stop in job.ranges():
        base = job.read_base(start, stop)
        for k in job.present():
            if job.densities[k] >= 1.0:
                continue
            delta = job.read_delta(k, base, start, stop)
            sizes = job.workspace.get("sizes", stop - start)
            whole[k] += torch.abs(delta, out=sizes).sum().item()
            sparsify(k, delta, start, stop)
            kept[k] += delta.abs_().sum().item()
    return [w / s if min(w, s) >= 1e-7 else 1.0 for w, s in zip(whole.tolist(), kept.tolist(), strict=True)]


def merge_deltas(job: Job, sparsify: Sparsify, *, elect: bool) -> Merge:
    """The merge W_0 + lambda * combination of the sparsified deltas.

    Args:
        job: the tensor; it has a base.
        sparsify: what is dropped.
        elect: merge only entries that agree with the elected sign, else the plain weighted sum.

    Raises:
        ValueError: if there is no base.
    """
    if job.base is None:
        raise ValueError(f"Tensor '{job.name}' has no base to take differences to.")
    return ElectedSum(job, sparsify) if elect else WeightedSum(job, sparsify)


class WeightedSum:
    """W = W_0 + lambda * sum_k w_k delta_k, divided by the sum of the weights if `normalize`."""

    settle = staticmethod(no_second_look)

    def __init__(self, job: Job, sparsify: Sparsify) -> None:
        self._job = job
        total = sum(job.weights)
        self._lam = np.float32(job.lam / (total if job.normalize and abs(total) >= 1e-8 else 1.0))
        self._deltas = _Deltas(job, sparsify)
        self._factors = _column(job.weights[k] * sparsify.scales[k] for k in job.present())

    def chunk(self, start: int, stop: int) -> Tensor:
        """The merged elements."""
        out = _output(self._job, stop - start)
        with self._deltas.read(start, stop) as (base, deltas):
            weighted_sum(as_array(out), base, deltas, self._factors, self._lam)
        return out


class ElectedSum:
    """Each entry takes the sign s that its deltas elect; those of another sign are left out.

    Paper: s = sign(sum_k delta_k), and where the sum is exactly zero the sign that prevails in the tensor. mergekit:
    the weights vote too, s = sign(sum_k w_k delta_k), and zero elects +1. Then, over the deltas k of sign s,

        W = W_0 + lambda * sum_k w_k delta_k / (sum_k w_k if `normalize`, else 1)

    Which sign prevails is known after the last chunk. Until then it is taken to be +1, and the results for -1 of the
    entries that depend on it are kept; beyond `_MOST_KEPT` of them their chunks are computed again.
    """

    def __init__(self, job: Job, sparsify: Sparsify) -> None:
        self._job, self._deltas = job, _Deltas(job, sparsify)
        present = job.present()
        by_weight = job.compatibility == "mergekit"
        weights = [job.weights[k] for k in present]
        factors = [job.weights[k] * sparsify.scales[k] for k in present]
        # A factor that all share is applied at the end: sums of plain deltas cancel exactly where they should.
        shared = factors[0] if factors and factors[0] > 0 and len(set(factors)) == 1 else 1.0
        self._lam = np.float32(job.lam * shared)
        self._election = Election(
            votes=_column(factor / shared for factor in factors)
            if by_weight
            else _column(sparsify.scales[k] for k in present),
            # With equal weights the weighted sum has the sign of the plain one.
            apart=any(w < 0 or (w != weights[0] and not by_weight) for w in weights),
            # mergekit compares the sign of w delta, the paper that of delta: a negative weight tells them apart.
            signs=_column(-1.0 if by_weight and w < 0 else 1.0 for w in weights),
            factors=_column(factor / shared for factor in factors),
            weights=_column(weights),
            # Weights of both signs may cancel to almost nothing.
            least=np.float32(1e-30 if all(w > 0 for w in weights) else _LEAST_DIVISOR),
            normalize=job.normalize,
        )
        self._one_zero = by_weight or len(present) < 2
        self._majority, self._kept = 0, 0
        self._patches: list[Patch] = []
        self._dropped: list[tuple[int, int]] = []

    def chunk(self, start: int, stop: int) -> Tensor:
        """The merged elements."""
        total, patch = self._elect(start, stop)
        if patch is not None:
            self._kept += len(patch.places)
            if self._kept <= _MOST_KEPT:
                self._patches.append(Patch(start, patch.places.copy(), patch.values.copy()))
            else:
                self._dropped.append((start, stop))
        return total

    def settle(self) -> Iterator[Patch]:
        """The entries whose deltas cancel, if the tensor's prevailing sign is not the one assumed."""
        if self._majority < 0:
            yield from self._patches
            for start, stop in self._dropped:
                patch = self._elect(start, stop)[1]
                if patch is not None:
                    yield patch

    def _elect(self, start: int, stop: int) -> tuple[Tensor, Patch | None]:
        """The merged elements, and what would stand where the deltas cancel if -1 prevailed."""
        job, n = self._job, stop - start
        out, room = _output(job, n), 0 if self._one_zero else n
        values = job.workspace.get("negative", room).numpy()
        places = job.workspace.get("places", room, torch.int32).numpy()
        with self._deltas.read(start, stop) as (base, deltas):
            undecided, majority = elected_sum(as_array(out), base, deltas, self._election, self._lam, values, places)
        self._majority += majority
        return out, Patch(start, places[:undecided], values[:undecided]) if undecided else None


def _output(job: Job, n: int) -> Tensor:
    return job.workspace.get("out", n, torch.bfloat16 if job.dtype == torch.bfloat16 else torch.float32)


class _Deltas:
    """Chunks of the models that take part as the compiled loops want them, with what is to be dropped from each."""

    def __init__(self, job: Job, sparsify: Sparsify) -> None:
        self._job, self._sparsify, self._present = job, sparsify, job.present()
        self._masking = sparsify if isinstance(sparsify, Masking) else None
        cuts = self._masking.cuts if self._masking else {}
        self._above = _column(cuts[k].value if k in cuts else -1.0 for k in self._present)
        self._early = np.nextafter(self._above, np.float32(-np.inf))
        self._positions = np.array([cuts[k].position if k in cuts else 0 for k in self._present], np.int64)

    @contextmanager
    def read(self, start: int, stop: int) -> Iterator[tuple[NDArray[Any], Deltas]]:
        """A chunk of the base, and of the others with what to drop from them.

        Raises:
            ValueError: afterwards, if a loop found a delta that is not finite.
        """
        job, n, count = self._job, stop - start, len(self._present)
        strange, masked = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        if self._masking is not None:
            base, models = job.read_raw(self._present, start, stop)
            keep = job.workspace.get("keep", count * n, torch.uint8).view(count, n).numpy()
            for place, k in enumerate(self._present):
                masked[place] = self._masking.keep(k, start, stop, keep[place])
        else:
            whole = job.read_base(start, stop)
            assert whole is not None
            base, models = whole, job.workspace.get("deltas", count * n).view(count, n)
            keep = np.zeros((count, 0), np.uint8)
            for place, k in enumerate(self._present):
                self._sparsify(k, job.read_delta(k, base, start, stop, models[place]), start, stop)
        ready, befores = self._masking is None, self._positions - start
        yield as_array(base), Deltas(as_array(models), ready, keep, masked, self._above, self._early, befores, strange)
        if strange.any():
            raise job.not_finite(self._present[int(np.argmax(strange))])


def _column(numbers: Iterable[float]) -> NDArray[np.float32]:
    return np.array(list(numbers), dtype=np.float32)
