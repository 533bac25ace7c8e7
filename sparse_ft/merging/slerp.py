"""Spherical interpolation between a base and one other model, tensor by tensor.

    c = <a, b> / (||a|| ||b||),  theta = arccos c                      each tensor as one vector
    W = [sin((1 - t) theta) a + sin(t theta) b] / sin theta            |c| <= 0.9995
    W = (1 - t) a + t b                                                otherwise

t = 0 is the base, t = 1 the other model. A norm of at most 1e-8 counts as 1.

Source: Shoemake 1985, Animating rotation with quaternion curves, SIGGRAPH; the rule for tensors is mergekit's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, no_second_look, operands, run_in_memory

_PARALLEL = 0.9995
_NO_LENGTH = 1e-8


def slerp(base: Tensor, other: Tensor, t: float) -> Tensor:
    """Interpolate on the arc between two tensors.

    Args:
        base: any float dtype and shape.
        other: of the same shape.
        t: 0 gives the base, 1 the other.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ or a value is not finite.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    job = Job("tensor", tuple(base.shape), MemoryOperand(base), operands([other], base.shape), weights=[1.0], t=t)
    return run_in_memory(job, merge_slerp(job))


def merge_slerp(job: Job) -> Merge:
    """The method on one tensor.

    Raises:
        ValueError: unless there is a base and one other model.
    """
    if job.base is None or len(job.models) != 1:
        raise ValueError(f"slerp takes a base and one other model, got {len(job.models)} others for '{job.name}'.")
    return _Arc(job)


class _Arc:
    settle = staticmethod(no_second_look)

    def __init__(self, job: Job) -> None:
        self._job = job
        self._factors = _factors(*self._measure(), job.t) if job.t not in (0.0, 1.0) else (1.0 - job.t, job.t)

    def _measure(self) -> tuple[float, float, float]:
        """Product of the two tensors and their norms, summed in fp64 over chunks."""
        product = base_square = other_square = 0.0
        for start, stop in self._job.ranges():
            base = self._job.read_base(start, stop)
            other = self._job.read_delta(0, None, start, stop)
            assert base is not None
            product += torch.dot(base, other).item()
            base_square += torch.dot(base, base).item()
            other_square += torch.dot(other, other).item()
        return product, math.sqrt(base_square), math.sqrt(other_square)

    def chunk(self, start: int, stop: int) -> Tensor:
        """The interpolated elements."""
        base = self._job.read_base(start, stop)
        assert base is not None
        if self._factors[1] == 0.0:
            return base
        other = self._job.read_delta(0, None, start, stop)
        if self._factors[0] == 0.0:
            return other
        return base.mul_(self._factors[0]).add_(other, alpha=self._factors[1])


def _factors(product: float, base_norm: float, other_norm: float, t: float) -> tuple[float, float]:
    """What the base and the other model are multiplied with."""
    lengths = [norm if norm > _NO_LENGTH else 1.0 for norm in (base_norm, other_norm)]
    cosine = min(max(product / (lengths[0] * lengths[1]), -1.0), 1.0)
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
