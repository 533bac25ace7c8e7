"""How many weights each tensor loses for a given total sparsity: uniform, global magnitude with a floor, ERK.

Every function returns {name: number of weights REMOVED} and depends on the names, not on the order of the mapping.

Example:
    >>> removed = erk({"k_proj": (64, 64), "up_proj": (256, 64)}, 0.5)
    >>> sum(removed.values())
    10240

Source: ERK: Mocanu et al. 2018 (Erdos-Renyi) and Evci et al. 2020, "Rigging the Lottery", section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.masks import Pattern, check_sparsity

_CHUNK = 1 << 22  # weights looked at together: bounds the temporaries and stays in cache
_INFINITY = 0x7F80  # upper 16 bits of fp32 infinity; NaNs lie above


def uniform(counts: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The same sparsity everywhere: round(sparsity * N_l) removed from each tensor of N_l weights.

    Args:
        counts: number of weights of each tensor.
        sparsity: share removed.

    Raises:
        ValueError: invalid sparsity or empty `counts`.
    """
    share = _check_request(counts, sparsity)
    return {name: round(share * count) for name, count in counts.items()}


def global_magnitude(weights: Mapping[str, Tensor], sparsity: float, *, min_keep: float = 0.0005) -> dict[str, int]:
    """One |W| threshold over all tensors, with at least K = int(N_total * min_keep) weights kept in each.

    Args:
        weights: tensors by name. Each is read three times, one at a time: a lazy mapping over a checkpoint works.
        sparsity: share removed of all weights together; exactly round(sparsity * N_total) go. Of equal magnitudes at
            the threshold the tensors first in name order lose theirs first.
        min_keep: floor per tensor as a share of ALL weights. Tensors smaller than K stay dense; where the floor binds,
            the sparsities of the others are scaled up by a common factor. 0 switches the floor off.

    Raises:
        ValueError: invalid sparsity or min_keep, NaN/Inf weights, or floors that leave too few weights to remove.
    """
    share = _check_request(weights, sparsity)
    check_min_keep(min_keep)
    counts: dict[str, int] = {}
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for name in sorted(weights):
        weight = weights[name]
        counts[name] = weight.numel()
        histogram += _histogram(name, weight)
    total = sum(counts.values())
    target, floor = round(share * total), int(total * min_keep)
    capacity = {name: count - floor if count >= floor else 0 for name, count in counts.items()}
    if sum(capacity.values()) < target:
        raise ValueError(
            f"Sparsity {share:g} removes {target} weights but keeping {floor} in each of {len(counts)} tensors leaves "
            f"{sum(capacity.values())} to remove; lower the sparsity or min_keep."
        )
    below = _count_below_threshold(weights, list(counts), histogram, target)
    return _respect_capacity(below, capacity, counts, target)


def erk(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, int]:
    """Erdos-Renyi-Kernel: density of an (o, d) tensor proportional to (o + d) / (o * d), capped at 1.

    Args:
        shapes: (..., o, d) shapes by name; leading dimensions (experts) count as so many separate matrices.
        sparsity: share removed of all weights together; exactly round(sparsity * N_total) go.

    Raises:
        ValueError: invalid sparsity, empty `shapes` or a shape with fewer than two dimensions.
    """
    share = _check_request(shapes, sparsity)
    for name, shape in shapes.items():
        if len(shape) < 2:
            raise ValueError(f"'{name}' has shape {tuple(shape)} but ERK needs (out, in); leave 1-D tensors out.")
    counts = {name: math.prod(shapes[name]) for name in sorted(shapes)}
    # kept_l = epsilon * (o + d) / (o * d) * N_l; a tensor that would keep more than it has stays dense.
    relative = {name: math.prod(shapes[name][:-2]) * sum(shapes[name][-2:]) for name in counts}
    kept_total = sum(counts.values()) - round(share * sum(counts.values()))
    kept = _proportional(relative, counts, counts, kept_total)
    return {name: counts[name] - kept[name] for name in shapes}


