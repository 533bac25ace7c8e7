"""Cross-entropy and KL, from logits and through heads, against plain autograd; and what is never made on the way."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ft.distillation import Head, ce_kl_loss, kl_loss, loss_positions, squarehead_loss

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 5, 4, 7
LABELS = torch.tensor([[-100, -100, 3, 6, 0], [-100, 2, 1, -100, 4]])


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student": normal(BATCH, LENGTH, WIDTH),
        "weight": normal(VOCABULARY, WIDTH),
        "bias": normal(VOCABULARY),
        "teacher": normal(BATCH, LENGTH, WIDTH + 1),
        "teacher_weight": normal(VOCABULARY, WIDTH + 1),
    }


def with_head(p: dict[str, Tensor], scale: float = 1.0, softcap: float | None = None, **keywords: Any) -> Any:
    """`ce_kl_loss` of a problem, through both heads."""
    head = Head(p["weight"], p["bias"], scale, softcap)
    theirs = Head(p["teacher_weight"], softcap=softcap)
    labels = keywords.pop("labels", LABELS)
    return ce_kl_loss(p["student"], labels, teacher=p["teacher"], head=head, teacher_head=theirs, **keywords)


def reference(
    p: dict[str, Tensor],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    shift: bool = True,
    labels: Tensor = LABELS,
) -> Tensor:
    """The definition with all logits at once, probabilities written out, for autograd to differentiate."""
    s = scale * (torch.einsum("bth,vh->btv", p["student"], p["weight"]) + p["bias"])
    t = torch.einsum("bth,vh->btv", p["teacher"], p["teacher_weight"])
    if softcap is not None:
        s, t = (softcap * torch.tanh(z / softcap) for z in (s, t))
    if shift:
        s, t, labels = s[:, :-1], t[:, :-1], labels[:, 1:]
    keep = labels != -100
    s, t, labels = s[keep], t[keep], labels[keep]
    ce = F.cross_entropy(s, labels, label_smoothing=label_smoothing)
    ps, pt = ((z / temperature).exp() / (z / temperature).exp().sum(-1, keepdim=True) for z in (s, t))
    kl = temperature**2 * (pt * (pt.log() - ps.log())).sum() / len(labels)
    return ce_weight * ce + kl_weight * kl


def gradients(function: Callable[..., Tensor], p: dict[str, Tensor], **keywords: Any) -> dict[str, Tensor]:
    leaves = {n: p[n].clone().requires_grad_() for n in ("student", "weight", "bias")}
    function({**p, **leaves}, **keywords).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


CASES: dict[str, dict[str, Any]] = {
    "both": {},
    "ce": {"kl_weight": 0.0},
    "kl": {"ce_weight": 0.0},
    "temperature": {"temperature": 3.0, "ce_weight": 0.0},
    "all": {"temperature": 0.5, "ce_weight": 0.3, "kl_weight": 2.0, "label_smoothing": 0.1},
    "smoothing": {"label_smoothing": 0.2, "kl_weight": 0.0},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": 0.25, "softcap": 1.5, "temperature": 2.0},
    "aligned": {"shift": False},
}


@pytest.mark.parametrize("block", [1, None])
@pytest.mark.parametrize("chunk", [1, 3, 6, 100, None])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_plain_form(
    case: str, chunk: int | None, block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block is not None:  # a position at a time inside a chunk
        monkeypatch.setattr("sparse_ft.distillation.head._PER_BLOCK_AND_THREAD", block)
    p = problem()
    torch.testing.assert_close(with_head(p, chunk=chunk, **CASES[case]).total, reference(p, **CASES[case]))
    ours = gradients(lambda q, **k: 1.5 * with_head(q, **k).total, p, chunk=chunk, **CASES[case])
    theirs = gradients(lambda q, **k: 1.5 * reference(q, **k), p, **CASES[case])
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case: str) -> None:
    p = problem()
    names = ("student", "weight", "bias")

    def total(*leaves: Tensor) -> Tensor:
        return with_head({**p, **dict(zip(names, leaves, strict=True))}, **CASES[case]).total

    assert torch.autograd.gradcheck(total, [p[name].requires_grad_() for name in names])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_any_chunk_gives_the_fp32_result_of_one(chunk: int, seed: int) -> None:
    p = problem(torch.float32, seed)
    one, many = with_head(p, chunk=100), with_head(p, chunk=chunk)
    torch.testing.assert_close(torch.stack(many), torch.stack(one), rtol=1e-6, atol=1e-7)
    first, other = (gradients(lambda q, **k: with_head(q, **k).total, p, chunk=n) for n in (100, chunk))
    for name in first:
        torch.testing.assert_close(other[name], first[name], rtol=1e-5, atol=1e-6)


def test_logits_in_place_of_states_and_head() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, BATCH, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64).unbind()
    s.requires_grad_()
    value = kl_loss(s, t, LABELS, temperature=2.0, chunk=2)
    keep = LABELS[:, 1:] != -100
    plain = F.kl_div(
        F.log_softmax(s[:, :-1][keep] / 2, -1),
        F.log_softmax(t[:, :-1][keep] / 2, -1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(value, 4 * plain)
    (wanted,) = torch.autograd.grad(4 * plain, s)
    torch.testing.assert_close(torch.autograd.grad(value, s)[0], wanted)
    assert not wanted[:, -1].any()
    torch.testing.assert_close(
        ce_kl_loss(s, LABELS).total, F.cross_entropy(s[:, :-1].reshape(-1, VOCABULARY), LABELS[:, 1:].reshape(-1))
    )


def test_values_for_logs_are_the_parts_of_the_total() -> None:
    out = with_head({**problem(), "student": problem()["student"].requires_grad_()}, ce_weight=0.25, kl_weight=3.0)
    torch.testing.assert_close(out.total, 0.25 * out.ce + 3 * out.kl)
    assert out.total.requires_grad and not out.ce.requires_grad and not out.kl.requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2"])
def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient(family: str) -> None:
    model = TINY[family]().eval()
    batch = tiny_batch(model)
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    weight = model.get_output_embeddings().weight
    teacher = Head(weight.detach().clone())
    for temperature in (1.0, 2.5):
        value = kl_loss(
            hidden,
            hidden.detach().clone(),
            batch["input_ids"],
            student_head=Head(weight),
            teacher_head=teacher,
            temperature=temperature,
        )
        assert value.item() == 0
        to_hidden, to_weight = torch.autograd.grad(value, [hidden, weight], retain_graph=True)
        assert not to_hidden.any() and not to_weight.any()


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "neox"])
def test_cross_entropy_through_the_head_is_the_models_own(family: str) -> None:
    model = TINY[family]().eval()
    batch = tiny_batch(model)
    labels = batch["input_ids"].clone()
    labels[0, :4] = -100
    own = model(input_ids=batch["input_ids"], labels=labels).loss
    wanted = torch.autograd.grad(own, list(model.parameters()))
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    head = model.get_output_embeddings()
    ours = ce_kl_loss(hidden, labels, head=Head(head.weight, getattr(head, "bias", None)), chunk=3).total
    torch.testing.assert_close(ours, own)
    for one, other in zip(torch.autograd.grad(ours, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_positions_are_those_of_cross_entropy() -> None:
    positions, targets = loss_positions(LABELS)
    assert targets.tolist() == [3, 6, 0, 2, 1, 4] and positions.tolist() == [1, 2, 3, 5, 6, 8]
    generator = torch.Generator().manual_seed(0)
    labels = torch.where(torch.rand(7, 13, generator=generator) < 0.4, -100, 5)
    labels[:, 0] = 5  # a label no position predicts
    logits = torch.zeros(7, 13, 9)
    counted = F.cross_entropy(logits[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1), reduction="sum") / math.log(9)
    assert len(loss_positions(labels)[0]) == round(counted.item())
    assert len(loss_positions(labels, shift=False)[0]) == int((labels != -100).sum())
    assert loss_positions(torch.tensor([[0, 0, 8]]), ignore_index=0)[1].tolist() == [8]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    def padded(x: Tensor, value: float) -> Tensor:
        pad = torch.full((BATCH, 3, *x.shape[2:]), value, dtype=x.dtype)
        return torch.cat([pad, x] if side == "left" else [x, pad], 1)

    p = problem()
    longer = {**p, "student": padded(p["student"], float("nan")), "teacher": padded(p["teacher"], float("inf"))}
    torch.testing.assert_close(with_head(longer, labels=padded(LABELS, -100)).total, with_head(p).total)
    plain = gradients(lambda q: with_head(q).total, p)
    other = gradients(lambda q: with_head(q, labels=padded(LABELS, -100)).total, longer)
    torch.testing.assert_close(other.pop("student"), padded(plain.pop("student"), 0.0))
    torch.testing.assert_close(other, plain)


@pytest.mark.parametrize("num_items", [None, 0, 5, torch.tensor(0)])
def test_no_label_is_a_loss_of_zero_and_a_gradient_of_zero(num_items: Any) -> None:
    labels = torch.full_like(LABELS, -100)
    labels[:, 0] = 3  # nothing predicts a first token
    p = problem()
    assert with_head(p, labels=labels, num_items=num_items).total == 0
    found = gradients(lambda q: with_head(q, labels=labels, num_items=num_items).total, p)
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("count", [6, torch.tensor(6)])
def test_micro_batches_divided_by_the_number_of_all_labels_add_up(count: Any) -> None:
    p = problem()
    rows = [{**p, "student": p["student"][r : r + 1], "teacher": p["teacher"][r : r + 1]} for r in range(BATCH)]
    parts = [with_head(q, labels=LABELS[r : r + 1], num_items=count).total for r, q in enumerate(rows)]
    torch.testing.assert_close(sum(parts), with_head(p).total)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.2, 5.0), st.floats(0.0, 30.0))
def test_kl_is_not_negative(seed: int, temperature: float, size: float) -> None:
    p = problem(torch.float32, seed)
    out = with_head({**p, "student": p["student"] * size}, ce_weight=0.0, temperature=temperature)
    assert -1e-5 <= out.kl < math.inf


def test_at_a_high_temperature_it_is_half_the_variance_of_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 1, 50, 40, generator=generator, dtype=torch.float64).unbind()
    labels = torch.ones(1, 50, dtype=torch.int64)
    value = kl_loss(s, t, labels, temperature=1e3, shift=False)
    torch.testing.assert_close(value, (s - t).var(-1, correction=0).mean() / 2, rtol=1e-2, atol=0)
    assert kl_loss(s.float(), t.float(), labels, temperature=1e6, shift=False).isfinite()


def test_large_logits_stay_finite() -> None:
    s, t = torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)
    s[..., 0], t[..., 1] = 3e4, 2e4
    s = s.bfloat16().requires_grad_()
    value = kl_loss(s, t.bfloat16(), torch.zeros(1, 1, dtype=torch.int64), shift=False)
    value.backward()
    torch.testing.assert_close(value.item(), s[0, 0, 0].item())
    assert s.grad.tolist() == [[[1.0, -1.0, 0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_low_precision_states_and_heads(mixed: bool) -> None:
    exact = problem(torch.bfloat16)
    p = exact if not mixed else {name: value.float() for name, value in exact.items()}
    wide = {name: value.double() for name, value in exact.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = with_head(p, chunk=2)
        found = gradients(lambda q: with_head(q, chunk=2).total, p)
    assert out.total.dtype == torch.float32
    torch.testing.assert_close(out.total.double(), reference(wide), rtol=2e-2, atol=0)
    for name, gradient in gradients(reference, wide).items():
        assert found[name].dtype == p[name].dtype
        torch.testing.assert_close(found[name].double(), gradient, rtol=3e-2, atol=2e-2)


def test_gradients_of_a_bf16_head_are_summed_in_fp32() -> None:
    hidden, weight = torch.ones(1, 4096, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    labels = torch.zeros(1, 4096, dtype=torch.int64)
    out = ce_kl_loss(hidden, labels, head=Head(weight), shift=False, chunk=1, num_items=1)
    out.total.backward()
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]  # a bf16 sum of halves stops growing at 128


@pytest.mark.parametrize("through_head", [False, True])
def test_the_number_of_items_is_not_rounded_to_bf16(through_head: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    items = 300  # 1 / 300 lies between two bf16 numbers
    rounded = torch.tensor(1 / items).bfloat16().item()
    assert abs(rounded * items - 1) > 1.5e-3
    s = torch.randn(1, 256, 64, generator=generator).bfloat16().requires_grad_()
    head = Head(torch.eye(64).bfloat16()) if through_head else None
    labels = torch.randint(0, 64, (1, 256), generator=generator)
    ce_kl_loss(s, labels, head=head, shift=False, num_items=items).total.backward()
    wide = s.detach().double().requires_grad_()
    (F.cross_entropy(wide[0], labels[0], reduction="sum") / items).backward()
    factor = (s.grad.double() * wide.grad).sum() / wide.grad.square().sum()
    assert abs(factor - 1) < 5e-4


def test_only_what_is_trained_gets_gradients() -> None:
    p = problem()
    for name in ("teacher", "teacher_weight", "weight"):
        p[name].requires_grad_()
    with_head(p).total.backward()
    assert p["weight"].grad is not None
    assert all(p[name].grad is None for name in ("student", "bias", "teacher", "teacher_weight"))
    with torch.no_grad():
        assert not with_head(p).total.requires_grad


def test_the_teacher_may_come_from_inference_mode() -> None:
    p = problem(torch.float32)
    with torch.inference_mode():
        theirs = {name: p[name] * 1 for name in ("teacher", "teacher_weight")}
    found = gradients(lambda q: with_head(q).total, {**p, **theirs})
    torch.testing.assert_close(found, gradients(lambda q: with_head(q).total, p))
    s = torch.randn(BATCH, LENGTH, VOCABULARY, requires_grad=True)
    with torch.inference_mode():
        t = torch.randn(BATCH, LENGTH, VOCABULARY)
    kl_loss(s, t, LABELS, temperature=2.0).backward()
    assert s.grad is not None


class Made(TorchDispatchMode):
    """Largest number of entries of a new fp32 tensor, and the largest sum of bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.bytes = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}  # views of these are not new
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.float32:
            self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in self.alive:
            self.alive[storage.data_ptr()] = storage.nbytes()
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.drop, storage.data_ptr())

    def drop(self, pointer: int) -> None:
        self.bytes -= self.alive.pop(pointer, 0)


