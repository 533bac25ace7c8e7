"""The mathematics of MaskLoRA: Y = X (W + c (B A) ∘ m)ᵀ + b, as pure functions on tensors.

`mask_lora_linear` is one autograd function. It keeps only what it was given, (x, W, m, A, B), and never the effective
weight: the backward pass builds that again in one temporary, uses it for dX, and reuses the same memory for the weight
gradient G = dYᵀ X, which is formed once, masked in place, and multiplied into dB = c G Aᵀ and dA = c Bᵀ G. Above plain
LoRA that costs the product G and a few passes over one weight.

Masks travel packed, one bit per weight, or as `masks.keep_bits`, one byte: masking is then a bitwise AND, which is
exact for any value and faster than multiplying by a bool or uint8 mask.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (MaskLoRA).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ft.adapters.effective_weight import Weight, affine, cast_input, either, ordered_factors, split
from sparse_ft.masks import keep_bits, mask_


def mask_lora_delta(
    lora_A: Tensor, lora_B: Tensor, mask: Tensor, scaling: float, *, fan_in_fan_out: bool = False
) -> Tensor:
    """c (B A) ∘ m, what merging adds to the weight. Differentiable in A and B.

    Args:
        lora_A: (r, in).
        lora_B: (out, r).
        mask: bool, `keep_bits` or packed, in the layout of the weight: (out, in), or (in, out) with `fan_in_fan_out`.
        scaling: c.
        fan_in_fan_out: the weight is stored as (in, out), as in GPT-2's Conv1D.

    Returns:
        A tensor of the mask's shape and the dtype of A.

    Example:
        >>> weight += mask_lora_delta(A, B, mask, scaling=2.0)
    """
    left, right = ordered_factors(lora_A, lora_B, lora_A.dtype, fan_in_fan_out)
    return masked(left @ right * scaling, keep_bits(mask))


def masked(values: Tensor, keep: Tensor) -> Tensor:
    """Differentiable `mask_` on a copy: the gradient is masked the same way."""
    result: Tensor = _Masked.apply(values, keep)
    return result


def mask_lora_linear(
    x: Tensor,
    weight: Weight | None,
    bias: Tensor | None,
    mask: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """Y = X (W + c (B A) ∘ m)ᵀ + b without keeping the effective weight for the backward pass.

    Computed in the dtype of `x`, or in autocast's where that is on: W, A and B are cast, the product is masked and
    added to W in that dtype. With B = 0 the result equals that of the plain layer bit for bit.

    Args:
        x: (..., in).
        weight: frozen W, (out, in), or (in, out) with `fan_in_fan_out`; or a function that makes it, called in each
            pass; None leaves W out: the adapter's part alone.
        bias: (out,) or None.
        mask: bool, `keep_bits` or packed, in the layout of the weight.
        lora_A: (r, in), usually fp32.
        lora_B: (out, r), usually fp32.
        scaling: c.
        fan_in_fan_out: the weight is stored as (in, out), as in GPT-2's Conv1D.

    Returns:
        (..., out). Gradients flow to x, bias, A and B; W is frozen and gets none.
    """
    arguments = (cast_input(x), *split(weight), bias, keep_bits(mask), lora_A, lora_B, float(scaling), fan_in_fan_out)
    result: Tensor = _MaskLoraLinear.apply(*arguments)
    return result


def _effective_weight(
    weight: Tensor | None,
    make_weight: Callable[[], Tensor] | None,
    keep: Tensor,
    left: Tensor,
    right: Tensor,
    scaling: float,
) -> Tensor:
    """W + c (left right) ∘ m in the dtype of the factors, in one new tensor."""
    effective = mask_((left * scaling) @ right, keep)
    if weight is None and make_weight is None:
        return effective
    return effective.add_(either(weight, make_weight).to(effective.dtype))


class _Masked(torch.autograd.Function):
    """Values with pruned positions set to zero, and the same for their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return mask_(values.clone(), keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return mask_(grad.clone(), keep), None


class _MaskLoraLinear(torch.autograd.Function):
    """See `mask_lora_linear`; saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        make_weight: Callable[[], Tensor] | None,
        bias: Tensor | None,
        keep: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        fan_in_fan_out: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, keep, lora_A, lora_B)
        ctx.make_weight, ctx.scaling, ctx.fan_in_fan_out = make_weight, scaling, fan_in_fan_out
        ctx.bias_dtype = None if bias is None else bias.dtype
        left, right = ordered_factors(lora_A, lora_B, x.dtype, fan_in_fan_out)
        effective = _effective_weight(weight, make_weight, keep, left, right, scaling)
        return affine(x, effective, bias, fan_in_fan_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, keep, lora_A, lora_B = ctx.saved_tensors
        needs_x, _, _, needs_bias, _, needs_A, needs_B = ctx.needs_input_grad[:7]
        dx = dbias = dA = dB = temporary = None
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        # the dtypes were chosen in forward; an autocast around backward() must not choose again
        with torch.autocast(x.device.type, enabled=False):
            left, right = ordered_factors(lora_A, lora_B, x.dtype, ctx.fan_in_fan_out)
            if needs_x:
                temporary = _effective_weight(weight, ctx.make_weight, keep, left, right, ctx.scaling)
                dx = (grad_rows @ (temporary.t() if ctx.fan_in_fan_out else temporary)).view_as(x)
            if needs_A or needs_B:
                first, second = (rows, grad_rows) if ctx.fan_in_fan_out else (grad_rows, rows)
                gradient = mask_(torch.mm(first.t(), second, out=temporary), keep)
                gradient = gradient.t() if ctx.fan_in_fan_out else gradient
                A, B = (left.t(), right.t()) if ctx.fan_in_fan_out else (right, left)
                dA = (B.t() @ gradient).to(lora_A.dtype).mul_(ctx.scaling) if needs_A else None
                dB = (gradient @ A.t()).to(lora_B.dtype).mul_(ctx.scaling) if needs_B else None
            if needs_bias:
                dbias = grad_rows.sum(0).to(ctx.bias_dtype)
        return dx, None, None, dbias, None, dA, dB, None, None
