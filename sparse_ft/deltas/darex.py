"""DAREx-q: the divisor of a randomly pruned delta, found by a coarse-to-fine search instead of taken as the density.

    weight = base + kept * delta / q        q from argmax f(q), density <= q <= high

f is anything to be made large: a metric on labelled data (1/q_v in the paper) or, without labels, minus the change of
the model's outputs (1/q_e); `darex_objectives.py` makes both. The first point of every search is DARE itself, so on f
the result is never below it. One scale serves the whole model (`search_scale`, the authors' advice for decoders), or
each tensor has its own: along the one-parameter family of an analytic form (`search_eta`), or one group of tensors
after the other (`search_scales_per_layer`).

Example:
    >>> found = search_scale(lambda q: -abs(q - 0.04), density=0.01)
    >>> round(found.scale, 3)
    0.04

Limits: f should be measured on other masks than those the result is used with; a metric of few values has ties, of
which the first, nearest to DARE, wins.

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, section 4.1 and its search algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.random_mask import check_density

_SAME = 1e-6  # grid points closer than this share of a step are one point reached in two ways


@dataclass(frozen=True)
class ScaleSearch:
    """What a search found.

    Attributes:
        scale: the q (or the parameter) with the highest score.
        score: its score.
        scores: score of every value tried, in the order they were tried.
    """

    scale: float
    score: float
    scores: dict[float, float]


@dataclass(frozen=True)
class LayerScaleSearch:
    """What a search for one scale per tensor found.

    Attributes:
        scales: q by tensor name.
        score: their score.
        dare_score: score with q = density everywhere; never above `score`.
        evaluations: how often the objective was called.
    """

    scales: dict[str, float]
    score: float
    dare_score: float
    evaluations: int


def search_scale(
    objective: Callable[[float], float],
    *,
    density: float,
    high: float | None = None,
    step: float | None = None,
    decay: float = 0.1,
    patience: int = 3,
) -> ScaleSearch:
    """Find the one scale q with the highest objective, coarse grid first, then a fine one around its best point.

    The coarse grid is density + i * step up to and including `high`; the fine one has the spacing step * decay between
    the neighbours of the best coarse point. Both ascend and end after patience + 1 misses in a row.

    Args:
        objective: q -> score, higher is better; NaN counts as minus infinity. Called once per q, the density first.
        density: share of entries kept, above 0 and up to 1: the scale of DARE, where the search starts.
        high: largest q tried; None = 10 * density, at most 1. More than 1 is allowed.
        step: coarse spacing; None = 5/9 of the range, the published grid at density 0.01.
        decay: fine spacing as a share of the coarse one, in (0, 1).
        patience: misses in a row that a pass forgives.

    Returns:
        The best q of both passes, of equal ones the first tried, with all scores.

    Raises:
        ValueError: density 0 or outside 0..1, high below density, a step, decay or patience out of range.

    Example:
        >>> search_scale(lambda q: accuracy_at(q), density=0.01, high=0.1, step=0.05)

    Source: arXiv 2410.09344, section 4.1; the fine grid is that of the authors' encoder experiments.
    """
    density = check_density(density)
    if density == 0.0:
        raise ValueError("density is 0: nothing is kept, so there is no scale to search; use a density above 0.")
    high = min(1.0, 10 * density) if high is None else high
    step = max((high - density) * 5 / 9, _SAME) if step is None else step
    return search_grid(objective, low=density, high=high, step=step, decay=decay, patience=patience)


def search_grid(
    objective: Callable[[float], float], *, low: float, high: float, step: float, decay: float = 0.1, patience: int = 3
) -> ScaleSearch:
    """The search of `search_scale` for any positive parameter between `low` and `high`.

    Args:
        objective: value -> score, higher is better; NaN counts as minus infinity.
        low: first value tried, above 0.
        high: largest value tried, at least `low`.
        step: coarse spacing.
        decay: fine spacing as a share of the coarse one, in (0, 1).
        patience: misses in a row that a pass forgives.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> search_grid(lambda eta: -(eta - 0.3) ** 2, low=0.1, high=0.5, step=0.1).scale
        0.30000000000000004
    """
    check_scale(low)
    if not low <= high < math.inf:
        raise ValueError(f"The search runs from {low:g} to {high:g}; high must be at least the start and finite.")
    if not 0 < step < math.inf or not 0 < decay < 1 or patience < 0:
        raise ValueError(
            f"step is {step:g}, decay {decay:g} and patience {patience}; step must be positive, decay lie between 0 "
            "and 1, and patience be at least 0."
        )
    scores: dict[float, float] = {}
    _scan(objective, _coarse_grid(low, high, step), scores, patience, step * decay * _SAME)
    best = max(scores, key=scores.__getitem__)
    _scan(objective, _fine_grid(best, low, high, step, decay), scores, patience, step * decay * _SAME)
    best = max(scores, key=scores.__getitem__)  # the first of equal ones
    return ScaleSearch(best, scores[best], scores)


def _coarse_grid(low: float, high: float, step: float) -> Iterator[float]:
    yield low
    for index in range(1, math.ceil((high - low) / step - _SAME)):
        yield low + index * step
    yield high


def _fine_grid(best: float, low: float, high: float, step: float, decay: float) -> Iterator[float]:
    spacing = step * decay
    start = max(low + spacing, best - step + spacing)
    for index in range(math.ceil((best + step - start) / spacing - _SAME)):
        value = start + index * spacing
        if value <= high + spacing * _SAME:
            yield min(value, high)


def _scan(
    objective: Callable[[float], float],
    grid: Iterable[float],
    scores: dict[float, float],
    patience: int,
    same: float,
) -> None:
    """Score the grid in its order into `scores` until more than `patience` points in a row were below the best."""
    best, misses = -math.inf, 0
    for value in grid:
        value = next((known for known in scores if abs(known - value) <= same), value)
        if value not in scores:
            score = float(objective(value))
            scores[value] = -math.inf if math.isnan(score) else score
        if scores[value] >= best:
            best, misses = scores[value], 0
        else:
            misses += 1
        if misses > patience:
            return


def search_eta(
    objective: Callable[[Mapping[str, float]], float],
    scales_at: Callable[[float], dict[str, float]],
    *,
    density: float,
    low: float = 0.1,
    high: float = 0.5,
    step: float = 0.1,
    decay: float = 0.1,
    patience: int = 3,
) -> LayerScaleSearch:
    """Find one scale per tensor along a family of one parameter, eta, by the same coarse-to-fine search.

    Args:
        objective: scales by tensor name -> score, higher is better.
        scales_at: eta -> scales, for instance `analytic_scales` of `darex_analytic.py` with eta left open.
        density: share of entries kept; the same scale for all is scored first, and wins unless some eta is better.
        low: first eta. Published ranges: 0.1 to 0.5 and 0.3 to 0.7, by steps of 0.1.
        high: last eta.
        step: coarse spacing of eta.
        decay: fine spacing as a share of the coarse one.
        patience: misses in a row that a pass forgives.

    Raises:
        ValueError: as `search_scale`.

    Example:
        >>> found = search_eta(objective, lambda eta: analytic_scales(rows, density=0.01, eta=eta), density=0.01)

    Source: arXiv 2410.09344, section 4.1, per-layer q.
    """
    density = check_density(density)
    at_low = scales_at(low)
    dare = dict.fromkeys(at_low, check_scale(density))
    dare_score = _number(objective(dare))
    found = search_grid(
        lambda eta: objective(at_low if eta == low else scales_at(eta)),
        low=low, high=high, step=step, decay=decay, patience=patience,
    )  # fmt: skip
    evaluations = len(found.scores) + 1
    if found.score > dare_score:
        return LayerScaleSearch(scales_at(found.scale), found.score, dare_score, evaluations)
    return LayerScaleSearch(dare, dare_score, dare_score, evaluations)


def search_scales_per_layer(
    objective: Callable[[Mapping[str, float]], float],
    groups: Mapping[str, Iterable[str]],
    *,
    density: float,
    start: float | None = None,
    high: float | None = None,
    step: float | None = None,
    decay: float = 0.1,
    patience: int = 3,
) -> LayerScaleSearch:
    """Find one scale per group of tensors by searching them in turn, once each, the others held where they are.

    Args:
        objective: scales by tensor name -> score, higher is better. Called some ten times per group.
        groups: tensor names by group, in the order of the search: one per block, or one per tensor.
        density: share of entries kept, the lowest scale.
        start: scale of the groups not searched yet, usually that of `search_scale`; None = density.
        high: as in `search_scale`.
        step: as in `search_scale`.
        decay: as in `search_scale`.
        patience: as in `search_scale`.

    Returns:
        Scales whose score is at least that of the start and of DARE.

    Raises:
        ValueError: no group, or as `search_scale`.

    Example:
        >>> blocks = {"layers.0": ["layers.0.up.weight", "layers.0.down.weight"], "layers.1": ["layers.1.up.weight"]}
        >>> found = search_scales_per_layer(objective, blocks, density=0.01, start=0.03)
    """
    density = check_density(density)
    members = {group: tuple(names) for group, names in groups.items()}
    names = [name for group in members.values() for name in group]
    if not names:
        raise ValueError("There are no tensors to scale; pass at least one group with one name.")
    scales = dict.fromkeys(names, check_scale(density))
    dare_score = score = _number(objective(scales))
    evaluations = 1
    if start is not None and start != density:
        started = dict.fromkeys(names, check_scale(start))
        start_score, evaluations = _number(objective(started)), 2
        if start_score > score:
            scales, score = started, start_score
    for group in members.values():
        here = {name: scales[name] for name in group}

        def with_group(q: float, group: tuple[str, ...] = group) -> float:
            return objective({**scales, **dict.fromkeys(group, q)})  # noqa: B023  (called within this turn only)

        found = search_scale(with_group, density=density, high=high, step=step, decay=decay, patience=patience)
        evaluations += len(found.scores)
        if found.score > score:
            here, score = dict.fromkeys(group, found.scale), found.score
        scales = {**scales, **here}
    return LayerScaleSearch(scales, score, dare_score, evaluations)


def _number(score: float) -> float:
    return -math.inf if math.isnan(score) else float(score)
