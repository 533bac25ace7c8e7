"""Weighted average of whole models, a model soup.

    W = sum_k w_k W_k / sum_k w_k        (`normalize`, the default)
    W = sum_k w_k W_k                    (otherwise)

Source: Wortsman et al. 2022, Model soups, arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.merging.chunks import Job, Merge, no_second_look, operands, run_in_memory


def linear(tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Average tensors.

    Args:
        tensors: of one shape, any float dtype.
        weights: one per tensor.
        normalize: divide by the sum of the weights; [1, 1] is then an average, without it a sum.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if the weights sum to zero with `normalize`, shapes differ, or a value is not finite.

    Example:
        >>> linear([torch.tensor([1.0]), torch.tensor([3.0])], [1, 1])
        tensor([2.])
    """
    shape = tuple(tensors[0].shape) if tensors else ()
    job = Job("tensor", shape, None, operands(tensors, shape), weights=list(weights), normalize=normalize)
    return run_in_memory(job, merge_linear(job))


def merge_linear(job: Job) -> Merge:
    """The method on one tensor.

    Raises:
        ValueError: if the weights sum to zero with `normalize`.
    """
    return _Average(job)


class _Average:
    settle = staticmethod(no_second_look)

    def __init__(self, job: Job) -> None:
        total = sum(job.weights) if job.normalize else 1.0
        if abs(total) < 1e-8:
            raise ValueError(
                f"The weights of '{job.name}' sum to {total:g}, so there is no average; give other weights or set "
                f"normalize to false."
            )
        self._job, self._total = job, total

    def chunk(self, start: int, stop: int) -> Tensor:
        """The averaged elements."""
        job = self._job
        total = job.workspace.get("total", stop - start)
        present = job.present()
        for k in present:
            value = job.read_delta(k, None, start, stop)
            torch.mul(value, job.weights[k], out=total) if k == present[0] else total.add_(value, alpha=job.weights[k])
        if not present:
            return total.zero_()
        return total if self._total == 1.0 else total.div_(self._total)
