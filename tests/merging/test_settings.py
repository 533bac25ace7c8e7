"""Settings: gradients, filters and precedence have the values that mergekit's documentation says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.merging.settings import evaluate, interpolate, layer_position, parse_setting, resolve

numbers = st.floats(-10, 10)
gradients = st.lists(numbers, min_size=1, max_size=6)
positions = st.floats(0, 1)


@given(gradients, positions)
def test_a_gradient_passes_through_its_points_and_stays_between_neighbours(values: list[float], t: float) -> None:
    for i, value in enumerate(values):
        assert interpolate(values, layer_position(i, len(values)) if len(values) > 1 else 0.0) == pytest.approx(value)
    place = t * (len(values) - 1)
    low, high = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    expected = low + (high - low) * (place - int(place))
    assert interpolate(values, t) == pytest.approx(expected, abs=1e-9)
    assert min(low, high) - 1e-9 <= interpolate(values, t) <= max(low, high) + 1e-9


@given(numbers, numbers)
def test_the_ends_are_exact(first: float, last: float) -> None:
    assert interpolate([first, last], 0.0) == first
    assert interpolate([first, last], 1.0) == last


@given(numbers, positions)
def test_equal_points_give_that_value_exactly(value: float, t: float) -> None:
    assert interpolate([value] * 3, t) == value


def test_flags_and_words_take_the_point_at_or_before() -> None:
    assert [interpolate([True, False, True], t) for t in (0, 0.49, 0.5, 0.99, 1)] == [True, True, False, False, True]
    assert interpolate(["a", "b"], 0.999) == "a"


def test_positions_of_layers() -> None:
    assert [layer_position(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert layer_position(0, 1) == 1.0


def test_the_first_fitting_case_decides_by_a_part_of_the_name() -> None:
    raw = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.5}]
    setting = parse_setting(raw, "t")
    assert evaluate(setting, "layers.0.self_attn.q.weight", 0.75) == 0.75
    assert evaluate(setting, "layers.0.mlp.up.weight", 0.75) == 0.25
    assert evaluate(setting, "norm.weight", 0.75) == 0.5
    assert evaluate(parse_setting([{"filter": ".*attn", "value": 1}], "t"), "self_attn", 0.0) is None, "no regex"
    assert evaluate(parse_setting([{"filter": "*", "value": 1}], "t"), "anything", 0.0) == 1
    assert evaluate(parse_setting({"filter": "mlp", "value": 1}, "t"), "mlp", 0.0) == 1, "one mapping is a list of one"


def test_the_most_particular_level_with_a_value_wins() -> None:
    levels = [
        {"weight": parse_setting([{"filter": "mlp", "value": 1.0}], "w")},
        {},
        {"weight": parse_setting(2.0, "w")},
    ]
    assert resolve("weight", levels, "mlp.up", 0.0) == 1.0
    assert resolve("weight", levels, "attn.q", 0.0) == 2.0, "a conditional that fits nothing falls through"
    assert resolve("density", levels, "attn.q", 0.0) is None
    assert resolve("weight", [{"weight": parse_setting(0.0, "w")}, *levels], "mlp", 0.0) == 0.0, "zero is a value"


def test_an_empty_list_and_nothing_are_no_setting() -> None:
    assert parse_setting([], "w") == () == parse_setting(None, "w")


def test_numbers_that_yaml_takes_for_text() -> None:
    assert evaluate(parse_setting("1e-3", "w"), "x", 0.0) == 1e-3


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (float("nan"), "w is nan; give a finite number"),
        ([1.0, True], "mixes numbers with flags"),
        ([1.0, {"value": 2}], "mixes plain values and filters"),
        ([{"filter": "mlp"}], "has a filter but no value"),
        ([{"filtr": "mlp", "value": 1}], "Did you mean 'filter'"),
        ([{"filter": 3, "value": 1}], "must be a part of a tensor's name"),
        ([[1, 2]], "must be a number"),
    ],
)
def test_malformed_settings_are_refused(raw: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_setting(raw, "w")