TOKENS, WORDS, CHANNELS = 512, 1024, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_no_tensor_of_tokens_by_vocabulary_is_made(dtype: torch.dtype, frozen: bool) -> None:
    hidden = torch.randn(1, TOKENS, CHANNELS, dtype=dtype, requires_grad=True)
    weight = torch.randn(WORDS, CHANNELS, dtype=dtype, requires_grad=not frozen)
    theirs, teacher = torch.randn(1, TOKENS, CHANNELS, dtype=dtype), Head(torch.randn(WORDS, CHANNELS, dtype=dtype))
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    head = Head(weight, softcap=30.0)
    with Made() as made:
        out = ce_kl_loss(
            hidden, labels, teacher=theirs, head=head, teacher_head=teacher, temperature=2.0, shift=False, chunk=16
        )
        out.total.backward()
    assert hidden.grad is not None and (weight.grad is None) == frozen
    assert made.largest <= 16 * WORDS
    assert made.peak < TOKENS * WORDS * 4 / 2, f"{made.peak} bytes alive at once"


def test_the_count_sees_what_the_plain_form_makes() -> None:
    hidden, weight = torch.randn(1, TOKENS, CHANNELS, requires_grad=True), torch.randn(WORDS, CHANNELS)
    labels = torch.zeros(1, TOKENS, dtype=torch.int64)
    with Made() as made:
        F.cross_entropy((hidden @ weight.T)[0], labels[0]).backward()
    assert made.largest == TOKENS * WORDS and made.peak >= 2 * TOKENS * WORDS * 4


