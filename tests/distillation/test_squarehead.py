"""SquareHead against the formula written out with loops, and the properties it is meant to have."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor

from sparse_ft.distillation import squarehead_layer, squarehead_loss, teacher_energy

LAYERS, BATCH, LENGTH, WIDTH = 3, 2, 5, 4
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
EPS = 0.0078125


def states(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """One layer ten times as large as the one before."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, LENGTH, WIDTH)
    return [(torch.randn(*shape, generator=generator, dtype=torch.float64) * 10**n).to(dtype) for n in range(LAYERS)]


def by_hand(student: list[Tensor], teacher: list[Tensor], mask: Tensor, eps: float = EPS) -> list[float]:
    """One ratio per layer, entry by entry in Python floats."""
    ratios = []
    for s, t in zip(student, teacher, strict=True):
        kept = [(b, i) for b in range(mask.shape[0]) for i in range(mask.shape[1]) if mask[b, i]]
        error = [(s[b, i, c].item() - float(t[b, i, c])) ** 2 for b, i in kept for c in range(s.shape[-1])]
        energy = [float(t[b, i, c]) ** 2 for b, i in kept for c in range(s.shape[-1])]
        ratios.append((sum(error) / len(error)) / (sum(energy) / len(energy) + eps))
    return ratios


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def test_it_is_the_sum_over_layers_of_the_ratios() -> None:
    s, t = states(0), states(1)
    out = squarehead_loss(s, t, MASK)
    wanted = by_hand(s, t, MASK)
    torch.testing.assert_close(out.layers, torch.tensor(wanted, dtype=torch.float64))
    torch.testing.assert_close(out.total, torch.tensor(sum(wanted), dtype=torch.float64))


def test_weights_multiply_layers_and_zero_switches_one_off_but_logs_it() -> None:
    s, t = leaves(states(0)), states(1)
    out = squarehead_loss(s, t, MASK, weights=[0.5, 0.0, 2.0])
    wanted = by_hand(s, t, MASK)
    torch.testing.assert_close(out.total.item(), 0.5 * wanted[0] + 2 * wanted[2])
    torch.testing.assert_close(out.layers[1].item(), wanted[1])
    out.total.backward()
    assert s[1].grad is None and s[0].grad is not None and not out.layers.requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(family: str) -> None:
    student, teacher = TINY[family]().eval(), TINY[family]().eval()
    batch = {key: value for key, value in tiny_batch(student).items() if key in ("input_ids", "attention_mask")}
    ours = student(**batch, output_hidden_states=True).hidden_states[1:]
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True).hidden_states[1:]
    out = squarehead_loss(ours, theirs, None)
    assert out.total.item() == 0 and out.layers.tolist() == [0.0] * len(ours)
    out.total.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


def test_states_of_zero_lose_the_share_of_the_energy_that_is_above_eps() -> None:
    t = states(1)
    out = squarehead_loss([torch.zeros_like(x) for x in t], t, MASK)
    energies = [float(x[MASK.bool()].square().mean()) for x in t]
    torch.testing.assert_close(out.layers.tolist(), [e / (e + EPS) for e in energies])
    assert LAYERS - 0.05 < out.total < LAYERS


@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_without_eps_scale_does_not_matter(factor: float) -> None:
    s, t = states(0), states(1)
    scaled = squarehead_loss([x * factor for x in s], [x * factor for x in t], MASK, eps=0.0)
    torch.testing.assert_close(scaled.layers, squarehead_loss(s, t, MASK, eps=0.0).layers)


def test_without_eps_order_does_not_matter() -> None:
    s, t = states(0), states(1)
    plain = squarehead_loss(s, t, MASK, eps=0.0).layers
    tokens, channels, samples = torch.randperm(LENGTH), torch.randperm(WIDTH), torch.tensor([1, 0])
    for reorder in (lambda x: x[:, tokens], lambda x: x[samples]):
        moved = squarehead_loss([reorder(x) for x in s], [reorder(x) for x in t], reorder(MASK), eps=0.0)
        torch.testing.assert_close(moved.layers, plain)
    moved = squarehead_loss([x[..., channels] for x in s], [x[..., channels] for x in t], MASK, eps=0.0)
    torch.testing.assert_close(moved.layers, plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0.0, 1e30, float("nan"), float("inf")])
