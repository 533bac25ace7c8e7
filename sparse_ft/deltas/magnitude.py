"""Magnitude pruning of a delta: keep its largest entries, unscaled.

    kept = the round(density * numel) entries with the largest |delta|        delta' = kept * delta

Counts are exact; of equal entries the one with the lower flat index is dropped first, as everywhere in
`sparse_ft.masks`.

Example:
    >>> magnitude_delta(torch.tensor([[0.1, -0.3], [0.2, 0.0]]), density=0.5)
    tensor([[ 0.0000, -0.3000],
            [ 0.2000,  0.0000]])

Limits: the largest entries are a biased sample, so their sum is already too large for their number. Dividing by the
density, as DARE does, multiplies what is already most of the delta; it is refused unless forced.

Source: the baseline of arXiv 2311.03099, section 4.4, and 2410.09344, section 5; the recommendation for large deltas is
the latter's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.deltas.checks import check_delta, check_scale, number_kept
from sparse_ft.deltas.random_mask import check_density
from sparse_ft.masks import keep_largest, keep_largest_per_row

#: Makes a fresh pass over (name, delta) pairs.
Tensors = Callable[[], Iterable[tuple[str, Tensor]]]

_LOW_BITS = 15  # of the 31 bits of |fp32|: the first pass counts by the upper 16, the second by these


@torch.no_grad()
def magnitude_keep(delta: Tensor, *, density: float, per: Literal["tensor", "row"] = "tensor") -> Tensor:
    """Bool mask (True = keep) of the entries with the largest |delta|.

    Args:
        delta: any shape; with per="row" (..., d), each row along the last dimension on its own.
        density: share kept, 0..1: exactly round(density * numel), or round(density * d) of every row.
        per: what is ranked together.

    Raises:
        ValueError: a density outside 0..1, another `per`, an integer tensor, or NaN or infinite entries.

    Example:
        >>> magnitude_keep(torch.tensor([1.0, -2.0]), density=0.5)
        tensor([False,  True])
    """
    density = check_density(density)
    if per not in ("tensor", "row"):
        raise ValueError(f"per is {per!r}; rank by 'tensor' or by 'row', or globally with `global_magnitude`.")
    check_delta(delta)
    scores = delta.detach().abs().float()
    if per == "tensor" or delta.ndim < 2:
        return keep_largest(scores, number_kept(delta.numel(), density))
    return keep_largest_per_row(scores, number_kept(delta.shape[-1], density))


@torch.no_grad()
def magnitude_delta(
    delta: Tensor,
    *,
    density: float,
    per: Literal["tensor", "row"] = "tensor",
    scale: float = 1.0,
    force_scale: bool = False,
) -> Tensor:
    """Keep the largest entries of a delta and set the others to zero.

    Args:
        delta: finetuned - base, any shape; (out, in) with per="row". Unchanged.
        density: share kept, 0..1.
        per: rank over the whole "tensor" or within every "row".
        scale: what kept entries are divided by; anything but 1 is refused without `force_scale`.
        force_scale: rescale all the same, as a control in an experiment.

    Returns:
        fp32 tensor of the shape of `delta`.

    Raises:
        ValueError: as `magnitude_keep`, or a scale that was not forced.

    Example:
        >>> magnitude_delta(torch.tensor([1.0, -2.0]), density=0.5)
        tensor([ 0., -2.])

    Source: arXiv 2311.03099, section 4.4; why no rescale: its appendix on magnitude with rescaling.
    """
    scale = check_scale(scale)
    if scale != 1.0 and not force_scale:
        raise ValueError(
            f"scale is {scale:g}, but dividing the largest entries of a delta by less than 1 overshoots the fine-tuned "
            "weights and ruins the model; leave scale at 1, use dare(), or pass force_scale=True for an experiment."
        )
    keep = magnitude_keep(delta, density=density, per=per)
    check_scale(scale, check_delta(delta))
    return torch.where(keep, delta.float() / torch.tensor(scale, device=delta.device), 0.0)


@dataclass(frozen=True)
class GlobalMagnitude:
    """Which entries of many deltas are the largest of all, as one threshold and exact counts of ties.

    Attributes:
        threshold: entries with a larger |delta| (fp32) are kept.
        ties: how many entries equal to the threshold are kept, by tensor name; those with the highest flat index.
        kept: number of entries kept in all.
        numel: number of entries in all.

    Example:
        >>> chosen = global_magnitude(lambda: deltas.items(), density=0.01)
        >>> chosen.keep(name, deltas[name])
    """

    threshold: float
    ties: Mapping[str, int]
    kept: int
    numel: int

    def keep(self, name: str, delta: Tensor) -> Tensor:
        """Bool mask of one of the deltas, True = keep.

        Raises:
            ValueError: if no tensor of this name was counted.
        """
        if name not in self.ties:
            raise ValueError(f"'{name}' was not among the {len(self.ties)} tensors the global threshold was found for.")
        scores = delta.detach().abs().float()
        keep = scores > self.threshold
        tied = (scores == self.threshold).reshape(-1).nonzero()[:, 0]
        keep.view(-1)[tied[len(tied) - self.ties[name] :]] = True
        return keep


def global_magnitude(tensors: Tensors, *, density: float) -> GlobalMagnitude:
    """Find the round(density * numel) largest entries of all tensors together in two passes, holding one at a time.

    The bits of a non-negative fp32 number, read as an integer, are in the order of the numbers. The first pass counts
    entries by their upper 16 bits, the second those of the bin that holds the threshold by the rest: exact, no sort.

    Args:
        tensors: called twice; makes a pass over (name, delta) pairs with distinct names, in any order. The result does
            not depend on the order: of equal entries those with the lowest (name, flat index) are dropped first.
        density: share of all entries kept, 0..1.

    Raises:
        ValueError: no tensor, a name that comes twice, a density outside 0..1, an integer tensor, NaN or infinite
            entries, or a second pass that differs from the first.

    Example:
        >>> deltas = {"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([2.0])}
        >>> global_magnitude(lambda: deltas.items(), density=1 / 3).keep("a", deltas["a"])
        tensor([False,  True])
    """
    density = check_density(density)
    coarse = np.zeros(1 << (31 - _LOW_BITS), dtype=np.int64)
    names: set[str] = set()
    for name, delta in tensors():
        if name in names:
            raise ValueError(f"'{name}' comes twice in the tensors; each name is ranked once.")
        names.add(name)
        check_delta(delta, name)
        coarse += np.bincount(_bits(delta) >> _LOW_BITS, minlength=len(coarse))
    if not names:
        raise ValueError("There are no tensors to rank; select at least one.")
    numel = int(coarse.sum())
    kept = number_kept(numel, density)
    if kept == 0:
        return GlobalMagnitude(float("inf"), dict.fromkeys(names, 0), 0, numel)
    bin_, above = _bin_of(coarse, kept)
    inside: dict[str, NDArray[np.int64]] = {}
    fine = np.zeros(1 << _LOW_BITS, dtype=np.int64)
    for name, delta in tensors():
        bits = _bits(delta)
        low = bits[bits >> _LOW_BITS == bin_] & ((1 << _LOW_BITS) - 1)
        values, counts = np.unique(low, return_counts=True)
        fine[values] += counts
        inside[name] = np.stack([values, counts])
    if inside.keys() != names or int(fine.sum()) != int(coarse[bin_]):
        raise ValueError("The second pass over the tensors differs from the first; `tensors` must give the same again.")
    low_bits, more = _bin_of(fine, kept - above)
    threshold = np.array([(bin_ << _LOW_BITS) | low_bits], dtype=np.int32).view(np.float32)[0]
    return GlobalMagnitude(float(threshold), _ties(inside, low_bits, kept - above - more), kept, numel)


def _bits(delta: Tensor) -> NDArray[np.int32]:
    """|delta| as integers of the same order, flat."""
    return delta.detach().abs().float().reshape(-1).cpu().contiguous().view(torch.int32).numpy()


def _bin_of(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin that holds the entry of this rank (1 = largest), and how many entries lie in higher bins."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place] - counts[::-1][place])


def _ties(inside: Mapping[str, NDArray[np.int64]], low_bits: int, wanted: int) -> dict[str, int]:
    """Give `wanted` places to the entries equal to the threshold, from the last name backwards."""
    places = {}
    for name in sorted(inside, reverse=True):
        values, counts = inside[name]
        places[name] = min(wanted, int(counts[values == low_bits].sum()))
        wanted -= places[name]
    return places
