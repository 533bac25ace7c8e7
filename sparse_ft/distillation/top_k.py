"""The teacher's distribution as its k largest probabilities and one bucket for the rest: targets that fit on a disk.

    KL_k = Σ_{i in top k} p_i (log p_i - log q_i)  +  p_rest (log p_rest - log q_rest)

p is the teacher's, q the student's distribution, and p_rest, q_rest the sums of everything outside the teacher's top k.
Lumping can only lose information: KL_k is at most the full KL, equal to it for k = V, and 0 where it is 0. Leaving the
bucket out and renormalising instead would pull the student towards a distribution the teacher does not have.

    targets = top_k_targets(hidden, 64, head=Head(teacher.lm_head.weight))       # once, may be stored
    kl_loss(student_hidden, targets, labels, student_head=head).backward()

k = 64 in bf16 with int32 indices takes 386 bytes per token, whatever the vocabulary.

Limits: the temperature is fixed when the targets are made, because the rest at another temperature cannot be known.

Source: the inequality is the data processing inequality, Cover & Thomas, Elements of Information Theory, section 2.8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ft.distillation.head import (
    Comparison,
    Head,
    Target,
    head_logits,
    product_dtype,
    vocabulary,
)

# 64 MiB in fp32
_LOGITS_PER_CHUNK = 2**24


class TopK(NamedTuple):
    """The k largest entries of a distribution per position, and the rest in one.

    Attributes:
        log_probs: (B, T, k), largest first, in any float dtype.
        indices: (B, T, k), int32 or int64.
        tail: (B, T), log of the summed probability of all other entries; -inf for k = V.
        temperature: what the logits were divided by.
    """

    log_probs: Tensor
    indices: Tensor
    tail: Tensor
    temperature: float = 1.0


@torch.no_grad()
def top_k_targets(
    states: Tensor,
    k: int,
    *,
    head: Head | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> TopK:
    """The teacher's top k and the rest, a few tokens at a time.

    Args:
        states: (B, T, h) hidden states, or the logits (B, T, V) if `head` is None.
        k: how many entries to keep, 1 to V.
        head: the teacher's head.
        temperature: what logits are divided by.
        dtype: of the stored log-probabilities; those in bf16 are brought back to a sum of 1 when they are used.
        chunk: positions at a time; None: as many as make 2^24 logits.

    Returns:
        Targets for `kl_loss`, on the device of the states.

    Raises:
        ValueError: k is not between 1 and V, or the temperature is not positive.

    Example:
        >>> targets = top_k_targets(teacher_logits, 64, dtype=torch.bfloat16)
    """
    size = vocabulary(states, head)
    if not 1 <= k <= size:
        raise ValueError(f"k is {k} but the vocabulary has {size} entries: give a number from 1 to {size}.")
    if not temperature > 0:
        raise ValueError(f"The temperature is {temperature}, but logits are divided by it: give a positive number.")
    flat = states.reshape(-1, states.shape[-1])
    chunk = chunk or max(1, _LOGITS_PER_CHUNK // size)
    log_probs = torch.empty(len(flat), k, dtype=dtype, device=flat.device)
    indices = torch.empty(len(flat), k, dtype=torch.int32, device=flat.device)
    tail = torch.empty(len(flat), dtype=dtype, device=flat.device)
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        logits = head_logits(flat[part], head, product_dtype(states)) / temperature
        normaliser = logits.logsumexp(-1, keepdim=True)
        top = logits.topk(k, -1)
        log_probs[part] = (top.values - normaliser).to(flat.device, dtype)
        indices[part] = top.indices.to(flat.device, torch.int32)
        rest = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(-1)
        tail[part] = (rest - normaliser.squeeze(-1)).to(flat.device, dtype)
    shape = states.shape[:-1]
    return TopK(log_probs.view(*shape, k), indices.view(*shape, k), tail.view(shape), temperature)


def top_k_target(targets: TopK) -> Target:
    """The teacher's side of KL_k. The bucket's share of the gradient falls on its tokens as the student weighs them."""
    log_probs = targets.log_probs.reshape(-1, targets.log_probs.shape[-1])
    indices, tails = targets.indices.reshape(log_probs.shape), targets.tail.reshape(-1)

    def target(positions: Tensor) -> Comparison:
        at = positions.to(log_probs.device)

        def compare(block: slice, student: Tensor) -> tuple[Tensor, Tensor]:
            top, tail = (each[at[block]].to(student.device, student.dtype) for each in (log_probs, tails))
            chosen = indices[at[block]].to(student.device, torch.int64)
            total = torch.cat([top, tail.unsqueeze(-1)], -1).logsumexp(-1)
            top, tail = top - total.unsqueeze(-1), tail - total
            divergence = (top.exp() * (top - student.gather(-1, chosen))).sum(-1)
            if chosen.shape[-1] == student.shape[-1]:
                return divergence, torch.empty_like(student).scatter_(-1, chosen, top.exp())
            wanted, rest = _softmax_and_normaliser(student.scatter(-1, chosen, -torch.inf))
            divergence += tail.exp() * (tail - rest)
            return divergence, wanted.mul_(tail.exp().unsqueeze(-1)).scatter_(-1, chosen, top.exp())

        return compare

    return target


def _softmax_and_normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax (n, V) and log-sum-exp (n,) of the logits with one exponential per entry."""
    probabilities = torch.softmax(logits, -1)
    largest, where = logits.max(-1, keepdim=True)
    return probabilities, (largest - probabilities.gather(-1, where).log()).squeeze(-1)