def test_padding_changes_nothing(side: str, filler: float) -> None:
    def padded(x: Tensor, value: float) -> Tensor:
        pad = torch.full((BATCH, 3, *x.shape[2:]), value, dtype=x.dtype)
        return torch.cat([pad, x] if side == "left" else [x, pad], 1)

    s, t = leaves(states(0)), states(1)
    out = squarehead_loss(s, t, MASK)
    out.total.backward()
    longer = leaves([padded(x.detach(), filler) for x in s])
    other = squarehead_loss(longer, [padded(x, -filler) for x in t], padded(MASK, 0))
    other.total.backward()
    torch.testing.assert_close(other.layers, out.layers)
    for one, two in zip(s, longer, strict=True):
        torch.testing.assert_close(two.grad, padded(one.grad, 0.0))


def test_twice_the_layers_are_twice_the_loss_and_the_mean_times_their_number_is_the_sum() -> None:
    s, t = states(0), states(1)
    once = squarehead_loss(s, t, MASK, eps=0.0)
    torch.testing.assert_close(squarehead_loss(s + s, t + t, MASK, eps=0.0).total, 2 * once.total)
    keep = MASK.bool()
    ratios = [((y - x)[keep] ** 2).sum() / (y[keep] ** 2).sum() for x, y in zip(s, t, strict=True)]
    torch.testing.assert_close(torch.stack(ratios).mean() * LAYERS, once.total)


def test_gradient_is_that_of_the_formula_and_of_finite_differences() -> None:
    s, t = leaves(states(0)), states(1)
    assert torch.autograd.gradcheck(lambda *x: squarehead_loss(x, t, MASK, weights=[1, 2, 3]).total, s)
    squarehead_loss(s, t, MASK).total.backward()
    valid = MASK.bool().unsqueeze(-1)
    for x, y in zip(s, t, strict=True):
        energy = y[MASK.bool()].square().mean()
        torch.testing.assert_close(x.grad, 2 * (x - y).detach() * valid / (MASK.sum() * WIDTH * (energy + EPS)))


def test_teacher_gets_no_gradient() -> None:
    s, t = leaves(states(0)), leaves(states(1))
    squarehead_loss(s, t, MASK).total.backward()
    assert all(x.grad is None for x in t)


def test_no_valid_token_is_a_loss_of_zero_and_a_gradient_of_zero() -> None:
    for eps in (EPS, 0.0):
        s = leaves(states(0))
        out = squarehead_loss(s, states(1), torch.zeros_like(MASK), eps=eps)
        out.total.backward()
        assert out.total == 0 and all(not x.grad.any() for x in s)


def test_no_mask_means_every_token() -> None:
    s, t = states(0), states(1)
    torch.testing.assert_close(squarehead_loss(s, t, None).layers, squarehead_loss(s, t, torch.ones_like(MASK)).layers)


