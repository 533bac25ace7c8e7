"""`mask_lora_linear` against formulas written out here: values, gradients, dtypes, and what it keeps in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters import mask_lora_delta, mask_lora_linear
from sparse_ft.masks import keep_bits, mask_

LAYOUTS = pytest.mark.parametrize("fan_in_fan_out", [False, True], ids=["linear", "conv1d"])
OUT, IN, RANK, SCALING = 6, 10, 3, 0.75


def problem(fan_in_fan_out: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Random dense W, half-empty mask, B not zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = (IN, OUT) if fan_in_fan_out else (OUT, IN)
    return {
        "x": normal(2, 5, IN),
        "weight": normal(*shape),
        "bias": normal(OUT),
        "mask": torch.rand(*shape, generator=generator) > 0.5,
        "lora_A": normal(RANK, IN),
        "lora_B": normal(OUT, RANK),
    }


def reference(p: dict[str, Tensor], fan_in_fan_out: bool) -> Tensor:
    """The definition, for autograd to differentiate."""
    product = torch.einsum("or,ri->oi", p["lora_B"], p["lora_A"])
    mask = p["mask"].T if fan_in_fan_out else p["mask"]
    weight = p["weight"].T if fan_in_fan_out else p["weight"]
    effective = weight + SCALING * product * mask
    return torch.einsum("bti,oi->bto", p["x"], effective) + p["bias"]


def run(p: dict[str, Tensor], fan_in_fan_out: bool) -> Tensor:
    return mask_lora_linear(**p, scaling=SCALING, fan_in_fan_out=fan_in_fan_out)


def gradients(function: Callable[[dict[str, Tensor]], Tensor], p: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in p.items() if n not in ("mask", "weight")}
    output = function({**p, **leaves})
    torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output).mul(output).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@LAYOUTS
def test_values_and_gradients_are_those_of_the_definition(fan_in_fan_out: bool) -> None:
    p = problem(fan_in_fan_out)
    torch.testing.assert_close(run(p, fan_in_fan_out), reference(p, fan_in_fan_out), rtol=1e-12, atol=1e-12)
    ours = gradients(lambda q: run(q, fan_in_fan_out), p)
    expected = gradients(lambda q: reference(q, fan_in_fan_out), p)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("with_weight", [True, False])
def test_gradients_match_finite_differences(fan_in_fan_out: bool, with_weight: bool) -> None:
    p = problem(fan_in_fan_out)
    weight, bias = (p["weight"], p["bias"].requires_grad_()) if with_weight else (None, None)

    def function(x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        return mask_lora_linear(x, weight, bias, p["mask"], A, B, SCALING, fan_in_fan_out=fan_in_fan_out)

    inputs = (p["x"].requires_grad_(), bias, p["lora_A"].requires_grad_(), p["lora_B"].requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@LAYOUTS
def test_delta_is_the_masked_product_and_differentiable(fan_in_fan_out: bool) -> None:
    p = problem(fan_in_fan_out)
    A, B = p["lora_A"].requires_grad_(), p["lora_B"].requires_grad_()

    def delta(A: Tensor, B: Tensor) -> Tensor:
        return mask_lora_delta(A, B, p["mask"], SCALING, fan_in_fan_out=fan_in_fan_out)

    product = SCALING * (B @ A)
    expected = (product.T if fan_in_fan_out else product) * p["mask"]
    torch.testing.assert_close(delta(A, B), expected)
    assert not delta(A, B)[~p["mask"]].any()
    assert torch.autograd.gradcheck(delta, (A, B))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_step_zero_is_the_plain_layer_bit_for_bit(fan_in_fan_out: bool, dtype: torch.dtype, autocast: bool) -> None:
    p = problem(fan_in_fan_out, dtype)
    layer: torch.nn.Module = Conv1D(OUT, IN) if fan_in_fan_out else torch.nn.Linear(IN, OUT)
    layer.weight.data, layer.bias.data = p["weight"], p["bias"]
    A, B = p["lora_A"].float(), torch.zeros(OUT, RANK)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = layer(p["x"])
        ours = mask_lora_linear(p["x"], p["weight"], p["bias"], p["mask"], A, B, SCALING, fan_in_fan_out=fan_in_fan_out)
    assert ours.dtype == plain.dtype
    assert torch.equal(ours, plain)


@LAYOUTS
def test_weight_gradient_at_pruned_positions_has_no_influence(fan_in_fan_out: bool) -> None:
    p = problem(fan_in_fan_out)
    row, column = 2, 7
    outputs_first = p["mask"].T if fan_in_fan_out else p["mask"]
    outputs_first[row] = False
    outputs_first[:, column] = False
    found = gradients(lambda q: run(q, fan_in_fan_out), p)
    assert not found["lora_B"][row].any()
    assert not found["lora_A"][:, column].any()
    changed = {**p, "x": p["x"].clone()}
    changed["x"][..., column] += 100  # moves G only in a column that is pruned everywhere
    again = gradients(lambda q: run(q, fan_in_fan_out), changed)
    assert torch.equal(found["lora_A"], again["lora_A"])
    assert torch.equal(found["lora_B"], again["lora_B"])


def tensors_of_shape(shape: torch.Size) -> int:
    gc.collect()
    return sum(type(thing) is Tensor and thing.shape == shape for thing in gc.get_objects())


@LAYOUTS
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_weights_size_is_kept_but_the_weight(fan_in_fan_out: bool, weight_dtype: torch.dtype) -> None:
    p = problem(fan_in_fan_out, torch.float32)
    weight = p["weight"] = p["weight"].to(weight_dtype)
    for name in ("x", "bias", "lora_A", "lora_B"):
        p[name].requires_grad_()
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        run(p, fan_in_fan_out).sum()
    large = [t for t in saved if t.numel() >= OUT * IN and t.is_floating_point() and t.shape != p["x"].shape]
    assert [t.data_ptr() for t in large] == [weight.data_ptr()]
    assert any(t.dtype == torch.int8 and t.numel() == OUT * IN for t in saved)  # the mask, one byte per weight
    # nor is it kept elsewhere: of this shape there are W, its mask and the mask's bits, with and without an output
    p["x"] = p["x"].detach()[:, :4].requires_grad_()  # 8 rows: no activation has the shape of W
    before = tensors_of_shape(weight.shape)
    output = run(p, fan_in_fan_out)
    assert output.requires_grad
    assert tensors_of_shape(weight.shape) <= before + 1, "only the bits of the mask may be new"


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
    product = (torch.ones(OUT, 10) @ x.detach().view(-1, IN)) * p["mask"] * SCALING
    torch.testing.assert_close(A.grad, B.detach().T @ product)
    torch.testing.assert_close(B.grad, product @ A.detach().T)


def test_autocast_is_close_to_full_precision_and_gradients_stay_fp32() -> None:
    p = problem(False, torch.float32)
    p["weight"] *= p["mask"]
    for name in ("x", "lora_A", "lora_B"):
        p[name].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(p, False)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference(p, False).float(), rtol=0.05, atol=0.15)
    y.float().sum().backward()
    assert p["lora_A"].grad.dtype == p["lora_B"].grad.dtype == p["x"].grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    p = problem(False)

    def checkpointed(q: dict[str, Tensor]) -> Tensor:
        def layer(x: Tensor) -> Tensor:
            return torch.tanh(run({**q, "x": x}, False))

        return checkpoint(layer, q["x"], use_reentrant=use_reentrant)

    torch.testing.assert_close(
        gradients(checkpointed, p), gradients(lambda q: torch.tanh(run(q, False)), p), rtol=0, atol=0
    )


def test_bool_and_prepared_masks_are_the_same() -> None:
    p = problem(False)
    assert torch.equal(run(p, False), run({**p, "mask": keep_bits(p["mask"])}, False))
    with pytest.raises(ValueError, match=r"must be torch.bool, got torch.float64"):
        run({**p, "mask": p["mask"].double()}, False)


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.lists(st.tuples(st.floats(width=16), st.booleans()), min_size=1, max_size=20),
)
def test_masking_keeps_values_bit_for_bit_and_prunes_anything(
    dtype: torch.dtype, entries: list[tuple[float, bool]]
) -> None:
    values = torch.tensor([value for value, _ in entries], dtype=dtype)
    mask = torch.tensor([keep for _, keep in entries])
    result = mask_(values.clone(), keep_bits(mask))
    assert torch.equal(result.view(torch.uint8), torch.where(mask, values, 0.0).to(dtype).view(torch.uint8))


def test_empty_batch() -> None:
    p = problem(False)
    p["x"] = torch.zeros(0, IN, dtype=torch.float64)
    p["lora_B"].requires_grad_()
    y = run(p, False)
    y.sum().backward()
    assert y.shape == (0, OUT)
    assert not p["lora_B"].grad.any()


def test_default_is_linear_without_bias() -> None:
    p = problem(False)
    weight = p["weight"] + mask_lora_delta(p["lora_A"], p["lora_B"], p["mask"], SCALING)
    y = mask_lora_linear(p["x"], p["weight"], None, p["mask"], p["lora_A"], p["lora_B"], SCALING)
    torch.testing.assert_close(y, F.linear(p["x"], weight))
