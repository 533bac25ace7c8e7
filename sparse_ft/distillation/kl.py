"""KL between the teacher's and the student's next-token distributions, and cross-entropy beside it.

    KL = τ² / N · Σ_{positions with a label} Σ_v p_v (log p_v - log q_v),     p = softmax(t / τ), q = softmax(s / τ)

p is the teacher's distribution, q the student's (forward KL), and N the number of positions. The positions are those of
cross-entropy: labels are shifted by one, because the logits at position i predict token i + 1.

    out = ce_kl_loss(hidden, labels, teacher=teacher_hidden, head=head, teacher_head=teacher_head)
    out.total.backward()

From hidden states and heads, logits exist a few tokens at a time only (see `head.py`), so the vocabulary costs no
memory. Cross-entropy and KL share the student's logits. A teacher of k entries per token: see `top_k.py`.

Limits: logits have to be finite. The head's weight is used as a tensor: gather it first where it is sharded, and
dequantise it where it is packed.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2 (τ²).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ft.distillation.head import (
    LOGITS_PER_CHUNK,
    Comparison,
    Head,
    Target,
    TokenLoss,
    TokenTask,
    as_logits,
    head_product,
    product_dtype,
    token_loss,
    vocabulary,
)
from sparse_ft.distillation.positions import loss_positions
from sparse_ft.distillation.top_k import TopK, top_k_target


def kl_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor,
    *,
    student_head: Head | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    num_items: Tensor | int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """τ² KL(teacher || student), a mean over the positions with a label.

    Args:
        student: (B, T, h) hidden states, or logits (B, T, V) if `student_head` is None.
        teacher: likewise with `teacher_head`, a constant; or the stored targets of `top_k_targets`.
        labels: (B, T) int64.
        student_head: gets gradients where its tensors require them.
        teacher_head: a constant.
        temperature: τ.
        ignore_index: the label of tokens that are not trained on.
        shift: position i predicts label i + 1, as in decoders; False: label i, as in encoder-decoders.
        num_items: what the sum is divided by, such as the number of labels in all micro-batches; None: the number of
            positions here.
        chunk: positions at a time; None: as many as make 2^25 logits. It does not change the result.

    Returns:
        A scalar in fp32; 0, with gradient 0, if no position has a label.

    Raises:
        ValueError: shapes, vocabularies or temperatures do not fit, or a setting is out of range.

    Example:
        >>> kl_loss(student_logits, teacher_logits, labels, temperature=2.0).backward()

    Source: arXiv 1503.02531, section 2.
    """
    return ce_kl_loss(
        student,
        labels,
        teacher=teacher,
        head=student_head,
        teacher_head=teacher_head,
        ce_weight=0.0,
        temperature=temperature,
        ignore_index=ignore_index,
        shift=shift,
        num_items=num_items,
        chunk=chunk,
    ).total


def ce_kl_loss(
    student: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | TopK | None = None,
    head: Head | None = None,
    teacher_head: Head | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    shift: bool = True,
    num_items: Tensor | int | None = None,
    chunk: int | None = None,
) -> TokenLoss:
    """ce_weight · CE + kl_weight · τ² KL(teacher || student) from one pass over the student's logits.

    Args:
        student: (B, T, h) hidden states, or logits (B, T, V) if `head` is None.
        labels: (B, T) int64.
        teacher: (B, T, h) or (B, T, V) likewise, a constant; or the targets of `top_k_targets`; None: no KL.
        head: the student's head; gets gradients where its tensors require them.
        teacher_head: a constant.
        ce_weight: factor of cross-entropy; at 0 it is not computed.
        kl_weight: factor of KL; at 0 the teacher is not looked at.
        temperature: τ, of KL only.
        label_smoothing: ε: cross-entropy against (1 - ε) · label + ε · uniform, as `torch.nn.CrossEntropyLoss` has it.
        ignore_index: the label of tokens that are not trained on.
        shift: position i predicts label i + 1, as in decoders; False: label i, as in encoder-decoders.
        num_items: what the sums are divided by; None: the number of positions here.
        chunk: positions at a time; None: as many as make 2^25 logits. It does not change the result.

    Returns:
        The differentiable total and both values, in fp32; 0 if no position has a label.

    Raises:
        ValueError: shapes, vocabularies or temperatures do not fit, or a setting is out of range.

    Example:
        >>> out = ce_kl_loss(hidden, labels, teacher=teacher_hidden, head=head, teacher_head=teacher_head)
        >>> out.total.backward()

    Source: arXiv 1503.02531, section 2.
    """
    _check_settings(ce_weight, kl_weight, temperature, label_smoothing, chunk)
    _check_states(student, head, labels, "student")
    student = student if head is None else student.to(head.weight.device)
    size = vocabulary(student, head)
    positions, wanted = loss_positions(labels.to(student.device), ignore_index=ignore_index, shift=shift)
    target = None
    if teacher is not None and kl_weight:
        _check_teacher(teacher, teacher_head, labels, size, temperature)
        target = _target(teacher, teacher_head, temperature)
    task = TokenTask(
        positions,
        wanted,
        target,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        temperature=temperature,
        label_smoothing=label_smoothing,
        chunk=chunk or max(1, LOGITS_PER_CHUNK // size),
    )
    sums = token_loss(student.reshape(-1, student.shape[-1]), head, task)
    items = len(positions) if num_items is None else num_items
    items = items.to(student.device).clamp(min=1) if isinstance(items, Tensor) else max(items, 1)
    return TokenLoss(*(value / items for value in sums))


def _target(teacher: Tensor | TopK, head: Head | None, temperature: float) -> Target:
    """The teacher's side of KL."""
    if isinstance(teacher, TopK):
        return top_k_target(teacher)
    teacher = teacher.detach().reshape(-1, teacher.shape[-1])
    dtype = teacher.dtype if head is None else product_dtype(teacher)
    head = None if head is None else head._replace(weight=head.weight.detach().to(dtype))  # once, not in every chunk

    def target(positions: Tensor) -> Comparison:
        products = head_product(teacher[positions.to(teacher.device)], head, dtype)

        def compare(block: slice, log_probs: Tensor) -> tuple[Tensor, Tensor]:
            own = as_logits(products[block], head).to(log_probs.device, log_probs.dtype)
            if temperature != 1:
                own.div_(temperature)
            own = torch.log_softmax(own, -1)
            difference = own - log_probs
            probabilities = own.exp_()
            return difference.mul_(probabilities).sum(-1), probabilities

        return compare

    return target


