"""Pieces the losses on hidden states share: sums over valid tokens, sums over layers, and what backward keeps.

A layer's loss is made of one number per token. The two autograd functions here compute those in fp32 and keep one
tensor of the student's shape and dtype for backward, made of both states: neither an fp32 copy nor the teacher's
states outlive the forward pass. For bf16 states that are within a factor of two of each other the kept difference is
exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FeatureLoss(NamedTuple):
    """What the losses over all layers return.

    Attributes:
        total: scalar, the weighted sum over layers; gradients flow to the student's states.
        layers: (L,), the value of each layer before its weight, detached, for logs.
    """

    total: Tensor
    layers: Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


def token_mask(mask: Tensor | None, states: Tensor) -> Tensor:
    """The valid tokens as bool, on the device of the states.

    Args:
        mask: (B, T), nonzero = valid; None: all are.
        states: (B, T, h).

    Raises:
        ValueError: the mask has another shape, as the 4-D masks of attention do.
    """
    if mask is None:
        return torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
    if mask.shape != states.shape[:-1]:
        raise ValueError(
            f"The token mask has shape {tuple(mask.shape)} but the hidden states have {tuple(states.shape)}: give one "
            f"value per token, {tuple(states.shape[:-1])}, such as the batch's attention_mask."
        )
    return mask.to(states.device, torch.bool)


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse states that cannot be subtracted.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's hidden states have shape {tuple(student.shape)} but the teacher's have "
            f"{tuple(teacher.shape)}: run both on the same batch, and take a teacher of the same hidden size."
        )


def mean_over_tokens(values: Tensor, keep: Tensor, count: Tensor | int | None) -> Tensor:
    """Sum of the values of valid tokens, divided by `count`, or by their number; 0 where there are none.

    Args:
        values: (B, T), fp32; those of other tokens may be anything, NaN included.
        keep: (B, T) bool.
        count: number of tokens to divide by; a tensor needs no wait for the device.
    """
    total = torch.where(keep, values, 0).sum()
    if count is None:
        count = keep.sum()
    if isinstance(count, Tensor):
        return total / count.to(total.device).clamp(min=1)
    return total / max(count, 1)


def sum_over_layers(
    layer_loss: Callable[[int, Tensor, Tensor], Tensor],
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    weights: Sequence[float] | None,
) -> FeatureLoss:
    """Σ weight · layer_loss(index, student, teacher). A layer of weight 0 is computed for the log only.

    Raises:
        ValueError: the numbers of layers or of weights differ, there are none, or a weight is negative or not finite.
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(
            f"There are states of {len(student_states)} student layers but of {len(teacher_states)} teacher layers: "
            f"give one teacher state per student state, chosen with `layer_pairs`."
        )
    if not student_states:
        raise ValueError("There are states of 0 layers, but a loss over layers needs at least 1: leave it out instead.")
    weights = [1.0] * len(student_states) if weights is None else list(weights)
    if len(weights) != len(student_states):
        raise ValueError(f"There are {len(weights)} layer weights for {len(student_states)} layers: give one for each.")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"A layer weight is {weight}, but weights are finite and at least 0: correct it.")
    device = student_states[0].device
    total, values = torch.zeros((), device=device), []
    for index, (student, teacher, weight) in enumerate(zip(student_states, teacher_states, weights, strict=True)):
        value = layer_loss(index, student, teacher)
        values.append(value.detach().to(device))
        total = total + weight * value.to(device) if weight else total
    return FeatureLoss(total, torch.stack(values))


def squared_norms(states: Tensor) -> Tensor:
    """Σ over channels of x², (B, T) from (B, T, h), in fp32 and without gradients."""
    return torch.linalg.vector_norm(states.detach(), dim=-1, dtype=wide(states.dtype)).square()


def squared_distances(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """Σ over channels of (s - t)², 0 where the token is not valid; gradients flow to the student only.

    Args:
        student: (B, T, h).
        teacher: (B, T, h), in any dtype and on any device; a constant.
        keep: (B, T) bool.

    Returns:
        (B, T), fp32 (fp64 for fp64 input).
    """
    result: Tensor = _SquaredDistances.apply(student, teacher, keep)
    return result


def cosines(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """<s, t> / (|s| |t|), 0 and without gradient where a norm is 0 or the token is not valid.

    Args:
        student: (B, T, h).
        teacher: (B, T, h), in any dtype and on any device; a constant.
        keep: (B, T) bool.

    Returns:
        (B, T), fp32 (fp64 for fp64 input).
    """
    result: Tensor = _Cosines.apply(student, teacher, keep)
    return result


class _SquaredDistances(torch.autograd.Function):
    """See `squared_distances`; keeps the difference in the student's dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        difference = torch.sub(student, teacher.to(student.device, wide(student.dtype)))
        difference.masked_fill_(~keep.unsqueeze(-1), 0)
        ctx.save_for_backward(difference.to(student.dtype))
        return squared_norms(difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return ((2 * grad).unsqueeze(-1) * difference).to(difference.dtype), None, None


class _Cosines(torch.autograd.Function):
    """See `cosines`; keeps t/|t| - cos · s/|s| in the student's dtype and 1/|s| per token."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
        dtype, dropped = wide(student.dtype), ~keep.unsqueeze(-1)
        target = _unit(teacher.to(student.device, dtype, copy=True).masked_fill_(dropped, 0))[0]
        direction, inverse = _unit(student.to(dtype, copy=True).masked_fill_(dropped, 0))
        cosine = (direction * target).sum(-1)
        tangent = target.sub_(direction.mul_(cosine.unsqueeze(-1)))
        ctx.save_for_backward(tangent.to(student.dtype), inverse)
        return cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tangent, inverse = ctx.saved_tensors
        return ((grad * inverse).unsqueeze(-1) * tangent).to(tangent.dtype), None, None


def _unit(states: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's states divided by their norm, in place, and 1 / norm; both 0 where the norm is 0."""
    norms = torch.linalg.vector_norm(states, dim=-1)
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return states.mul_(inverse.unsqueeze(-1)), inverse
