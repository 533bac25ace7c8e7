"""SquareHead: per layer, the squared error of the student's hidden states relative to the teacher's energy.

    SH_l = mean((s_l - t_l)²) / (mean(t_l²) + eps)        total = Σ_l weight_l · SH_l

Both means run over the valid tokens, prompt and answer, and all channels. The teacher's energy is a constant. Layers
are summed, not averaged, so the weight of the whole loss does not depend on the depth in any other way.

    out = squarehead_loss(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
    (cross_entropy + out.total).backward()
    log(out.layers)             # a few tokens may carry most of a layer's energy: look at the layers one by one

States: those of transformers' `hidden_states[1:]`. Entry 0, the embeddings, is left out; in most decoders the last
entry comes after the final norm, so the raw output of the last block takes no part.

Micro-batches and processes: a mean over each is not the mean over all when they hold different numbers of tokens.
`count` is the number of valid tokens of all of them: their losses then add up, each ratio weighted by its share of the
tokens. With the energy of all of them in `energies` too, their gradients add up exactly to those of one large batch.

Source: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of LLMs", arXiv 2310.06927, section on SquareHead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ft.distillation.states import (
    FeatureLoss,
    check_same_shape,
    mean_over_tokens,
    squared_distances,
    squared_norms,
    sum_over_layers,
    token_mask,
)

EPS = 2.0**-7  # machine epsilon of bf16


def teacher_energy(teacher: Tensor, mask: Tensor | None, *, count: Tensor | int | None = None) -> Tensor:
    """mean(t²) over valid tokens and channels, the denominator of one layer.

    Args:
        teacher: (B, T, h).
        mask: (B, T), nonzero = valid; None: all tokens are.
        count: number of tokens to divide by; None: the valid ones here. With the number of all micro-batches, the
            results of the micro-batches add up to the energy of all.

    Returns:
        A scalar in fp32, without gradients; 0 if no token is valid.

    Raises:
        ValueError: the mask does not fit.

    Example:
        >>> energy = sum(teacher_energy(t, m, count=tokens) for t, m in micro_batches)
    """
    return mean_over_tokens(squared_norms(teacher), token_mask(mask, teacher), count) / teacher.shape[-1]


def squarehead_layer(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    *,
    eps: float = EPS,
    count: Tensor | int | None = None,
    energy: Tensor | float | None = None,
) -> Tensor:
    """SH of one layer, for a loop that holds one layer of the teacher at a time.

    Args:
        student: (B, T, h).
        teacher: (B, T, h); a constant, not kept for backward.
        mask: (B, T), nonzero = valid; None: all tokens are.
        eps: added to the energy.
        count: number of tokens the error is divided by; None: the valid ones here.
        energy: mean(t²) to divide by; None: that of the valid tokens here.

    Returns:
        A scalar in fp32; 0, with gradient 0, if no token is valid.

    Raises:
        ValueError: the shapes differ, the mask does not fit or eps is negative.

    Example:
        >>> loss = loss + squarehead_layer(student_state, teacher_state, attention_mask)

    Source: arXiv 2310.06927, the SquareHead loss.
    """
    if not eps >= 0:
        raise ValueError(
            f"eps is {eps}, but the energy can only grow by it: give a number of at least 0, such as {EPS}."
        )
    check_same_shape(student, teacher)
    keep = token_mask(mask, student)
    error = mean_over_tokens(squared_distances(student, teacher, keep), keep, count) / student.shape[-1]
    if energy is None:
        energy = teacher_energy(teacher, mask)
    denominator = torch.as_tensor(energy, dtype=error.dtype, device=error.device) + eps
    # with eps = 0 and nothing valid this is 0/0, which is meant to be 0
    return error / denominator.clamp(min=torch.finfo(error.dtype).tiny)


def squarehead_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None,
    *,
    weights: Sequence[float] | None = None,
    count: Tensor | int | None = None,
    energies: Sequence[float] | Tensor | None = None,
    eps: float = EPS,
) -> FeatureLoss:
    """Σ over layers of mean((s - t)²) / (mean(t²) + eps).

    Args:
        student_states: L tensors (B, T, h).
        teacher_states: L tensors of the same shapes, in any dtype and on any device; constants.
        mask: (B, T), nonzero = valid; None: all tokens are.
        weights: L factors, at least 0; None: all 1. A layer of weight 0 is logged and adds nothing.
        count: number of tokens the errors are divided by; None: the valid ones here.
        energies: L values of mean(t²), from `teacher_energy`; None: those of the valid tokens here.
        eps: added to each energy.

    Returns:
        The scalar total and the values of the layers, in fp32.

    Raises:
        ValueError: the numbers of layers differ, shapes differ, the mask does not fit, or a weight or eps is negative.

    Example:
        >>> out = squarehead_loss(student.hidden_states[1:], teacher.hidden_states[1:], attention_mask)
        >>> out.total.backward()

    Source: arXiv 2310.06927, the SquareHead loss.
    """
    if energies is not None and len(energies) != len(student_states):
        raise ValueError(f"There are {len(energies)} energies for {len(student_states)} layers: give one for each.")

    def layer_loss(index: int, student: Tensor, teacher: Tensor) -> Tensor:
        energy = None if energies is None else energies[index]
        return squarehead_layer(student, teacher, mask, eps=eps, count=count, energy=energy)

    return sum_over_layers(layer_loss, student_states, teacher_states, weights)