def test_without_gradients_none_is_made() -> None:
    head = Head(torch.randn(WORDS, 64, requires_grad=True))
    with torch.no_grad(), Made() as made:
        ce_kl_loss(torch.randn(1, 4, 64), torch.zeros(1, 4, dtype=torch.int64), head=head)
    assert made.largest <= 4 * WORDS < head.weight.numel()


def test_bf16_logits_are_not_copied_to_fp32() -> None:
    s = torch.randn(1, TOKENS, WORDS).bfloat16().requires_grad_()
    t, labels = torch.randn(1, TOKENS, WORDS).bfloat16(), torch.zeros(1, TOKENS, dtype=torch.int64)
    with Made() as made:
        kl_loss(s, t, labels, chunk=16).backward()
    assert made.largest <= 16 * WORDS


def test_backward_keeps_gradients_of_the_inputs_sizes_only() -> None:
    sizes: list[torch.Size] = []
    p = problem()
    leaves = {name: p[name].requires_grad_() for name in ("student", "weight", "bias")}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.shape) or x, lambda x: x):
        with_head({**p, **leaves}, chunk=2)
    allowed = {torch.Size([BATCH * LENGTH, WIDTH]), p["weight"].shape, p["bias"].shape, torch.Size([])}
    assert set(sizes) <= allowed