def _check_settings(
    ce_weight: float, kl_weight: float, temperature: float, label_smoothing: float, chunk: int | None
) -> None:
    """Raise ValueError for a number out of its range."""
    for name, weight in (("ce_weight", ce_weight), ("kl_weight", kl_weight)):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} is {weight}, but weights are finite and at least 0: correct it.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"The temperature is {temperature}, but logits are divided by it: give a positive number.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but it is a share: give a number from 0 to below 1.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}, but it is a number of positions: give at least 1, or None.")


def _check_states(states: Tensor, head: Head | None, labels: Tensor, side: str) -> None:
    """Raise ValueError unless states, head and labels belong together."""
    if labels.shape != states.shape[:-1]:
        raise ValueError(
            f"The labels have shape {tuple(labels.shape)} but the {side}'s states have {tuple(states.shape)}: give one "
            f"label per position, not shifted."
        )
    if head is not None and head.weight.shape[1:] != states.shape[-1:]:
        raise ValueError(
            f"The {side}'s head has shape {tuple(head.weight.shape)} but its states have {states.shape[-1]} channels: "
            f"give the weight as (vocabulary, channels), and the states the head sees."
        )


def _check_teacher(teacher: Tensor | TopK, head: Head | None, labels: Tensor, size: int, temperature: float) -> None:
    """Raise ValueError unless the teacher's side can be compared with `size` logits per label."""
    if isinstance(teacher, TopK):
        _check_states(teacher.log_probs, None, labels, "teacher")
        if teacher.log_probs.shape[-1] > size:
            raise ValueError(
                f"The targets hold {teacher.log_probs.shape[-1]} entries per token but the student's vocabulary has "
                f"{size}: make them with a teacher of the same vocabulary."
            )
        if teacher.temperature != temperature:
            raise ValueError(
                f"The targets were made at temperature {teacher.temperature} but the loss is asked for at "
                f"{temperature}: use the same, or make the targets again."
            )
        return
    _check_states(teacher, head, labels, "teacher")
    if vocabulary(teacher, head) != size:
        raise ValueError(
            f"The teacher has {vocabulary(teacher, head)} logits per token but the student {size}: take a teacher of "
            f"the same vocabulary, or resize the embeddings of one of them."
        )
