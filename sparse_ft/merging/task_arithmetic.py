"""Task arithmetic: add weighted differences to the base.

    W = W_0 + lambda * sum_k w_k (W_k - W_0)        divided by sum_k w_k if `normalize` (by 1 if that is zero)

Source: Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparse_ft.merging.chunks import Job, MemoryOperand, Merge, operands, run_in_memory
from sparse_ft.merging.consensus import Masking, merge_deltas


def task_arithmetic(
    base: Tensor, tensors: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = False, lam: float = 1.0
) -> Tensor:
    """Add the weighted deltas of fine-tunes to their base.

    Args:
        base: W_0, any float dtype.
        tensors: W_k, of the same shape.
        weights: w_k.
        normalize: divide by the sum of the weights.
        lam: factor on the merged delta.

    Returns:
        fp32, of the same shape.

    Raises:
        ValueError: if shapes differ or a value is not finite.

    Example:
        >>> task_arithmetic(torch.tensor([1.0]), [torch.tensor([2.0]), torch.tensor([0.5])], [1, 1])
        tensor([1.5000])
    """
    job = Job(
        "tensor", tuple(base.shape), MemoryOperand(base), operands(tensors, base.shape), weights=list(weights),
        normalize=normalize, lam=lam,
    )  # fmt: skip
    return run_in_memory(job, merge_task_arithmetic(job))


def merge_task_arithmetic(job: Job) -> Merge:
    """The method on one tensor."""
    return merge_deltas(job, Masking(job), elect=False)
