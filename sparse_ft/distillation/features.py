"""Alternatives to SquareHead on the same hidden states: the plain squared error, and the angle.

    mse_l    = mean((s_l - t_l)²)                     over valid tokens and channels
    cosine_l = mean(1 - <s, t> / (|s| |t|))           over valid tokens

Both are called as `squarehead_loss` is: `mse_loss(student_states, teacher_states, attention_mask).total`.

The plain error is dominated by the layers, and within a layer by the tokens and channels, with the largest values. The
cosine counts every token alike and leaves the length of the states free.

Sources: plain error: Romero et al., "FitNets", arXiv 1412.6550, equation 3; cosine: Sanh et al., "DistilBERT",
arXiv 1910.01108, section 3 (the cosine embedding loss).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparse_ft.distillation.states import (
    FeatureLoss,
    check_same_shape,
    cosines,
    mean_over_tokens,
    squared_distances,
    sum_over_layers,
    token_mask,
)


def mse_layer(student: Tensor, teacher: Tensor, mask: Tensor | None, *, count: Tensor | int | None = None) -> Tensor:
    """mean((s - t)²) of one layer.

    Args:
        student: (B, T, h).
        teacher: (B, T, h); a constant, not kept for backward.
        mask: (B, T), nonzero = valid; None: all tokens are.
        count: number of tokens to divide by; None: the valid ones here.

    Returns:
        A scalar in fp32; 0, with gradient 0, if no token is valid.

    Raises:
        ValueError: the shapes differ or the mask does not fit.

    Example:
        >>> loss = loss + mse_layer(student_state, teacher_state, attention_mask)

    Source: arXiv 1412.6550, equation 3, as a mean and without a regressor.
    """
    check_same_shape(student, teacher)
    keep = token_mask(mask, student)
    return mean_over_tokens(squared_distances(student, teacher, keep), keep, count) / student.shape[-1]


def cosine_layer(student: Tensor, teacher: Tensor, mask: Tensor | None, *, count: Tensor | int | None = None) -> Tensor:
    """mean(1 - cos(s, t)) of one layer. A token one of whose states is all zeros counts as 1 and has no gradient.

    Args:
        student: (B, T, h).
        teacher: (B, T, h); a constant, not kept for backward.
        mask: (B, T), nonzero = valid; None: all tokens are.
        count: number of tokens to divide by; None: the valid ones here.

    Returns:
        A scalar in fp32; 0, with gradient 0, if no token is valid.

    Raises:
        ValueError: the shapes differ or the mask does not fit.

    Example:
        >>> loss = loss + cosine_layer(student_state, teacher_state, attention_mask)

    Source: arXiv 1910.01108, section 3.
    """
    check_same_shape(student, teacher)
    keep = token_mask(mask, student)
    return mean_over_tokens(1 - cosines(student, teacher, keep), keep, count)


def mse_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None,
    *,
    weights: Sequence[float] | None = None,
    count: Tensor | int | None = None,
) -> FeatureLoss:
    """Σ over layers of mean((s - t)²), not normalised.

    Args:
        student_states: L tensors (B, T, h).
        teacher_states: L tensors of the same shapes, in any dtype and on any device; constants.
        mask: (B, T), nonzero = valid; None: all tokens are.
        weights: L factors, at least 0; None: all 1. A layer of weight 0 is logged and adds nothing.
        count: number of tokens to divide by; None: the valid ones here.

    Returns:
        The scalar total and the values of the layers, in fp32.

    Raises:
        ValueError: the numbers of layers differ, shapes differ, the mask does not fit, or a weight is negative.

    Example:
        >>> mse_loss(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask).total.backward()

    Source: arXiv 1412.6550, equation 3.
    """
    return sum_over_layers(
        lambda _, student, teacher: mse_layer(student, teacher, mask, count=count),
        student_states,
        teacher_states,
        weights,
    )


def cosine_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None,
    *,
    weights: Sequence[float] | None = None,
    count: Tensor | int | None = None,
) -> FeatureLoss:
    """Σ over layers of mean(1 - cos(s, t)).

    Args:
        student_states: L tensors (B, T, h).
        teacher_states: L tensors of the same shapes, in any dtype and on any device; constants.
        mask: (B, T), nonzero = valid; None: all tokens are.
        weights: L factors, at least 0; None: all 1. A layer of weight 0 is logged and adds nothing.
        count: number of tokens to divide by; None: the valid ones here.

    Returns:
        The scalar total and the values of the layers, in fp32.

    Raises:
        ValueError: the numbers of layers differ, shapes differ, the mask does not fit, or a weight is negative.

    Example:
        >>> cosine_loss(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask).total.backward()

    Source: arXiv 1910.01108, section 3.
    """
    return sum_over_layers(
        lambda _, student, teacher: cosine_layer(student, teacher, mask, count=count),
        student_states,
        teacher_states,
        weights,
    )
