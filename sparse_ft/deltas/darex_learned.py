"""Scales per tensor learned by gradient descent on the top logits, without labels.

    weight = base + kept * delta / (|a| + density)        a: one number per tensor, 1e-4 at the start

The loss is the mean squared difference at the k logits that are largest in the fine-tuned model; AdamW and a cosine
schedule move the a. By its form every q is at least the density. What is returned is never worse on the given samples
than DARE: with no gain, it is DARE's scale.

Example:
    >>> with DeltaProbe(model, base_state, density=0.01, names=linear_weights) as probe:
    ...     learned = learn_scales(probe, batches)
    >>> learned.scales["model.layers.0.mlp.up_proj.weight"]
    0.013

Limits: holds the kept deltas of all pruned tensors densely in fp32, and for a step one more copy of their weights.
Gradients go through one mask, so a q is tuned to it; use other samples and masks to judge.

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, learned 1/q.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.darex_objectives import Batch, check_eval, model_inputs
from sparse_ft.deltas.probe import DeltaProbe
from sparse_ft.models import canonical_name

_Reference = tuple[dict[str, Any], Tensor, Tensor]


@dataclass(frozen=True)
class LearnedScales:
    """What was learned.

    Attributes:
        scales: q by tensor name, those of the best pass over the samples.
        loss: mean squared change of the top logits with them.
        dare_loss: the same with q = density; never below `loss`.
        steps: optimizer steps taken.
    """

    scales: dict[str, float]
    loss: float
    dare_loss: float
    steps: int


def learn_scales(
    probe: DeltaProbe,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    k: int = 5,
    start: float = 1e-4,
    learning_rate: float = 1e-2,
    max_steps: int = 200,
    patience: int = 5,
) -> LearnedScales:
    """Learn one scale per pruned tensor; the model is neither patched nor changed.

    Args:
        probe: holds the fine-tuned model, in eval mode, and the deltas; the model is restored first.
        batches: forward arguments or token ids (B, T), one optimizer step each; labels and padding are left out.
        seed: of the mask.
        k: logits compared per token; fewer where there are fewer classes.
        start: a at the start, positive.
        learning_rate: of AdamW; a cosine takes it to 0 over `max_steps`.
        max_steps: optimizer steps at most.
        patience: passes over the batches without a better loss that are forgiven.

    Raises:
        ValueError: density 0, a model in training mode, no batch, or a number out of range.

    Example:
        >>> learn_scales(probe, batches, max_steps=50).loss

    Source: arXiv 2410.09344, learned 1/q; the defaults are those of its experiments.
    """
    check_scale(probe.density)
    check_scale(start)
    check_scale(learning_rate)
    if max_steps < 1 or patience < 0 or k < 1:
        raise ValueError(f"max_steps is {max_steps}, patience {patience} and k {k}; they must be at least 1, 0 and 1.")
    check_eval(probe.model)
    probe.restore()
    references = _references(probe, batches, k)
    weights = _PrunedWeights(probe, seed)
    free = torch.full((len(probe.names),), start, device=references[0][1].device, requires_grad=True)
    optimizer = torch.optim.AdamW([free], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max_steps)
    dare_loss = best = _mean_loss(weights, torch.zeros_like(free), references)
    scales, steps, misses = torch.zeros_like(free), 0, 0
    while steps < max_steps and misses <= patience:
        for reference in references[: max_steps - steps]:
            (free.grad,) = torch.autograd.grad(_loss(weights, free, reference), free)
            optimizer.step()
            schedule.step()
            steps += 1
        loss = _mean_loss(weights, free.detach(), references)
        if not math.isfinite(loss):
            break
        misses = 0 if loss < best else misses + 1
        if loss < best:
            best, scales = loss, free.detach().clone()
    found = (scales.double().abs() + probe.density).tolist()
    return LearnedScales(dict(zip(probe.names, found, strict=True)), best, dare_loss, steps)


class _PrunedWeights:
    """base + kept * delta / (|a| + density) as a differentiable function of a."""

    def __init__(self, probe: DeltaProbe, seed: int) -> None:
        live = {canonical_name(name): (name, parameter) for name, parameter in probe.model.named_parameters()}
        self.model = probe.model
        self._density = probe.density
        self._parts = []
        for name in probe.names:
            called, parameter = live[name]
            base = probe.base(name).to(parameter.device).float()
            self._parts.append((called, base, probe.kept_delta(name, seed=seed), parameter.dtype))

    def at(self, free: Tensor) -> Mapping[str, Tensor]:
        divisors = free.abs() + self._density
        return {
            name: (base + kept / divisor.to(kept.device)).to(dtype)
            for (name, base, kept, dtype), divisor in zip(self._parts, divisors.unbind(), strict=True)
        }


@torch.no_grad()
def _references(probe: DeltaProbe, batches: Iterable[Batch], k: int) -> list[_Reference]:
    references = []
    for given in batches:
        batch = model_inputs(probe.model, given)
        logits: Tensor = probe.model(**batch).logits
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        references.append((batch, top.values.float(), top.indices))
    if not references:
        raise ValueError("There are no samples to learn scales on; pass at least one batch.")
    return references


def _loss(weights: _PrunedWeights, free: Tensor, reference: _Reference) -> Tensor:
    batch, values, indices = reference
    logits: Tensor = functional_call(weights.model, dict(weights.at(free)), (), batch).logits
    squares = (logits.gather(-1, indices).float() - values).square()
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and squares.ndim == 3 and mask.shape == squares.shape[:2]:
        squares = squares[mask.bool()]
    return squares.mean()


@torch.no_grad()
def _mean_loss(weights: _PrunedWeights, free: Tensor, references: list[_Reference]) -> float:
    return sum(float(_loss(weights, free, reference)) for reference in references) / len(references)