def check_min_keep(min_keep: float) -> None:
    """Check the floor of `global_magnitude`.

    Raises:
        ValueError: if it is outside [0, 1).
    """
    if not 0 <= min_keep < 1:
        raise ValueError(
            f"min_keep is {min_keep} but must lie in [0, 1); 0.0005 keeps 0.05% of all weights per tensor."
        )


def _check_request(tensors: Mapping[str, object], sparsity: float) -> float:
    if not tensors:
        raise ValueError("There is no tensor to share the sparsity among; name at least one.")
    return check_sparsity(Pattern(), sparsity)


def _magnitude_bits(weight: Tensor) -> Iterator[Tensor]:
    """|W| in chunks as int32; the bits of non-negative fp32 numbers order as the numbers do."""
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        yield chunk.abs().float().view(torch.int32)


def _histogram(name: str, weight: Tensor, high: int | None = None) -> Tensor:
    """Count for each value of the upper 16 bits of |W|, or of the lower 16 bits where the upper ones are `high`."""
    histogram = torch.zeros(1 << 16, dtype=torch.int64)
    for bits in _magnitude_bits(weight):
        digit = bits >> 16 if high is None else bits[bits >> 16 == high] & 0xFFFF
        histogram += torch.bincount(digit, minlength=1 << 16).cpu()
    if high is None and bool(histogram[_INFINITY:].any()):
        raise ValueError(f"'{name}' contains NaN or infinite weights; repair the checkpoint before pruning.")
    return histogram


def _count_below_threshold(
    weights: Mapping[str, Tensor], names: Sequence[str], histogram: Tensor, target: int
) -> dict[str, int]:
    """How many of the `target` globally smallest |W| lie in each tensor: radix selection in two digits of 16 bits.

    Args:
        weights: tensors by name.
        names: the order in which equal magnitudes go.
        histogram: of the upper 16 bits over all tensors.
        target: how many go in total.
    """
    if target == 0:
        return dict.fromkeys(names, 0)
    high, rank = _select(histogram, target)
    inside = torch.zeros_like(histogram)
    for name in names:
        inside += _histogram(name, weights[name], high)
    low, ties = _select(inside, rank)
    threshold, below = high << 16 | low, {}
    for name in names:
        smaller, tied = 0, 0
        for bits in _magnitude_bits(weights[name]):
            smaller += int((bits < threshold).sum())
            tied += int((bits == threshold).sum())
        tied = min(ties, tied)
        ties -= tied
        below[name] = smaller + tied
    return below


def _select(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Bin that holds the element of 1-based `rank`, and its rank among the elements of that bin."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, rank))
    return index, rank - int(cumulative[index] - histogram[index])


def _respect_capacity(
    below: dict[str, int], capacity: dict[str, int], counts: dict[str, int], target: int
) -> dict[str, int]:
    """The counts a single threshold gives, or their nearest multiple when some exceed what may be removed."""
    if all(below[name] <= capacity[name] for name in below):
        return below
    return _proportional(below, capacity, counts, target)


def _proportional(
    amounts: Mapping[str, int], capacity: Mapping[str, int], fallback: Mapping[str, int], total: int
) -> dict[str, int]:
    """Integers that sum to `total`, proportional to `amounts` where they do not reach their `capacity`.

    Tensors that would exceed their capacity get exactly it, and the rest is shared again among the others. If those
    have no amounts left, `fallback` takes their place.
    """
    full: dict[str, int] = {}
    while True:
        free = {name: amount for name, amount in amounts.items() if name not in full}
        if not any(free.values()):
            free = {name: fallback[name] for name in free}
        rest, scale = total - sum(full.values()), sum(free.values())
        # Integer arithmetic: amount * rest / scale > capacity, without a rounding error at the boundary.
        over = [name for name, amount in free.items() if amount * rest > capacity[name] * scale]
        if not over:
            break
        full.update({name: capacity[name] for name in over})
    shares = {name: divmod(amount * rest, scale) for name, amount in free.items()}
    result = full | {name: quotient for name, (quotient, _) in shares.items()}
    # Largest remainders get the units that rounding down left over; each has room, because it has a remainder.
    for name in sorted(shares, key=lambda name: (-shares[name][1], name))[: total - sum(result.values())]:
        result[name] += 1
    return result
