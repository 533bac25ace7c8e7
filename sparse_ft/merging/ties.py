"""TIES: trim each delta to its largest entries, elect a sign per entry, merge the deltas that agree with it.

    trim    delta_k' = the d_k n largest |delta_k| of the tensor        (ties: lowest flat index first)
    elect   s = sign(sum_k delta_k')                                    paper; zero takes the sign that prevails
            s = sign(sum_k w_k delta_k')                                mergekit; zero takes +1
    merge   W = W_0 + lambda * sum_{k: sign = s} w_k delta_k' / sum_{k: sign = s} w_k

The paper has no weights and divides by the number of deltas that agree: the same with equal weights. It trims the model
as one vector, which `trim: model` of a configuration does; by default each tensor is trimmed, as in every
implementation in use. paper: round(d n) entries are kept; mergekit: max(1, int(d n)).

Source: Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, section 3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, operands, run_in_memory
from sparse_ft.merging.consensus import Masking, l1_scales, merge_deltas
from sparse_ft.merging.plan import Compatibility
from sparse_ft.merging.thresholds import Wanted, find_cuts


def ties(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], densities: Sequence[float], *,
    normalize: bool = True, rescale: bool = False, lam: float = 1.0, compatibility: Compatibility = "paper",
) -> Tensor:  # fmt: skip
    """Merge fine-tunes of one base by trimming, electing signs and averaging.

    Args:
        base: W_0, any float dtype.
        tensors: W_k, of the same shape.
        weights: w_k.
        densities: d_k, the share of each delta that is kept.
        normalize: divide by the weights of those that agree; without it their sum is taken.
        rescale: scale what is kept to the L1 norm of the whole delta (a choice of mergekit's, harmful in the papers).
        lam: factor on the merged delta.
        compatibility: whose trim and election.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ or a value is not finite.

    Example:
        >>> ties(torch.zeros(3), [torch.tensor([3.0, 1.0, -2.0]), torch.tensor([1.0, 0.5, 4.0])], [1, 1], [1, 1])
        tensor([2.0000, 0.7500, 4.0000])
    """
    job = Job(
        "tensor", tuple(base.shape), MemoryOperand(base), operands(tensors, base.shape), weights=list(weights),
        densities=list(densities), normalize=normalize, rescale=rescale, lam=lam, compatibility=compatibility,
    )  # fmt: skip
    return run_in_memory(job, merge_ties(job))


def merge_ties(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, MagnitudeTrim(job), elect=True)


class MagnitudeTrim(Masking):
    """Keeps the largest entries of each delta, exactly as many as asked for."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        trimmed = [k for k in job.present() if job.densities[k] < 1.0]
        cuts = find_cuts(job, [Wanted(k, self._count(job.densities[k]), True) for k in trimmed])
        self.cuts = dict(zip(trimmed, cuts, strict=True))
        if job.rescale:
            self.scales = l1_scales(job, self)

    def _count(self, density: float) -> int:
        if self._job.compatibility == "mergekit":
            return min(max(1, int(density * self._job.numel)), self._job.numel)
        return round(density * self._job.numel)
