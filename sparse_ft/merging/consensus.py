"""How sparsified deltas become one: as a weighted sum, or as the sum of those that agree with an elected sign.

Sparsifying happens before, chunk by chunk: a `Sparsify` zeroes entries of delta k in place and has one factor per
model that makes up for them. `merge_deltas` is the common end of all methods that work on deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_ft.merging.chunks import Job, Merge, no_second_look

_SIGN = -(1 << 31)  # the sign bit of a float, as an int32
_BELOW_ZERO = 1e-37  # turns an exact zero into a negative number and changes no other sum
_LEAST_DIVISOR = 1e-6


class Sparsify(Protocol):
    """What a method drops from a delta, and the factor on what it keeps."""

    #: One factor per model.
    scales: Sequence[float]

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Zero the dropped ones of the elements `start .. stop` of delta k, in place."""


class KeepAll:
    """Drops nothing."""

    def __init__(self, models: int) -> None:
        self.scales: Sequence[float] = [1.0] * models

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Leave the delta as it is."""


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
        self._job, self._sparsify = job, sparsify
        total = sum(job.weights)
        self._lam = job.lam / (total if job.normalize and abs(total) >= 1e-8 else 1.0)

    def chunk(self, start: int, stop: int) -> Tensor:
        """The merged elements."""
        job = self._job
        base, total = job.read_base(start, stop), job.workspace.get("total", stop - start)
        assert base is not None
        present = job.present()
        for k in present:
            delta = job.read_delta(k, base, start, stop)
            self._sparsify(k, delta, start, stop)
            factor = job.weights[k] * self._sparsify.scales[k]
            _accumulate(total, delta, factor, k == present[0])
        return base.add_(total, alpha=self._lam) if present else base


class ElectedSum:
    """Each entry takes the sign s that its deltas elect; those of another sign are left out.

    Paper: s = sign(sum_k delta_k), and where the sum is exactly zero the sign that prevails in the tensor. mergekit:
    the weights vote too, s = sign(sum_k w_k delta_k), and zero elects +1. Then, over the deltas k of sign s,

        W = W_0 + lambda * sum_k w_k delta_k / (sum_k w_k if `normalize`, else 1)

    With A = sum_k |w_k delta_k| and S = sum_k w_k delta_k the sum over those that agree is s (A + s S) / 2, so no delta
    is looked at twice; the divisor is found in the same way from the signs.
    """

    def __init__(self, job: Job, sparsify: Sparsify) -> None:
        self._job, self._sparsify = job, sparsify
        self._present = job.present()
        weights = [job.weights[k] for k in self._present]
        self._by_weight = job.compatibility == "mergekit"
        # With equal weights the weighted sum has the sign of the plain one.
        self._own_votes = not self._by_weight and any(w != weights[0] or w < 0 for w in weights)
        self._positive = all(w > 0 for w in weights)
        self._sums = ["total", "size", *(["votes"] if self._own_votes else [])]
        self._sums += ["signs", "present"] if job.normalize else []
        self._majority = 0
        self._undecided: list[int] = []
        self._zero_is_negative = False

    def settle(self) -> list[int]:
        """The chunks with undecided entries, if the tensor's prevailing sign is not the one assumed."""
        self._zero_is_negative = self._majority < 0
        return self._undecided if self._zero_is_negative else []

    def chunk(self, start: int, stop: int) -> Tensor:
        """The merged elements."""
        job, n = self._job, stop - start
        base = job.read_base(start, stop)
        assert base is not None
        if not self._present:
            return base
        sums = {name: job.workspace.get(name, n) for name in self._sums}
        for k in self._present:
            delta = job.read_delta(k, base, start, stop)
            self._sparsify(k, delta, start, stop)
            self._add(k, delta, sums)
        total, size = sums["total"], sums["size"]
        votes = sums["votes"] if self._own_votes else total
        if not self._by_weight and len(self._present) > 1 and not self._zero_is_negative:
            self._count_votes(start, votes, size)
        if self._zero_is_negative:
            votes = torch.sub(votes, _BELOW_ZERO, out=job.workspace.get("sign", n))
        sign = torch.bitwise_and(votes.view(torch.int32), _SIGN, out=job.workspace.get("bits", n, torch.int32))
        double = _flip(_flip(total, sign).add_(size), sign)
        if not job.normalize:
            return base.add_(double, alpha=job.lam / 2)
        divisor = _flip(sums["signs"], sign).add_(sums["present"])
        return base.add_(double.div_(self._without_zeros(divisor)), alpha=job.lam)

    def _add(self, k: int, delta: Tensor, sums: dict[str, Tensor]) -> None:
        weight, scale, first = self._job.weights[k], self._sparsify.scales[k], k == self._present[0]
        # mergekit compares the sign of w delta, the paper that of delta: a negative weight tells them apart.
        strength = abs(weight) if self._by_weight else weight
        _accumulate(sums["total"], delta, weight * scale, first)
        if self._own_votes:
            _accumulate(sums["votes"], delta, scale, first)
        if self._job.normalize:
            sign = torch.sign(delta, out=self._job.workspace.get("sign", delta.numel()))
            _accumulate(sums["signs"], sign, strength, first)
            _accumulate(sums["present"], sign.abs_(), weight, first)
        _accumulate(sums["size"], delta.abs_(), strength * scale, first)

    def _count_votes(self, start: int, votes: Tensor, size: Tensor) -> None:
        """Note what the chunk adds to the majority, and whether it has entries that depend on it."""
        flags = self._job.workspace.bools("lower", votes.numel())
        positive = np.count_nonzero(np.greater(votes.numpy(), 0, out=flags))
        negative = np.count_nonzero(np.less(votes.numpy(), 0, out=flags))
        self._majority += int(positive) - int(negative)
        if np.count_nonzero(np.not_equal(size.numpy(), 0, out=flags)) > positive + negative:
            self._undecided.append(start)

    def _without_zeros(self, divisor: Tensor) -> Tensor:
        """Twice the divisor, with 1 where nobody agreed; weights of both signs may cancel to almost nothing."""
        if self._positive:
            return divisor.clamp_min_(1e-30)  # nobody agreed: the sum is zero as well
        return divisor.masked_fill_(divisor.abs() < 2 * _LEAST_DIVISOR, 2.0)


def _accumulate(total: Tensor, values: Tensor, factor: float, first: bool) -> None:
    """total + factor * values in place, or only the second term if it is the first."""
    torch.mul(values, factor, out=total) if first else total.add_(values, alpha=factor)


def _flip(values: Tensor, sign: Tensor) -> Tensor:
    """Change the sign of the values where the bit is set, in place."""
    values.view(torch.int32).bitwise_xor_(sign)
    return values
