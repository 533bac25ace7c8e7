"""The mathematics of ScaleLoRA: Y = X (W ∘ (B A))ᵀ + b, as pure functions on tensors.

`scale_lora_linear` is one autograd function. It keeps only what it was given, (x, W, A, B), and never the effective
weight: the backward pass builds that again in one temporary, uses it for dX, and reuses the same memory for the weight
gradient G = dYᵀ X, which is formed once, multiplied with W in place, and then into dB = (G ∘ W) Aᵀ and dA = Bᵀ (G ∘ W).

B A lies near 1, where bf16 has steps of 0.4 to 0.8 percent: it is computed in fp32, also under autocast, and the
effective weight is rounded once. So training sees the very weight that merging makes.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (ScaleLoRA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ft.adapters.effective_weight import Weight, affine, cast_input, either, ordered_factors, split


def scale_lora_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, fan_in_fan_out: bool = False) -> Tensor:
    """W ∘ (B A), what merging replaces the weight with. Differentiable in A and B.

    Args:
        weight: (out, in), or (in, out) with `fan_in_fan_out`, as in GPT-2's Conv1D.
        lora_A: (r, in).
        lora_B: (out, r).
        fan_in_fan_out: the weight is stored as (in, out).

    Returns:
        A tensor of the weight's shape and the wider dtype of weight and A.

    Example:
        >>> weight = scale_lora_weight(weight, A, B)
    """
    left, right = ordered_factors(lora_A, lora_B, lora_A.dtype, fan_in_fan_out)
    return weight * (left @ right)


def scale_lora_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    change_only: bool = False,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Y = X (W ∘ (B A))ᵀ + b without keeping the effective weight for the backward pass.

    The result has the dtype of `x`, or autocast's where that is on. With B A = 1 it equals that of the plain layer bit
    for bit.

    Args:
        x: (..., in).
        weight: frozen W, (out, in), or (in, out) with `fan_in_fan_out`; or a function that makes it, called in each
            pass.
        bias: (out,) or None.
        lora_A: (r, in), usually fp32.
        lora_B: (out, r), usually fp32.
        change_only: W ∘ (B A - 1) instead of W ∘ (B A), what the adapter adds to the plain layer.
        fan_in_fan_out: the weight is stored as (in, out), as in GPT-2's Conv1D.

    Returns:
        (..., out). Gradients flow to x, bias, A and B; W is frozen and gets none.
    """
    arguments = (cast_input(x), *split(weight), bias, lora_A, lora_B, change_only, fan_in_fan_out)
    result: Tensor = _ScaleLoraLinear.apply(*arguments)
    return result


def _effective_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, change_only: bool, fan_in_fan_out: bool, dtype: torch.dtype
) -> Tensor:
    """W ∘ (B A), or W ∘ (B A - 1), in fp32 (fp64 for fp64 factors or x) and rounded to `dtype` once."""
    wide = torch.promote_types(torch.promote_types(lora_A.dtype, dtype), torch.float32)
    left, right = ordered_factors(lora_A, lora_B, wide, fan_in_fan_out)
    effective = left @ right
    if change_only:
        effective -= 1
    return effective.mul_(weight).to(dtype)


class _ScaleLoraLinear(torch.autograd.Function):
    """See `scale_lora_linear`; saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        make_weight: Callable[[], Tensor] | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        change_only: bool,
        fan_in_fan_out: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.make_weight, ctx.change_only, ctx.fan_in_fan_out = make_weight, change_only, fan_in_fan_out
        ctx.bias_dtype = None if bias is None else bias.dtype
        frozen = either(weight, make_weight)
        with torch.autocast(x.device.type, enabled=False):
            effective = _effective_weight(frozen, lora_A, lora_B, change_only, fan_in_fan_out, x.dtype)
            return affine(x, effective, bias, fan_in_fan_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:6]
        dx = dbias = dA = dB = temporary = None
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        # the dtypes were chosen in forward; an autocast around backward() must not choose again
        with torch.autocast(x.device.type, enabled=False):
            frozen = either(weight, ctx.make_weight)
            if needs_x:
                temporary = _effective_weight(frozen, lora_A, lora_B, ctx.change_only, ctx.fan_in_fan_out, x.dtype)
                dx = (grad_rows @ (temporary.t() if ctx.fan_in_fan_out else temporary)).view_as(x)
            if needs_A or needs_B:
                first, second = (rows, grad_rows) if ctx.fan_in_fan_out else (grad_rows, rows)
                gradient = torch.mm(first.t(), second, out=temporary).mul_(frozen)
                gradient = gradient.t() if ctx.fan_in_fan_out else gradient
                A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
                dA = (B.t() @ gradient).to(lora_A.dtype) if needs_A else None
                dB = (gradient @ A.t()).to(lora_B.dtype) if needs_B else None
            if needs_bias:
                dbias = grad_rows.sum(0).to(ctx.bias_dtype)
        return dx, None, None, dbias, dA, dB, None, None
