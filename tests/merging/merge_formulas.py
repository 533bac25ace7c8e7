"""Every merge method written a second time, whole tensors in fp64, straight from the formulas; for tests only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def deltas_of(base: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() - base.double() for tensor in tensors]


def l1_factor(whole: Tensor, kept: Tensor) -> float:
    a, b = float(whole.abs().sum()), float(kept.abs().sum())
    return 1.0 if a < 1e-7 or b < 1e-7 else a / b


def top(delta: Tensor, count: int) -> Tensor:
    """The `count` largest of |delta|, equal ones by lowest index."""
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices
    kept = torch.zeros(delta.numel(), dtype=torch.float64)
    kept[order[:count]] = 1
    return delta * kept.view(delta.shape)


def middle(delta: Tensor, density: float, gamma: float) -> Tensor:
    n = delta.numel()
    keep, above = int(density * n), int(gamma * n)
    below = max(0, n - keep - above)
    order = torch.sort(delta.abs().flatten(), stable=True).indices
    kept = torch.zeros(n, dtype=torch.float64)
    kept[order[below : below + keep]] = 1
    return delta * kept.view(delta.shape)


def weighted_sum(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, lam: float
) -> Tensor:
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    divisor = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
    return base.double() + lam * total / divisor


def elected(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool, lam: float, mergekit: bool
) -> Tensor:
    stack = torch.stack(list(deltas))
    w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim)
    if mergekit:
        sign = torch.where((w * stack).sum(0) >= 0, 1.0, -1.0)
        agree = (w * stack).sign() == sign
    else:
        votes = stack.sum(0).sign()
        prevailing = 1.0 if float(votes.sum()) >= 0 else -1.0
        sign = torch.where(votes == 0, prevailing, votes)
        agree = stack.sign() == sign
    total = (agree * w * stack).sum(0)
    if normalize:
        divisor = (agree * w).sum(0)
        total = total / torch.where(divisor == 0, 1.0, divisor)
    return base.double() + lam * total


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    rows = delta.abs().reshape(-1, delta.shape[-1])
    result = torch.empty_like(rows, dtype=torch.float64)
    for i, row in enumerate(rows):
        order = sorted(range(len(row)), key=lambda j: (float(row[j]), j))
        for rank, j in enumerate(order):
            rho = rank / (len(row) - 1) if len(row) > 1 else 0.5
            result[i, j] = density - epsilon + 2 * epsilon * rho
    return result.view(delta.shape)


def arc(a: Tensor, b: Tensor, t: float) -> Tensor:
    a, b = a.double(), b.double()
    na, nb = (float(x.norm()) if float(x.norm()) > 1e-8 else 1.0 for x in (a, b))
    c = max(-1.0, min(1.0, float((a / na * (b / nb)).sum())))
    if abs(c) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(c)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
