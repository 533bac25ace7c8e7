"""AdamR's two passes: pure functions, for one tensor and for all tensors of a group at once; see `adamr.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Form = Literal["l2", "l1", "shrink"]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def gradient_scale(squares: Sequence[float], count: float) -> float:
    """The scale s of the whole model.

    Args:
        squares: sum of v^ over each tensor, in any order.
        count: number of entries of all of them.

    Returns:
        sqrt(sum / count), or 1 where that is 0. The sum is exact, so no order or grouping of tensors changes it.
    """
    return math.sqrt(math.fsum(squares) / count) or 1.0 if count else 1.0


def adamr_weight(
    weight: Tensor,
    base: Tensor | None,
    exp_avg: Tensor,
    second: Tensor,
    *,
    rate: float,
    pull: float,
    correction: float = 1.0,
    eps: float = 1e-8,
    form: Form = "l2",
) -> Tensor:
    """One tensor after a step.

    Args:
        weight: w, any shape.
        base: w0, the same shape in any float dtype; None is not pulled.
        exp_avg: m, the same shape, in the dtype of the arithmetic.
        second: v (or its running maximum), like `exp_avg`.
        rate: lr / (1 - b1^t).
        pull: lr·λ/s.
        correction: 1 - b2^t, by which v is divided.
        eps: added to sqrt(v^).
        form: what the pull is.

    Returns:
        The new weight in the dtype of the moments.
    """
    new = weight.to(second.dtype, copy=True)
    pulled = base is not None and pull > 0
    origin = base.to(new.device, new.dtype) if base is not None and pulled else new
    if pulled and form == "l2":
        new.lerp_(origin, min(pull, 1.0))
    elif pulled and form == "l1":
        new.sub_((new - origin).sign_(), alpha=pull)
    denominator = second.sqrt().div_(math.sqrt(correction)).add_(eps)
    new.addcdiv_(exp_avg, denominator, value=-rate)
    if pulled and form == "shrink":
        new = origin + nn.functional.softshrink(new - origin, pull)
    return new


class Work(NamedTuple):
    """The parameters of one group that have a gradient, with their state."""

    group: dict[str, Any]
    params: list[Tensor]
    states: list[dict[str, Any]]


def second_moment(group: Mapping[str, Any]) -> str:
    """The state whose entries are v."""
    return "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"


def _split(work: Work, foreach: bool) -> tuple[list[Work], Work]:
    """The parameters that can be treated at once, in lists of one device and dtype, and the others."""
    alike: dict[tuple[torch.device, torch.dtype], Work] = {}
    rest = Work(work.group, [], [])
    for parameter, state in zip(work.params, work.states, strict=True):
        base = state.get("base", parameter)
        same = parameter.dtype == state["exp_avg"].dtype == base.dtype and parameter.device == base.device
        kind = (parameter.device, parameter.dtype)
        target = alike.setdefault(kind, Work(work.group, [], [])) if foreach and same else rest
        target.params.append(parameter)
        target.states.append(state)
    return list(alike.values()), rest


def update_moments(work: Work, foreach: bool) -> None:
    """Pass 1."""
    first, second = work.group["betas"]
    lists, rest = _split(work, foreach)
    for _, params, states in lists:
        gradients = [parameter.grad for parameter in params if parameter.grad is not None]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_([state["exp_avg"] for state in states], gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
    for parameter, state in zip(rest.params, rest.states, strict=True):
        assert parameter.grad is not None
        gradient = parameter.grad.to(state["exp_avg"].dtype)
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    if work.group["amsgrad"]:
        for state in work.states:
            torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])


def update_weights(work: Work, pull: float, foreach: bool) -> None:
    """Pass 2."""
    group = work.group
    lists, rest = _split(work, foreach)
    for part in lists:
        _update_lists(part, pull)
    for parameter, state in zip(rest.params, rest.states, strict=True):
        new = adamr_weight(
            parameter,
            state.get("base"),
            state["exp_avg"],
            state[second_moment(group)],
            rate=group["lr"] / (1 - group["betas"][0] ** state["step"]),
            pull=pull,
            correction=1 - group["betas"][1] ** state["step"],
            eps=group["eps"],
            form=group["form"],
        )
        parameter.copy_(new)


def _update_lists(work: Work, pull: float) -> None:
    """`adamr_weight` for many tensors at once, in place, operation by operation the same."""
    group, params, states = work
    pairs = [(p, state["base"]) for p, state in zip(params, states, strict=True) if "base" in state and pull > 0]
    weights, bases = [weight for weight, _ in pairs], [base for _, base in pairs]
    if pairs and group["form"] == "l2":
        torch._foreach_lerp_(weights, bases, min(pull, 1.0))
    elif pairs and group["form"] == "l1":
        signs = torch._foreach_sub(weights, bases)
        torch._foreach_sign_(signs)
        torch._foreach_add_(weights, signs, alpha=-pull)
    first, second = group["betas"]
    denominators = torch._foreach_sqrt([state[second_moment(group)] for state in states])
    torch._foreach_div_(denominators, [math.sqrt(1 - second ** state["step"]) for state in states])
    torch._foreach_add_(denominators, group["eps"])
    rates = [-group["lr"] / (1 - first ** state["step"]) for state in states]
    torch._foreach_addcdiv_(params, [state["exp_avg"] for state in states], denominators, rates)
    for weight, base in pairs if group["form"] == "shrink" else ():
        torch.add(base, nn.functional.softshrink(weight - base, pull), out=weight)
