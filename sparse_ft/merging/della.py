"""DELLA: drop entries of each delta at random, small ones more often, then elect signs (or add: `della_linear`).

    rho_i = (rank of |delta_i| in its row - 1) / (row length - 1)      0 for the smallest, 1 for the largest; 1/2 alone
    pi_i  = (d - epsilon) + 2 epsilon rho_i                            probability to be kept, d on average
    keep_i ~ Bernoulli(pi_i)
    paper:    delta_i' = keep_i delta_i / pi_i                         unbiased for every entry
    mergekit: delta'   = keep delta * ||delta||_1 / ||keep delta||_1   per tensor

A tensor of one dimension is one row; equal entries rank by position. The authors' `window_size` is 2 epsilon.

Source: Deep, Bhardwaj, Poria 2024, DELLA-Merging, arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, keep_, operands, run_in_memory
from sparse_ft.merging.consensus import l1_scales, merge_deltas
from sparse_ft.merging.families import check_window
from sparse_ft.merging.plan import Compatibility


def keep_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The probability with which DELLA keeps each entry.

    Args:
        delta: (..., row), any shape.
        density: their mean d.
        epsilon: half the distance between the smallest and the largest.

    Returns:
        fp64, of the shape of `delta`.

    Raises:
        ValueError: if a probability would lie outside 0..1.

    Example:
        >>> keep_probabilities(torch.tensor([1.0, -3.0, 2.0]), 0.5, 0.2)
        tensor([0.3000, 0.7000, 0.5000], dtype=torch.float64)
    """
    check_window(density, epsilon, "DELLA")
    sizes = delta.detach().float().abs().reshape(-1).numpy()
    row = delta.shape[-1] if delta.ndim else 1
    return torch.from_numpy(_probabilities(sizes, max(row, 1), density, epsilon)).view(delta.shape)


def della(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    epsilons: Sequence[float], uniforms: Sequence[Tensor], *, elect: bool = True, normalize: bool = True,
    rescale: bool = True, lam: float = 1.0, compatibility: Compatibility = "paper",
) -> Tensor:  # fmt: skip
    """Merge deltas of which small entries were dropped more often than large ones.

    Args:
        base: W_0, any float dtype.
        tensors: W_k, of the same shape.
        weights: w_k.
        densities: d_k; with 1 the delta is left whole.
        epsilons: half the width of the window of probabilities.
        uniforms: numbers from [0, 1), of the same shape: an entry is kept if its number is below its probability.
        elect: merge by elected signs (`della`), else sum (`della_linear`, whose default for `normalize` is False).
        normalize: divide by the sum of the weights (of those that agree).
        rescale: make up for what was dropped.
        lam: factor on the merged delta.
        compatibility: whose rescaling and election.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ, a probability lies outside 0..1, or a value is not finite.

    Example:
        >>> delta, numbers = torch.tensor([1.0, 3.0]), torch.tensor([0.4, 0.4])
        >>> della(torch.zeros(2), [delta], [1], [0.5], [0.25], [numbers])
        tensor([0., 4.])
    """
    flat = [numbers.reshape(-1).double().numpy() for numbers in uniforms]
    job = Job(
        "tensor", tuple(base.shape), MemoryOperand(base), operands(tensors, base.shape), weights=list(weights),
        densities=list(densities), epsilons=list(epsilons), normalize=normalize, rescale=rescale, lam=lam,
        compatibility=compatibility, draw=lambda k, start, stop: flat[k][start:stop], by_rows=True,
    )  # fmt: skip
    return run_in_memory(job, merge_della(job) if elect else merge_della_linear(job))


def merge_della(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, RankedDrop(job), elect=True)


def merge_della_linear(job: Job) -> Merge:
    """The method on one tensor, without an election."""
    return merge_deltas(job, RankedDrop(job), elect=False)


class RankedDrop:
    """Keeps each entry with a probability that grows with its rank in the row; chunks are whole rows."""

    def __init__(self, job: Job) -> None:
        if not job.by_rows:
            raise ValueError("DELLA ranks whole rows; the job must be read by rows.")
        for k in job.present():
            check_window(job.densities[k], job.epsilons[k], f"'{job.name}'")
        self._job = job
        self._per_entry = job.rescale and job.compatibility == "paper"
        self.scales: Sequence[float] = [1.0] * len(job.models)
        if job.rescale and not self._per_entry:
            self.scales = l1_scales(job, self)

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Drop entries of delta k and, in the paper's form, scale up each of the rest."""
        job, density = self._job, self._job.densities[k]
        if density >= 1.0:
            return
        if density <= 0.0:
            delta.zero_()
            return
        assert job.draw is not None
        sizes = torch.abs(delta, out=job.workspace.get("sizes", stop - start)).numpy()
        probabilities = _probabilities(sizes, job.row, density, job.epsilons[k])
        if self._per_entry:
            delta.div_(torch.from_numpy(probabilities.astype(np.float32)))
        keep_(delta, job.draw(k, start, stop) < probabilities)


def _probabilities(sizes: NDArray[np.float32], row: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """Keep probabilities of whole rows, flat."""
    if row == 1:
        return np.full(len(sizes), density)
    # Bits of a positive float order as the float does; below them the position, so one unstable sort is stable.
    keys = sizes.view(np.uint32).astype(np.uint64).reshape(-1, row)
    keys <<= np.uint64(32)
    keys |= np.arange(row, dtype=np.uint64)
    keys.sort(axis=-1)
    keys &= np.uint64(0xFFFFFFFF)
    ladder = (density - epsilon) + 2 * epsilon * (np.arange(row) / (row - 1))
    probabilities = np.empty(keys.shape)
    np.put_along_axis(probabilities, keys.astype(np.int64), np.broadcast_to(ladder, keys.shape), axis=-1)
    return probabilities.reshape(-1)
