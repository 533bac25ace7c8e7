"""Gradients of fused experts, which go through einsum and a parametrization, against formulas written out here."""

from __future__ import annotations

import pytest
import torch
from adapters.sparse_models import adapted, every_method, layers_of, pair_of, sparse_model, stack_product
from peft import PeftModel
from tiny_models import tiny_batch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from sparse_ft.adapters.masked_layer import MaskedExperts
from sparse_ft.masks import MaskSet

RANK, SCALING = 4, 0.75


def problem(method: str) -> tuple[PreTrainedModel, MaskSet, PeftModel, dict[str, MaskedExperts]]:
    """Plain Mixtral in fp64, its masks, the same with an adapter of the method, and that one's stacks by name."""
    plain, masks = sparse_model("mixtral", dtype=torch.float64)
    model, _ = sparse_model("mixtral", dtype=torch.float64)
    for each in (plain, model):
        each.set_experts_implementation("eager")  # the others do not take fp64
    options = {} if method == "scale_lora" else {"lora_alpha": RANK * SCALING}
    adapted_model = adapted(model, masks, method=method, r=RANK, **options)
    stacks = {name: layer for name, layer in layers_of(adapted_model).items() if isinstance(layer, MaskedExperts)}
    assert len(stacks) == 4 and {factor.dtype for s in stacks.values() for factor in pair_of(s)} == {torch.float64}
    return plain, masks, adapted_model, stacks


def seen(method: str, weight: Tensor, mask: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The stack that training sees, by its definition."""
    product = stack_product(A, B, weight.shape)
    if method == "scale_lora":
        return weight * product
    return weight + SCALING * (product * mask if method == "mask_lora" else product)


@every_method
def test_gradients_of_the_whole_model_are_those_of_the_definition(method: str) -> None:
    plain, masks, model, stacks = problem(method)
    weights, leaves = {}, {}
    for name, layer in layers_of(model).items():
        A, B = leaves[name] = [factor.detach().clone().requires_grad_() for factor in pair_of(layer)]
        frozen = plain.get_parameter(name).detach()
        if name in stacks:
            weights[name] = seen(method, frozen, masks[name], A, B)
        elif method == "scale_lora":
            weights[name] = frozen * (B @ A)
        else:
            weights[name] = frozen + SCALING * (B @ A) * (masks[name] if method == "mask_lora" else 1)
    expected = functional_call(plain, weights, kwargs=tiny_batch(plain)).loss
    found = model(**tiny_batch(model)).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expected.backward()
    found.backward()
    for name, layer in layers_of(model).items():
        for factor, leaf in zip(pair_of(layer), leaves[name], strict=True):
            assert leaf.grad.any()
            torch.testing.assert_close(factor.grad, leaf.grad, rtol=1e-9, atol=1e-12)


@every_method
def test_gradients_of_stacks_match_finite_differences(method: str) -> None:
    """Along a random direction in A and B at once; no power of the step is odd but the first."""
    plain, _, _, stacks = problem(method)
    generator = torch.Generator().manual_seed(3)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for name, layer in stacks.items():
        weight, pair = plain.get_parameter(name).detach(), pair_of(layer)
        G, ways = normal(weight), [normal(factor) for factor in pair]
        (G * layer._change(["default"])(weight)).sum().backward()
        slope = sum(float((factor.grad * way).sum()) for factor, way in zip(pair, ways, strict=True))
        values = []
        with torch.no_grad():
            for shift in (0.5, -1.0):
                for factor, way in zip(pair, ways, strict=True):
                    factor.add_(shift * way)
                values.append(float((G * layer._change(["default"])(weight)).sum()))
        assert slope == pytest.approx(values[0] - values[1], rel=1e-9)


@every_method
def test_gradients_at_pruned_positions_have_no_influence(method: str) -> None:
    """dB = c (G ∘ m) Aᵀ and dA = c Bᵀ (G ∘ m) per expert; ScaleLoRA has W for c m, LoRA-Prune no m."""
    plain, masks, _, stacks = problem(method)
    generator = torch.Generator().manual_seed(5)
    for name, layer in stacks.items():
        weight, mask = plain.get_parameter(name).detach(), masks[name]
        G = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        gradients = []
        for upstream in (G, G + 100 * ~mask):
            pair = pair_of(layer)
            layer._change(["default"])(weight).backward(upstream)
            gradients.append([factor.grad.clone() for factor in pair])
            for factor in pair:
                factor.grad = None
        same = [torch.equal(one, other) for one, other in zip(*gradients, strict=True)]
        assert same == [method != "lora_prune"] * 2
        A, B = pair_of(layer)
        through = {"mask_lora": SCALING * mask, "scale_lora": weight, "lora_prune": SCALING}[method] * G
        through = through if layer._did_swap_in_out_features else through.mT
        experts = weight.shape[0]
        dA, dB = gradients[0]
        for e in range(experts):
            rows, columns = slice(e * len(A) // experts, (e + 1) * len(A) // experts), slice(e, None, experts)
            torch.testing.assert_close(dB[:, columns], through[e] @ A[rows].T, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(dA[rows], B[:, columns].T @ through[e], rtol=1e-10, atol=1e-12)
