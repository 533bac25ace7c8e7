"""DARE: drop entries of each delta at random, scale up the rest, then add (`dare_linear`) or elect signs (`dare_ties`).

    keep_k ~ Bernoulli(d_k) per entry
    paper:    delta_k' = keep_k * delta_k / d_k
    mergekit: delta_k' = keep_k * delta_k * ||delta_k||_1 / ||keep_k * delta_k||_1      per tensor
    DAREx-q:  delta_k' = keep_k * delta_k / q_k                                         with a searched q_k >= d_k

The two rescalings agree in expectation. Each mask depends on the seed, the model's label, the tensor's name and the
position only (`deltas.random_keep`), so it is the same for any file layout and order; mergekit's own draws come from
one global generator and cannot be had again.

Sources: Yu et al. 2024, Language Models are Super Mario, arXiv 2311.03099; Deng et al. 2025, DARE the Extreme,
arXiv 2410.09344, for q.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, operands, run_in_memory
from sparse_ft.merging.consensus import Masking, l1_scales, merge_deltas
from sparse_ft.merging.plan import Compatibility


def dare_linear(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    masks: Sequence[Tensor], *, rescale: bool = True, normalize: bool = False, lam: float = 1.0,
    compatibility: Compatibility = "paper",
) -> Tensor:  # fmt: skip
    """Sum of randomly dropped and rescaled deltas.

    Args:
        base: W_0, any float dtype.
        tensors: W_k, of the same shape.
        weights: w_k.
        densities: d_k, the probability with which an entry was kept.
        masks: bool, True = keep, of the same shape; not looked at where d_k is 1.
        rescale: scale up what is kept.
        normalize: divide by the sum of the weights.
        lam: factor on the merged delta.
        compatibility: which rescaling.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ or a value is not finite.

    Example:
        >>> keep = torch.tensor([True, False])
        >>> dare_linear(torch.zeros(2), [torch.ones(2)], [1], [0.5], [keep])
        tensor([2., 0.])
    """
    job = _job(base, tensors, weights, densities, masks, rescale, normalize, lam, compatibility)
    return run_in_memory(job, merge_dare_linear(job))


def dare_ties(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    masks: Sequence[Tensor], *, rescale: bool = True, normalize: bool = True, lam: float = 1.0,
    compatibility: Compatibility = "paper",
) -> Tensor:  # fmt: skip
    """Randomly dropped and rescaled deltas, merged where they agree with the elected sign (see `ties`).

    Args and errors are those of `dare_linear`; mergekit's default for `normalize` is False.

    Example:
        >>> keep = [torch.tensor([True, True]), torch.tensor([True, False])]
        >>> dare_ties(torch.zeros(2), [torch.ones(2), -torch.ones(2) / 2], [1, 1], [1, 0.5], keep)
        tensor([1., 1.])
    """
    job = _job(base, tensors, weights, densities, masks, rescale, normalize, lam, compatibility)
    return run_in_memory(job, merge_dare_ties(job))


def darex_q(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    masks: Sequence[Tensor], scales: Sequence[float], *, normalize: bool = False, lam: float = 1.0,
) -> Tensor:  # fmt: skip
    """`dare_linear` with the kept entries divided by a q of each model, not by its density.

    Args:
        scales: q_k > 0, from a search on the user's data; q_k = d_k is DARE.

    The other arguments are those of `dare_linear`.

    Example:
        >>> darex_q(torch.zeros(2), [torch.ones(2)], [1], [0.1], [torch.tensor([True, False])], [0.25])
        tensor([4., 0.])
    """
    job = _job(base, tensors, weights, densities, masks, True, normalize, lam, "paper", scales)
    return run_in_memory(job, merge_darex_q(job))


def merge_dare_linear(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, RandomDrop(job), elect=False)


def merge_dare_ties(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, RandomDrop(job), elect=True)


def merge_darex_q(job: Job) -> Merge:
    """The method on one tensor.

    Raises:
        ValueError: if a q is missing or not positive.
    """
    if len(job.scales) != len(job.models) or any(not q > 0 for q in job.scales):
        raise ValueError(f"darex_q divides by a q > 0 of each model, got {list(job.scales)} for '{job.name}'.")
    drop = RandomDrop(job)
    drop.scales = [1.0 / q for q in job.scales]
    return merge_deltas(job, drop, elect=False)


class RandomDrop(Masking):
    """Keep masks from `job.draw`, and the factor that makes up for them."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.rescale and job.compatibility == "paper":
            self.scales = [1.0 / d if 0.0 < d < 1.0 else 1.0 for d in job.densities]
        elif job.rescale:
            self.scales = l1_scales(job, self)

    def keep(self, k: int, start: int, stop: int, out: NDArray[np.uint8]) -> bool:
        """The random mask of model k."""
        density = self._job.densities[k]
        if 0.0 < density < 1.0:
            assert self._job.draw is not None
            out[:] = self._job.draw(k, start, stop)
        elif density <= 0.0:
            out[:] = 0
        return density < 1.0


def _job(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float],
    masks: Sequence[Tensor], rescale: bool, normalize: bool, lam: float, compatibility: Compatibility,
    scales: Sequence[float] = (),
) -> Job:  # fmt: skip
    flat = [mask.reshape(-1).bool().numpy() for mask in masks]
    return Job(
        "tensor", tuple(base.shape), MemoryOperand(base), operands(tensors, base.shape), weights=list(weights),
        densities=list(densities), scales=list(scales), rescale=rescale, normalize=normalize, lam=lam,
        compatibility=compatibility, draw=lambda k, start, stop: flat[k][start:stop],
    )  # fmt: skip
