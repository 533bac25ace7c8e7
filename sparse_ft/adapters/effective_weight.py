"""Pieces of the linear functions that build an effective weight from a frozen one and two factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Weight: TypeAlias = Tensor | Callable[[], Tensor]  # a frozen weight, or what makes it, for example from a packed one


def split(weight: Weight | None) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
    """For an autograd function's context: the weight as something to save for backward, or as a function to keep."""
    return (None, weight) if callable(weight) else (weight, None)


def either(weight: Tensor | None, make_weight: Callable[[], Tensor] | None) -> Tensor:
    """The weight of such a pair; there has to be one."""
    if make_weight is not None:
        return make_weight()
    assert weight is not None
    return weight


def cast_input(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on, which the whole function is then computed in."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def ordered_factors(lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype, fan_in_fan_out: bool) -> tuple[Tensor, Tensor]:
    """The two factors, in a dtype, whose product has the layout of the weight."""
    A, B = lora_A.to(dtype), lora_B.to(dtype)
    return (A.t(), B.t()) if fan_in_fan_out else (B, A)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool) -> Tensor:
    """x Wᵀ + b, or x W + b with `fan_in_fan_out`, as the plain layers compute it."""
    bias = None if bias is None else bias.to(x.dtype)
    if not fan_in_fan_out:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return y.view(*x.shape[:-1], y.shape[-1])