def test_the_whole_loss_through_two_layers_against_finite_differences() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(VOCABULARY, WIDTH).double()
    blocks = [nn.Linear(WIDTH, WIDTH).double() for _ in range(2)]
    ids, mask = torch.randint(0, VOCABULARY, (BATCH, LENGTH)), (LABELS != 4).long()
    teacher_states = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)
    theirs = Head(torch.randn(VOCABULARY, WIDTH, dtype=torch.float64))

    def total(table: Tensor, first: Tensor, second: Tensor, head: Tensor) -> Tensor:
        one = torch.tanh(F.linear(F.embedding(ids, table), first, blocks[0].bias.detach()))
        two = torch.tanh(F.linear(one, second, blocks[1].bias.detach()))
        tokens = ce_kl_loss(
            two,
            LABELS,
            teacher=teacher_states[1],
            head=Head(head),
            teacher_head=theirs,
            kl_weight=0.7,
            temperature=2.0,
            chunk=2,
        )
        return tokens.total + 0.3 * squarehead_loss([one, two], list(teacher_states), mask).total

    # the head is tied to the embeddings in the second check
    leaves = [embed.weight, blocks[0].weight, blocks[1].weight]
    assert torch.autograd.gradcheck(
        total, [*leaves, torch.randn(VOCABULARY, WIDTH, dtype=torch.float64).requires_grad_()]
    )
    assert torch.autograd.gradcheck(lambda table, *rest: total(table, *rest, table), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": LABELS[:, 1:]}, r"labels have shape \(2, 4\) but the student's states have \(2, 5, 7\)"),
        ({"teacher": torch.zeros(2, 5, 9)}, "teacher has 9 logits per token but the student 7"),
        ({"teacher": torch.zeros(2, 4, 7)}, r"the teacher's states have \(2, 4, 7\)"),
        ({"student_head": Head(torch.zeros(3, 4))}, r"student's head has shape \(3, 4\) but its states have 7"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"student": torch.zeros(2, 5, 7), "teacher": torch.zeros(2, 5, 7), "labels": LABELS}
    with pytest.raises(ValueError, match=message):
        kl_loss(**{**arguments, **change})


def test_settings_out_of_range_are_refused() -> None:
    logits = torch.zeros(2, 5, 7)
    for change, message in (
        ({"ce_weight": -1.0}, "ce_weight is -1"),
        ({"kl_weight": math.inf}, "kl_weight is inf"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ce_kl_loss(logits, LABELS, **change)
