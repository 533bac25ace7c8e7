"""Model Breadcrumbs: drop the largest and the smallest entries of each delta, keep the middle.

    n_top = int(gamma_k n),  n_keep = int(d_k n),  n_bottom = max(0, n - n_keep - n_top)
    delta_k' = the entries n_bottom .. n_bottom + n_keep of the ascending order of |delta_k|, equal ones by index

then added (`breadcrumbs`) or merged by elected signs as in TIES (`breadcrumbs_ties`). Nothing is rescaled.

Source: Davari and Belilovsky 2024, Model Breadcrumbs, arXiv 2312.06795.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, keep_, operands, run_in_memory
from sparse_ft.merging.consensus import l1_scales, merge_deltas
from sparse_ft.merging.plan import Compatibility
from sparse_ft.merging.thresholds import Wanted, find_cuts


def breadcrumbs(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    gammas: Sequence[float], *, elect: bool = False, normalize: bool = False, rescale: bool = False, lam: float = 1.0,
    compatibility: Compatibility = "paper",
) -> Tensor:  # fmt: skip
    """Merge deltas without their outliers and without their smallest entries.

    Args:
        base: W_0, any float dtype.
        tensors: W_k, of the same shape.
        weights: w_k.
        densities: d_k, the share of each delta that is kept; with 1 the delta is left whole.
        gammas: share of the largest entries that is dropped.
        elect: merge by elected signs (`breadcrumbs_ties`).
        normalize: divide by the sum of the weights (of those that agree).
        rescale: scale what is kept to the L1 norm of the whole delta.
        lam: factor on the merged delta.
        compatibility: whose election.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ or a value is not finite.

    Example:
        >>> breadcrumbs(torch.zeros(4), [torch.tensor([9.0, 3.0, 2.0, 1.0])], [1], [0.5], [0.25])
        tensor([0., 3., 2., 0.])
    """
    job = Job(
        "tensor", tuple(base.shape), MemoryOperand(base), operands(tensors, base.shape), weights=list(weights),
        densities=list(densities), gammas=list(gammas), normalize=normalize, rescale=rescale, lam=lam,
        compatibility=compatibility,
    )  # fmt: skip
    return run_in_memory(job, merge_breadcrumbs_ties(job) if elect else merge_breadcrumbs(job))


def merge_breadcrumbs(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, MiddleOnly(job), elect=False)


def merge_breadcrumbs_ties(job: Job) -> Merge:
    """The method on one tensor, with elected signs."""
    return merge_deltas(job, MiddleOnly(job), elect=True)


class MiddleOnly:
    """Keeps the entries between two ranks of each delta."""

    def __init__(self, job: Job) -> None:
        self._job, n = job, job.numel
        self._cut_models = [k for k in job.present() if job.densities[k] < 1.0]
        wanted = []
        for k in self._cut_models:
            keep = int(job.densities[k] * n)
            bottom = max(0, n - keep - int(job.gammas[k] * n))
            wanted += [Wanted(k, bottom, False), Wanted(k, bottom + keep, False)]
        cuts = find_cuts(job, wanted)
        self._cuts = {k: cuts[2 * i : 2 * i + 2] for i, k in enumerate(self._cut_models)}
        self.scales: Sequence[float] = [1.0] * len(job.models)
        if job.rescale:
            self.scales = l1_scales(job, self)

    def __call__(self, k: int, delta: Tensor, start: int, stop: int) -> None:
        """Zero both ends of delta k."""
        if k not in self._cuts:
            return
        sizes = torch.abs(delta, out=self._job.workspace.get("sizes", stop - start)).numpy()
        dropped, keep = (self._job.workspace.bools(name, stop - start) for name in ("lower", "inside"))
        below, upper = self._cuts[k]
        below.smallest(sizes, start, dropped)
        upper.smallest(sizes, start, keep)
        # What is below the lower cut is below the upper one too.
        keep_(delta, np.not_equal(dropped, keep, out=keep))
