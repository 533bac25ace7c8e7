"""Random pruning, the sanity floor: the scores are uniform noise keyed by (seed, tensor name), the counts are exact.

Example:
    >>> random_mask((4, 8), "layers.0.q_proj.weight", 0, sparsity=0.5).sum()
    tensor(16)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.masks import Pattern
from sparse_ft.pruning.selection import keep_scores


def named_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator whose stream depends on `seed` and `name` only: the same for any order, shard, rank or device."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    # torch's CPU generator uses the low 32 bits of a seed, whatever its size.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def random_scores(shape: Sequence[int], name: str, seed: int) -> Tensor:
    """Uniform scores in [0, 1), fp32 on the CPU, of `shape`, keyed by (seed, name)."""
    return torch.rand(tuple(shape), generator=named_generator(seed, name))


def random_mask(
    shape: Sequence[int],
    name: str,
    seed: int,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    removed: int | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Random bool mask (True = keep) with exact counts, on the CPU.

    Args:
        shape: (..., d) with the input dimension last.
        name: canonical parameter name; different names give independent masks.
        seed: any int.
        pattern: `"unstructured"` or `"n:m"` (n kept of m).
        sparsity: share removed; exactly round(sparsity * numel) entries go.
        removed: exact number of entries to remove instead of `sparsity`; unstructured only.
        inside: bool, an older mask of this shape; what it removed stays removed.

    Raises:
        ValueError: invalid pattern, sparsity or count, or no such mask inside the older one.
    """
    scores = random_scores(shape, name, seed)
    return keep_scores(scores, pattern=pattern, sparsity=sparsity, removed=removed, inside=inside)
