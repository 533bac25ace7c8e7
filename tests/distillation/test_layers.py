"""Layer maps: equal depths, spacing, explicit maps, and what is refused."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.distillation import layer_pairs

DEPTHS = st.integers(1, 100)


def test_equal_depths_are_compared_one_to_one() -> None:
    assert layer_pairs(3, 3) == ((1, 1), (2, 2), (3, 3)) == layer_pairs(3, 3, "spaced")


def test_spacing_of_known_depths() -> None:
    assert layer_pairs(6, 12, "spaced") == ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))
    assert layer_pairs(2, 5, "spaced") == ((1, 3), (2, 5))
    assert layer_pairs(4, 2, "spaced") == ((1, 1), (2, 1), (3, 2), (4, 2))


@given(DEPTHS, DEPTHS)
def test_spacing_pairs_every_student_layer_in_order_and_the_last_with_the_last(student: int, teacher: int) -> None:
    pairs = layer_pairs(student, teacher, "spaced")
    assert [pair[0] for pair in pairs] == list(range(1, student + 1)) and pairs[-1] == (student, teacher)
    chosen = [pair[1] for pair in pairs]
    assert chosen == sorted(chosen) and 1 <= chosen[0] and chosen[-1] <= teacher
    if student <= teacher:
        assert len(set(chosen)) == student
    for layer, other in pairs:
        assert abs(other - layer * teacher / student) <= 0.5 or (other == 1 and layer * teacher < student)
    assert layer_pairs(student, teacher, dict(pairs)) == pairs


def test_a_map_chooses_layers_and_is_sorted() -> None:
    assert layer_pairs(12, 24, {8: 16, 4: 9}) == ((4, 9), (8, 16))
    assert layer_pairs(4, 2, {1: 1, 2: 1}) == ((1, 1), (2, 1))


@pytest.mark.parametrize(("student", "teacher"), [(6, 12), (12, 6), (1, 9), (9, 1)])
def test_different_depths_need_a_map_and_the_one_suggested_is_accepted(student: int, teacher: int) -> None:
    with pytest.raises(ValueError, match=rf"student has {student} layers but the teacher {teacher}") as raised:
        layer_pairs(student, teacher)
    suggested = re.search(r"\{[^}]*\}", str(raised.value))
    assert suggested and layer_pairs(student, teacher, ast.literal_eval(suggested[0]))[-1] == (student, teacher)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({}, "map is empty"),
        ({0: 1}, "layer 0 of the student, which has layers 1 to 4"),
        ({5: 1}, "layer 5 of the student"),
        ({1: 9}, "layer 9 of the teacher, which has layers 1 to 8"),
        ({-1: 2}, "layer -1 of the student"),
        ({1: 4, 2: 3}, "student layer 1 to teacher layer 4 but the later layer 2 back to 3"),
        ("even", "'even', but the only one with a name is 'spaced'"),
    ],
)
def test_maps_that_cannot_be_are_refused(layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_pairs(4, 8, layers)


def test_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="both need at least 1"):
        layer_pairs(0, 4, "spaced")
