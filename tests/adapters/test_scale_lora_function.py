"""`scale_lora_linear` against formulas written out here: values, gradients, dtypes, and what it keeps in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters import mask_lora_linear, scale_lora_linear, scale_lora_weight

LAYOUTS = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
PARTS = pytest.mark.parametrize("change_only", [False, True], ids=["whole", "change"])
OUT, IN, RANK = 6, 10, 3


def problem(fan_in_fan_out: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Half-empty W, random A and B."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (IN, OUT) if fan_in_fan_out else (OUT, IN)
    return {
        "x": normal(2, 5, IN),
        "weight": normal(*shape) * (torch.rand(*shape, generator=generator) > 0.5),
        "bias": normal(OUT),
        "lora_A": normal(RANK, IN),
        "lora_B": normal(OUT, RANK),
    }


def reference(p: dict[str, Tensor], fan_in_fan_out: bool, change_only: bool = False) -> Tensor:
    """The definition, for autograd to differentiate."""
    factor = torch.einsum("or,ri->oi", p["lora_B"], p["lora_A"]) - (1 if change_only else 0)
    weight = p["weight"].T if fan_in_fan_out else p["weight"]
    return torch.einsum("bti,oi->bto", p["x"], weight * factor) + p["bias"]


def run(p: dict[str, Tensor], fan_in_fan_out: bool, change_only: bool = False) -> Tensor:
    return scale_lora_linear(**p, change_only=change_only, fan_in_fan_out=fan_in_fan_out)


def gradients(function: Callable[[dict[str, Tensor]], Tensor], p: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in p.items() if n != "weight"}
    output = function({**p, **leaves})
    torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).mul(output).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@LAYOUTS
@PARTS
def test_values_and_gradients_are_those_of_the_definition(fan_in_fan_out: bool, change_only: bool) -> None:
    p = problem(fan_in_fan_out)
    wanted = reference(p, fan_in_fan_out, change_only)
    torch.testing.assert_close(run(p, fan_in_fan_out, change_only), wanted, rtol=1e-12, atol=1e-12)
    ours = gradients(lambda q: run(q, fan_in_fan_out, change_only), p)
    expected = gradients(lambda q: reference(q, fan_in_fan_out, change_only), p)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@LAYOUTS
@PARTS
def test_gradients_match_finite_differences(fan_in_fan_out: bool, change_only: bool) -> None:
    p = problem(fan_in_fan_out)

    def function(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return scale_lora_linear(x, p["weight"], bias, A, B, change_only=change_only, fan_in_fan_out=fan_in_fan_out)

    inputs = tuple(p[name].requires_grad_() for name in ("x", "bias", "lora_A", "lora_B"))
    assert torch.autograd.gradcheck(function, inputs)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_factor_one_is_the_plain_layer_bit_for_bit(fan_in_fan_out: bool, dtype: torch.dtype, autocast: bool) -> None:
    p = problem(fan_in_fan_out, dtype)
    layer: torch.nn.Module = Conv1D(OUT, IN) if fan_in_fan_out else torch.nn.Linear(IN, OUT)
    layer.weight.data, layer.bias.data = p["weight"], p["bias"]
    # 1 / sqrt(r) is exact for r = 4; for r = 3 the product of fp32 factors is 1 to 1e-7, which 16 bits do not see
    for r in (1, 3, 4, 5, 16) if dtype in (torch.bfloat16, torch.float16) else (1, 4, 16):
        A, B = torch.full((r, IN), r**-0.5), torch.full((OUT, r), r**-0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            plain = layer(p["x"])
            ours = scale_lora_linear(p["x"], p["weight"], p["bias"], A, B, fan_in_fan_out=fan_in_fan_out)
            change = scale_lora_linear(p["x"], p["weight"], None, A, B, change_only=True, fan_in_fan_out=fan_in_fan_out)
        assert ours.dtype == change.dtype == plain.dtype
        assert torch.equal(ours, plain)
        assert change.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_effective_weight_is_the_merged_one_bit_for_bit(dtype: torch.dtype) -> None:
    p = problem(False, torch.float32)
    weight = p["weight"].to(dtype)
    merged = scale_lora_weight(weight.float(), p["lora_A"], p["lora_B"]).to(dtype)
    seen = scale_lora_linear(torch.eye(IN, dtype=dtype), weight, None, p["lora_A"], p["lora_B"])
    assert torch.equal(seen, merged.T)


@LAYOUTS
def test_weight_gradient_at_pruned_positions_has_no_influence(fan_in_fan_out: bool) -> None:
    p = problem(fan_in_fan_out)
    row, column = 2, 7
    outputs_first = p["weight"].T if fan_in_fan_out else p["weight"]
    outputs_first[row] = 0
    outputs_first[:, column] = 0
    found = gradients(lambda q: run(q, fan_in_fan_out), p)
    assert not found["lora_B"][row].any()
    assert not found["lora_A"][:, column].any()
    changed = {**p, "x": p["x"].clone()}
    changed["x"][..., column] += 100  # moves G only in a column that is pruned everywhere
    again = gradients(lambda q: run(q, fan_in_fan_out), changed)
    assert torch.equal(found["lora_A"], again["lora_A"])
    assert torch.equal(found["lora_B"], again["lora_B"])


@LAYOUTS
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept_but_the_weight(fan_in_fan_out: bool, weight_dtype: torch.dtype) -> None:
    p = problem(fan_in_fan_out, torch.float32)
    weight = p["weight"] = p["weight"].to(weight_dtype)
    p["x"] = p["x"][:, :4]  # 8 rows: no activation has the shape of W
    for name in ("x", "bias", "lora_A", "lora_B"):
        p[name] = p[name].detach().requires_grad_()
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def of_this_shape() -> int:
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape == weight.shape for thing in gc.get_objects())

    before = of_this_shape()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(p, fan_in_fan_out)
    assert output.requires_grad
    assert [t.data_ptr() for t in saved if t.shape == weight.shape] == [weight.data_ptr()]
    saved.clear()
    assert of_this_shape() <= before


@pytest.mark.parametrize("function", ["mask", "scale"])
@LAYOUTS
def test_a_function_that_makes_the_weight_stands_for_it(function: str, fan_in_fan_out: bool) -> None:
    p = problem(fan_in_fan_out)
    weight, calls = p.pop("weight"), []

    def make() -> Tensor:
        calls.append(1)
        return weight.clone()

    def run_with(given: Tensor | Callable[[], Tensor], q: dict[str, Tensor]) -> Tensor:
        if function == "scale":
            return scale_lora_linear(weight=given, **q, fan_in_fan_out=fan_in_fan_out)
        return mask_lora_linear(weight=given, **q, mask=weight != 0, scaling=0.5, fan_in_fan_out=fan_in_fan_out)

    assert torch.equal(run_with(make, p), run_with(weight, p))
    assert len(calls) == 1
    ours, expected = (gradients(lambda q, given=given: run_with(given, q), p) for given in (make, weight))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert len(calls) == 3  # once in each pass


def test_frozen_inputs_get_no_gradient() -> None:
    p = problem(False)
    p["lora_B"].requires_grad_()
    run(p, False).sum().backward()
    assert p["lora_B"].grad is not None
    assert all(p[name].grad is None for name in ("x", "bias", "lora_A", "weight"))


@pytest.mark.parametrize("around_backward", [False, True])
def test_autocast_around_backward_changes_nothing(around_backward: bool) -> None:
    p = problem(False, torch.float32)
    x, A, B = (p[name].requires_grad_() for name in ("x", "lora_A", "lora_B"))
    y = run(p, False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_backward):
        y.sum().backward()
    G = (torch.ones(OUT, 10) @ x.detach().view(-1, IN)) * p["weight"]
    torch.testing.assert_close(A.grad, B.detach().T @ G)
    torch.testing.assert_close(B.grad, G @ A.detach().T)


def test_autocast_is_close_to_full_precision_and_gradients_stay_fp32() -> None:
    p = problem(False, torch.float32)
    for name in ("x", "lora_A", "lora_B"):
        p[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(p, False)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(p, False), rtol=0.05, atol=0.15)
    y.float().sum().backward()
    assert p["lora_A"].grad.dtype == p["lora_B"].grad.dtype == p["x"].grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    p = problem(False)

    def checkpointed(q: dict[str, Tensor]) -> Tensor:
        return checkpoint(lambda x: torch.tanh(run({**q, "x": x}, False)), q["x"], use_reentrant=use_reentrant)

    plain = gradients(lambda q: torch.tanh(run(q, False)), p)
    torch.testing.assert_close(gradients(checkpointed, p), plain, rtol=0, atol=0)


def test_empty_batch() -> None:
    p = problem(False)
    p["x"] = torch.zeros(0, IN, dtype=torch.float64)
    p["lora_B"].requires_grad_()
    y = run(p, False)
    y.sum().backward()
    assert y.shape == (0, OUT)
    assert not p["lora_B"].grad.any()
