"""Targets of k entries and a rest: the full KL where nothing is lumped, below it elsewhere, exact gradients."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_ft.distillation import Head, TopK, ce_kl_loss, kl_loss, top_k_targets

VOCABULARY = 9
LABELS = torch.tensor([[-100, 2, 3, -100, 0], [-100, 1, 1, 1, 4]])


def logits(seed: int, dtype: torch.dtype = torch.float64, size: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, 2, 5, VOCABULARY, generator=generator, dtype=torch.float64) * size
    return both[0].to(dtype), both[1].to(dtype)


def by_hand(s: Tensor, t: Tensor, k: int, temperature: float) -> float:
    """KL between two lists of k + 1 probabilities per position, in Python floats."""
    total, count = 0.0, 0
    for b in range(2):
        for i in range(4):
            if LABELS[b, i + 1] == -100:
                continue
            ps, pt = (torch.softmax(x[b, i] / temperature, -1).tolist() for x in (s.detach().double(), t.double()))
            order = sorted(range(VOCABULARY), key=lambda v: -pt[v])
            lumped = [[*[p[v] for v in order[:k]], sum(p[v] for v in order[k:])] for p in (pt, ps)]
            total += sum(p * math.log(p / q) for p, q in zip(*lumped, strict=True) if p > 0)
            count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1, VOCABULARY])
def test_value_and_gradient(k: int, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ft.distillation.head._PER_BLOCK_AND_THREAD", block)
    s, t = logits(0)
    targets = top_k_targets(t, k, temperature=temperature, dtype=torch.float64, chunk=3)
    s.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return kl_loss(x, targets, LABELS, temperature=temperature, chunk=3)

    torch.testing.assert_close(loss(s).item(), by_hand(s, t, k, temperature))
    assert torch.autograd.gradcheck(loss, s)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_with_the_whole_vocabulary_it_is_the_full_kl(temperature: float) -> None:
    s, t = logits(1, torch.float32)
    targets = top_k_targets(t, VOCABULARY, temperature=temperature)
    one, other = s.clone().requires_grad_(), s.clone().requires_grad_()
    full = kl_loss(one, t, LABELS, temperature=temperature)
    short = kl_loss(other, targets, LABELS, temperature=temperature)
    torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-6)
    full.backward()
    short.backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_lumping_more_loses_more_and_never_gains(seed: int, size: float) -> None:
    s, t = logits(seed, size=size)
    values = [kl_loss(s, top_k_targets(t, k, dtype=torch.float64), LABELS) for k in range(1, VOCABULARY + 1)]
    values.append(kl_loss(s, t, LABELS))
    assert values[0] >= -1e-9
    assert all(first <= second + 1e-9 for first, second in pairwise(values))


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    _, t = logits(2)
    s = t.clone().requires_grad_()
    value = kl_loss(s, top_k_targets(t, 3, dtype=torch.float64), LABELS)
    value.backward()
    assert abs(value) < 1e-12 and s.grad.abs().max() < 1e-12


def test_through_heads_and_beside_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, 2, 5, 4, generator=generator, dtype=torch.float64).unbind()
    weight, other = torch.randn(2, VOCABULARY, 4, generator=generator, dtype=torch.float64).unbind()
    head, teacher_head = Head(weight.requires_grad_()), Head(other, scale=0.5)
    targets = top_k_targets(theirs, 4, head=teacher_head, dtype=torch.float64, chunk=2)
    same = top_k_targets(theirs @ other.T * 0.5, 4, dtype=torch.float64)
    assert torch.equal(targets.indices, same.indices)
    torch.testing.assert_close(targets.log_probs, same.log_probs)
    torch.testing.assert_close(targets.tail, same.tail)
    hidden.requires_grad_()
    out = ce_kl_loss(hidden, LABELS, teacher=targets, head=head, ce_weight=0.5, kl_weight=2.0, chunk=2)
    plain = hidden @ weight.T
    wanted = 0.5 * ce_kl_loss(plain, LABELS).total + 2 * kl_loss(plain, same, LABELS)
    torch.testing.assert_close(out.total, wanted)
    for one, two in zip(
        torch.autograd.grad(out.total, [hidden, weight]), torch.autograd.grad(wanted, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_what_is_stored() -> None:
    _, t = logits(3)
    targets = top_k_targets(t, 4, temperature=2.0, chunk=3)
    probabilities = torch.softmax(t / 2, -1)
    sorted_ones, order = probabilities.sort(-1, descending=True)
    assert targets.log_probs.shape == (2, 5, 4) and targets.tail.shape == (2, 5) and targets.temperature == 2.0
    assert targets.log_probs.dtype == torch.float32 and targets.indices.dtype == torch.int32
    assert torch.equal(targets.indices.long(), order[..., :4])
    torch.testing.assert_close(targets.log_probs.exp(), sorted_ones[..., :4].float())
    torch.testing.assert_close(targets.tail.exp(), sorted_ones[..., 4:].sum(-1).float())


def test_a_tiny_tail_is_not_lost_to_rounding() -> None:
    t = torch.tensor([[[40.0, 0.0, 0.0]]])
    targets = top_k_targets(t, 1)
    torch.testing.assert_close(targets.tail.item(), math.log(2) - 40.0)


def test_targets_in_bf16_are_a_distribution_again() -> None:
    s, t = logits(4, torch.float32, size=5.0)
    exact = top_k_targets(t, 5)
    rounded = top_k_targets(t, 5, dtype=torch.bfloat16)
    assert rounded.tail.dtype == rounded.log_probs.dtype == torch.bfloat16
    torch.testing.assert_close(kl_loss(s, rounded, LABELS), kl_loss(s, exact, LABELS), rtol=2e-2, atol=1e-2)
    assert kl_loss(t, rounded, LABELS) >= 0
    x = s.clone().requires_grad_()
    kl_loss(x, rounded, LABELS).backward()
    assert x.grad.sum(-1).abs().max() < 1e-6  # the gradient of a softmax against a distribution


def test_low_precision_student_and_positions_without_label() -> None:
    s, t = logits(5, torch.float32)
    targets = top_k_targets(t, 3)
    nothing = torch.full_like(LABELS, -100)
    x = s.bfloat16().requires_grad_()
    value = kl_loss(x, targets, nothing)
    value.backward()
    assert value == 0 and not x.grad.any()
    torch.testing.assert_close(kl_loss(s.bfloat16(), targets, LABELS).item(), by_hand(s.bfloat16(), t, 3, 1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: top_k_targets(t, 0), "k is 0 but the vocabulary has 9"),
        (lambda s, t: top_k_targets(t, 10), "k is 10 but the vocabulary has 9"),
        (lambda s, t: top_k_targets(t, 2, temperature=0.0), "temperature is 0"),
        (lambda s, t: kl_loss(s, top_k_targets(t, 2), LABELS, temperature=2.0), "made at temperature 1.0.* at 2.0"),
        (lambda s, t: kl_loss(s[..., :4], top_k_targets(t, 5), LABELS), "hold 5 entries per token .* has 4"),
        (lambda s, t: kl_loss(s, top_k_targets(t[:, :4], 2), LABELS), r"labels have shape \(2, 5\) but the teacher's"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*logits(0))


def test_targets_are_plain_tensors() -> None:
    s, t = logits(6)
    made = top_k_targets(t, 3, dtype=torch.float64)
    loaded = TopK(made.log_probs.clone(), made.indices.long(), made.tail.clone(), 1.0)
    assert torch.equal(kl_loss(s, loaded, LABELS), kl_loss(s, made, LABELS))
