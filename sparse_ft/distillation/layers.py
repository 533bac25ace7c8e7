"""Which layer of the teacher each layer of the student is compared with.

Layers have the numbers of transformers' `hidden_states`: 1 is the output of the first block, L the last entry; 0, the
embeddings, is never compared.

    layer_pairs(12, 12)                     # (1, 1), (2, 2), ... (12, 12)
    layer_pairs(6, 12, "spaced")            # (1, 2), (2, 4), ... (6, 12): the last of each meet
    layer_pairs(12, 12, {4: 4, 8: 8})       # two layers only
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Literal


def layer_pairs(
    student_depth: int, teacher_depth: int, layers: Mapping[int, int] | Literal["spaced"] | None = None
) -> tuple[tuple[int, int], ...]:
    """Pairs (student layer, teacher layer), by growing number.

    Args:
        student_depth: number of blocks of the student.
        teacher_depth: number of blocks of the teacher.
        layers: student layer -> teacher layer, each from 1 to the depth; student layers left out are not compared,
            and teacher layers may not run backwards. "spaced" compares student layer i with teacher layer
            i · teacher_depth / student_depth, rounded to the nearest, halves up. None compares equal numbers and needs
            equal depths.

    Returns:
        At least one pair.

    Raises:
        ValueError: the depths differ and `layers` is None, a map is empty or names a layer that does not exist, or
            teacher layers run backwards.

    Example:
        >>> pairs = layer_pairs(6, 12, "spaced")
        >>> squarehead_loss([s[i] for i, _ in pairs], [t[j] for _, j in pairs], attention_mask)
    """
    if min(student_depth, teacher_depth) < 1:
        raise ValueError(
            f"The student has {student_depth} layers and the teacher {teacher_depth}, but states are compared layer by "
            f"layer: both need at least 1."
        )
    if layers is None and student_depth != teacher_depth:
        raise ValueError(
            f"The student has {student_depth} layers but the teacher {teacher_depth}: give a map such as "
            f"{{1: {round(teacher_depth / student_depth) or 1}, {student_depth}: {teacher_depth}}}, or 'spaced'."
        )
    if layers is None:
        return tuple((layer, layer) for layer in range(1, student_depth + 1))
    if isinstance(layers, str):
        if layers != "spaced":
            raise ValueError(f"The layer map is {layers!r}, but the only one with a name is 'spaced': use it or a map.")
        return tuple((layer, _spaced(layer, student_depth, teacher_depth)) for layer in range(1, student_depth + 1))
    pairs = tuple(sorted(layers.items()))
    _check_map(pairs, student_depth, teacher_depth)
    return pairs


def _spaced(layer: int, student_depth: int, teacher_depth: int) -> int:
    """The nearest integer to layer · teacher_depth / student_depth, at least 1, without floats."""
    return max(1, (2 * layer * teacher_depth + student_depth) // (2 * student_depth))


def _check_map(pairs: tuple[tuple[int, int], ...], student_depth: int, teacher_depth: int) -> None:
    """Raise ValueError unless there are pairs of existing layers, in the same order on both sides."""
    if not pairs:
        raise ValueError("The layer map is empty: name at least one layer, or switch the loss on states off.")
    for side, depth, named in (
        ("student", student_depth, [pair[0] for pair in pairs]),
        ("teacher", teacher_depth, [pair[1] for pair in pairs]),
    ):
        for layer in named:
            if not 1 <= layer <= depth:
                raise ValueError(
                    f"The layer map names layer {layer} of the {side}, which has layers 1 to {depth}: correct the map."
                )
    for (first, behind), (second, ahead) in pairwise(pairs):
        if ahead < behind:
            raise ValueError(
                f"The layer map sends student layer {first} to teacher layer {behind} but the later layer {second} "
                f"back to {ahead}: teacher layers have to follow the order of the student's."
            )
