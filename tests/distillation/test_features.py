"""The plain and the cosine loss against PyTorch's own functions, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ft.distillation import cosine_layer, cosine_loss, mse_loss, squarehead_loss

MASK = torch.tensor([[0, 1, 1], [1, 1, 1]])
LOSSES = pytest.mark.parametrize("loss", [mse_loss, cosine_loss])


def states(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 6, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def reference(loss: Callable, s: Tensor, t: Tensor) -> Tensor:
    s, t = s[MASK.bool()], t[MASK.bool()]
    return F.mse_loss(s, t) if loss is mse_loss else (1 - F.cosine_similarity(s, t, dim=-1)).mean()


@LOSSES
def test_values_and_gradients_are_those_of_pytorch(loss: Callable) -> None:
    t = states(1)
    ours, theirs = ([x.clone().requires_grad_() for x in states(0)] for _ in range(2))
    out = loss(ours, t, MASK, weights=[3.0, 0.5])
    parts = [reference(loss, s, y) for s, y in zip(theirs, t, strict=True)]
    torch.testing.assert_close(out.layers, torch.stack(parts).detach())
    torch.testing.assert_close(out.total, 3 * parts[0] + 0.5 * parts[1])
    out.total.backward()
    (3 * parts[0] + 0.5 * parts[1]).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert torch.autograd.gradcheck(lambda *x: loss(x, t, MASK).total, ours)


@LOSSES
def test_pads_of_any_value_and_batches_without_tokens(loss: Callable) -> None:
    s, t = ([x.clone() for x in states(n)] for n in (0, 1))
    clean = loss(s, t, MASK).total
    for x, y in zip(s, t, strict=True):
        x[0, 0], y[0, 0] = float("nan"), float("inf")
        x.requires_grad_()
    out = loss(s, t, MASK)
    torch.testing.assert_close(out.total.detach(), clean)
    out.total.backward()
    assert all(x.grad.isfinite().all() and not x.grad[0, 0].any() for x in s)
    for x in s:
        x.grad = None
    empty = loss(s, t, torch.zeros_like(MASK))
    empty.total.backward()
    assert empty.total == 0 and not any(x.grad.any() for x in s)


@LOSSES
def test_with_the_count_of_all_micro_batches_add_up(loss: Callable) -> None:
    s, t = states(0), states(1)
    parts = [
        loss([x[r : r + 1] for x in s], [x[r : r + 1] for x in t], MASK[r : r + 1], count=5).layers for r in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], loss(s, t, MASK).layers)


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_compared_in_fp32(loss: Callable, dtype: torch.dtype) -> None:
    s, t = ([x.to(dtype) * 300 for x in states(n, torch.float32)] for n in (0, 1))
    s = [x.requires_grad_() for x in s]
    with torch.autocast("cpu", torch.bfloat16):
        out = loss(s, t, MASK)
    exact = torch.stack([reference(loss, x.double(), y.double()) for x, y in zip(s, t, strict=True)])
    torch.testing.assert_close(out.layers.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss(s, t, MASK)
    assert [x.dtype for x in saved if x.numel() >= s[0].numel()] == [dtype] * 2
    out.total.backward()
    assert all(x.grad.dtype == dtype and x.grad.isfinite().all() for x in s)


@pytest.mark.parametrize("loss", [mse_loss, cosine_loss, squarehead_loss])
def test_the_teacher_may_come_from_inference_mode_and_stays_as_it_was(loss: Callable) -> None:
    with torch.inference_mode():
        t = states(1)
    s = [x.requires_grad_() for x in states(0)]
    before = [x.detach().clone() for x in s]
    loss(s, t, MASK).total.backward()
    assert all(torch.equal(x, y) for x, y in zip(t, states(1), strict=True))
    assert all(x.grad is not None and torch.equal(x, y) for x, y in zip(s, before, strict=True))


def test_cosine_does_not_see_lengths_but_the_plain_error_does() -> None:
    s, t = states(0), states(1)
    longer = [3 * x for x in s]
    torch.testing.assert_close(cosine_loss(longer, t, MASK).layers, cosine_loss(s, t, MASK).layers)
    scaled = mse_loss(longer, [3 * x for x in t], MASK).layers
    torch.testing.assert_close(scaled, 9 * mse_loss(s, t, MASK).layers)


def test_cosine_of_states_of_zero_is_one_without_gradient() -> None:
    s = torch.zeros(1, 2, 6, requires_grad=True)
    loss = cosine_layer(s, torch.randn(1, 2, 6), None)
    loss.backward()
    assert loss == 1 and not s.grad.any()
    assert cosine_layer(torch.randn(1, 2, 6), torch.zeros(1, 2, 6), None) == 1


@LOSSES
def test_what_does_not_fit_is_refused(loss: Callable) -> None:
    s, t = states(0), states(1)
    with pytest.raises(ValueError, match="layer_pairs"):
        loss(s, t[:1], MASK)
    with pytest.raises(ValueError, match=r"\(2, 3, 6\) but the teacher's have \(2, 3, 5\)"):
        loss(s, [x[..., :5] for x in t], MASK)
    with pytest.raises(ValueError, match="one value per token"):
        loss(s, t, MASK[:, :2])
