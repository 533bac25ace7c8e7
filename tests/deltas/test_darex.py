"""The search for a scale: the published grid and stops, never below DARE, and per tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.deltas import search_eta, search_grid, search_scale, search_scales_per_layer


def recorded(objective: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    calls: list[float] = []

    def record(q: float) -> float:
        calls.append(q)
        return objective(q)

    return record, calls


def test_the_grid_written_by_hand() -> None:
    """density 0.01, high 0.1, step 0.05, as published; the best coarse point is 0.06."""
    objective, calls = recorded(lambda q: -abs(q - 0.041))
    found = search_scale(objective, density=0.01, high=0.1, step=0.05)
    coarse = [0.01, 0.06, 0.1]
    # from 0.06 - 0.045 by 0.005 up to below 0.11, not above 0.1; 0.06 and 0.1 are known, four misses after 0.04 end it
    fine = [0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.055]
    assert calls == pytest.approx(coarse + fine)
    assert found.scale == pytest.approx(0.04) and found.score == pytest.approx(-0.001)
    assert list(found.scores) == calls


def test_patience_ends_a_pass_at_the_fourth_miss_in_a_row() -> None:
    objective, calls = recorded(lambda q: -q)
    found = search_grid(objective, low=1.0, high=20.0, step=1.0)
    assert calls[:5] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert calls[5:] == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])
    assert found.scale == 1.0
    bumpy = {1.0: 5.0, 2.0: 1.0, 3.0: 2.0, 4.0: 3.0, 5.0: 6.0}
    assert search_grid(lambda q: bumpy.get(q, 0.0), low=1.0, high=20.0, step=1.0).scale == 5.0
    assert search_grid(lambda q: bumpy.get(q, 0.0), low=1.0, high=20.0, step=1.0, patience=2).scale == 1.0


def test_ties_go_to_the_first_point_which_is_dare() -> None:
    found = search_scale(lambda q: 0.5, density=0.05)
    assert found.scale == 0.05
    tied = search_grid(lambda q: float(q > 2.5), low=1.0, high=9.0, step=1.0)
    assert tied.scale == 3.0


def test_defaults_are_the_published_grid_scaled_by_the_density() -> None:
    objective, calls = recorded(lambda q: -q)
    search_scale(objective, density=0.01)
    assert calls[:3] == pytest.approx([0.01, 0.06, 0.1])
    objective, calls = recorded(lambda q: q)
    assert search_scale(objective, density=0.3).scale == 1.0
    assert max(calls) == 1.0
    assert search_scale(lambda q: q, density=1.0).scores == {1.0: 1.0}


def test_a_step_beyond_the_range_and_scores_of_nan() -> None:
    objective, calls = recorded(lambda q: -abs(q - 0.19))
    found = search_scale(objective, density=0.1, high=0.3, step=5.0)
    assert calls[:2] == [0.1, 0.3] and found.scale == 0.1
    assert search_scale(lambda q: math.nan if q > 0.1 else -9.0, density=0.1).scale == 0.1
    assert search_scale(lambda q: math.nan, density=0.1).scale == 0.1


@given(
    density=st.floats(1e-4, 1),
    width=st.floats(0, 2),
    step=st.floats(0.05, 1),
    decay=st.floats(0.05, 0.9),
    patience=st.integers(0, 5),
    table=st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_never_below_dare_nor_outside_the_range(
    density: float, width: float, step: float, decay: float, patience: int, table: list[int]
) -> None:
    """On any objective, also a jumpy and quantised one."""
    objective, calls = recorded(lambda q: float(table[int(q * 1e4) % 7]))
    high = density + width
    found = search_scale(objective, density=density, high=high, step=step, decay=decay, patience=patience)
    assert calls[0] == density and all(density <= q <= high for q in calls)
    assert len(set(calls)) == len(calls)
    assert found.score >= found.scores[density] and found.score == max(found.scores.values())
    first = next(q for q in found.scores if found.scores[q] == found.score)
    assert found.scale == first


@given(st.floats(0.01, 0.99), st.floats(0.001, 0.3))
def test_a_smooth_optimum_is_met_within_a_fine_step(target: float, density: float) -> None:
    high, step = 1.0, 0.1
    found = search_scale(lambda q: -((q - target) ** 2), density=density, high=high, step=step)
    wanted = max(target, density)
    assert abs(found.scale - wanted) <= step * 0.1 + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        dict(density=0.0),
        dict(density=1.5),
        dict(density=0.1, high=0.05),
        dict(density=0.1, high=math.inf),
        dict(density=0.1, step=0.0),
        dict(density=0.1, step=math.nan),
        dict(density=0.1, decay=1.0),
        dict(density=0.1, patience=-1),
    ],
)
def test_refusals(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"density|high|step"):
        search_scale(lambda q: pytest.fail("measured before the check"), **wrong)  # type: ignore[arg-type]


TARGET = {"a": 0.2, "b": 0.5, "c": 0.1}


def distance(scales: dict[str, float]) -> float:
    return -sum((scales[name] - TARGET[name]) ** 2 for name in TARGET)


def test_each_group_finds_its_own_scale() -> None:
    found = search_scales_per_layer(distance, {name: [name] for name in TARGET}, density=0.1, high=1.0, step=0.1)
    assert found.scales == pytest.approx(TARGET, abs=0.01)
    assert found.score == pytest.approx(distance(found.scales)) and found.score > found.dare_score
    assert found.dare_score == pytest.approx(distance(dict.fromkeys(TARGET, 0.1)))
    shared = search_scales_per_layer(distance, {"x": ["a", "b"], "y": ["c"]}, density=0.1, start=0.3, high=1.0)
    assert shared.scales["a"] == shared.scales["b"] == pytest.approx(0.35, abs=0.05)


def test_no_gain_per_group_is_dare() -> None:
    found = search_scales_per_layer(
        lambda scales: -sum(scales.values()), {"a": ["a"], "b": ["b"]}, density=0.1, start=0.4
    )
    assert found.scales == {"a": 0.1, "b": 0.1} and found.score == found.dare_score
    with pytest.raises(ValueError, match="no tensors"):
        search_scales_per_layer(distance, {}, density=0.1)


def test_eta_moves_all_scales_along_one_family() -> None:
    found = search_eta(
        distance, lambda eta: {"a": eta, "b": 2.5 * eta, "c": eta / 2}, density=0.1, low=0.1, high=0.5, step=0.1
    )
    assert found.scales == pytest.approx(TARGET, abs=0.01)
    worse = search_eta(lambda s: -sum(s.values()), lambda eta: {"a": 0.5 + eta}, density=0.1)
    assert worse.scales == {"a": 0.1} and worse.score == worse.dare_score == -0.1