def micro_batches(s: list[Tensor], t: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor], Tensor]]:
    """The rows one by one; they hold 3 and 5 valid tokens."""
    return [([x[r : r + 1] for x in s], [x[r : r + 1] for x in t], MASK[r : r + 1]) for r in range(BATCH)]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_with_the_energy_and_count_of_all_micro_batches_are_one_batch(as_tensor: bool) -> None:
    together, apart, t = leaves(states(0, torch.float32)), leaves(states(0, torch.float32)), states(1, torch.float32)
    whole = squarehead_loss(together, t, MASK)
    whole.total.backward()
    count = MASK.sum() if as_tensor else int(MASK.sum())
    pieces = micro_batches(apart, t)
    energies = [sum(teacher_energy(y[n], m, count=count) for _, y, m in pieces) for n in range(LAYERS)]
    layers = torch.zeros(LAYERS)
    for x, y, mask in pieces:
        out = squarehead_loss(x, y, mask, count=count, energies=energies)
        out.total.backward()
        layers += out.layers
    torch.testing.assert_close(layers, whole.layers, rtol=1e-6, atol=0)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_with_the_count_of_all_micro_batches_are_weighted_by_their_tokens() -> None:
    s, t = states(0), states(1)
    values = [squarehead_loss(x, y, m, count=8).layers for x, y, m in micro_batches(s, t)]
    first, second = ([torch.tensor(by_hand(x, y, m)) for x, y, m in micro_batches(s, t)][r] for r in range(BATCH))
    torch.testing.assert_close(values[0] + values[1], (3 * first + 5 * second) / 8, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_squared_and_summed_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    t = (torch.randn(4, 512, 64, generator=generator) * 300).to(dtype)  # squares beyond fp16, sums beyond bf16
    s = (t + torch.randn(t.shape, generator=generator)).to(dtype).requires_grad_()
    out = squarehead_loss([s], [t], None)
    exact = (s.double() - t.double()).square().mean() / (t.double().square().mean() + EPS)
    torch.testing.assert_close(out.total.double(), exact, rtol=1e-5, atol=0)
    assert out.total.dtype == torch.float32
    (out.total * 2.0**24).backward()
    wanted = 2.0**25 * (s.double() - t.double()) / (t.numel() * (t.double().square().mean() + EPS))
    assert s.grad.dtype == dtype
    torch.testing.assert_close(s.grad.double(), wanted.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_autocast_does_not_change_it() -> None:
    s, t = states(0, torch.float32), states(1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = squarehead_loss(s, t, MASK)
    assert torch.equal(inside.layers, squarehead_loss(s, t, MASK).layers)


def test_teacher_may_have_another_dtype() -> None:
    s, t = states(0, torch.float32), [x.bfloat16() for x in states(1)]
    torch.testing.assert_close(squarehead_loss(s, t, MASK).layers, torch.tensor(by_hand(s, t, MASK)), rtol=1e-5, atol=0)


def test_backward_keeps_one_tensor_of_the_students_dtype_and_not_the_teacher() -> None:
    saved: list[Tensor] = []
    s = torch.randn(2, 8, 16).bfloat16().requires_grad_()
    t = torch.randn(2, 8, 16).bfloat16()
    alive = weakref.ref(t)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = squarehead_layer(s, t, None)
    large = [x for x in saved if x.numel() >= s.numel()]
    assert [x.dtype for x in large] == [torch.bfloat16] and t is not large[0]
    saved.clear()
    del large, t
    gc.collect()
    assert alive() is None
    loss.backward()
    assert s.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    s, t = states(0), states(1)
    with pytest.raises(ValueError, match=r"3 student layers but of 2 teacher layers.*layer_pairs"):
        squarehead_loss(s, t[:2], MASK)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\) but the teacher's have \(2, 5, 3\)"):
        squarehead_loss(s, [x[..., :3] for x in t], MASK)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 5, 5\).*\(2, 5\)"):
        squarehead_loss(s, t, torch.ones(2, 1, 5, 5))
    with pytest.raises(ValueError, match=r"2 layer weights for 3 layers"):
        squarehead_loss(s, t, MASK, weights=[1, 1])
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"weights are finite and at least 0"):
            squarehead_loss(s, t, MASK, weights=[1, weight, 1])
    with pytest.raises(ValueError, match=r"1 energies for 3 layers"):
        squarehead_loss(s, t, MASK, energies=[1.0])
    with pytest.raises(ValueError, match=r"eps is -1"):
        squarehead_loss(s, t, MASK, eps=-1.0)
    with pytest.raises(ValueError, match=r"0 layers"):
        squarehead_loss([], [], MASK)
