"""Choose how to prune a delta by measuring it: its size, and what pruning does to the model's outputs on own samples.

The decisions are those of the DAREx paper's pipeline, in this order:

    the fine-tuning can be repeated                 fine-tune with AdamR, then DARE (DAREx-L2)
    large deltas: mean |delta| from 0.01 on         magnitude or Wanda, whichever changes the outputs less
    density of 0.1 or more                          DARE
    labelled samples are at hand                    DAREx-q, searched on their metric
    else                                            DAREx-q, searched on the output change
                                                    (decoders: one scale for all; encoders: also one per layer)

Example:
    >>> choice = choose(finetuned, base.state_dict(), batches, density=0.01)
    >>> choice.method, choice.scale
    ('darex_q', 0.035)
    >>> print(*choice.reasons, sep="\\n")

Limits: as good as the samples. A choice made on the output change need not be the best for a task's metric.

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, figure 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_ft.deltas.darex import search_eta, search_scale
from sparse_ft.deltas.darex_analytic import analytic_scales, collect_statistics
from sparse_ft.deltas.darex_moments import InputMoments, collect_moments
from sparse_ft.deltas.darex_objectives import (
    Batch,
    OutputChange,
    Scale,
    average_over_seeds,
    check_eval,
    label_objective,
    last_hidden_state,
    model_inputs,
)
from sparse_ft.deltas.fingerprint import LARGE_DELTA
from sparse_ft.deltas.magnitude import magnitude_delta
from sparse_ft.deltas.probe import DeltaProbe
from sparse_ft.deltas.wanda import wanda_delta
from sparse_ft.models import matrix_view

#: From this density on, DARE needs no search.
EASY_DENSITY = 0.1

Method = Literal["dare", "darex_q", "darex_l2", "magnitude", "wanda"]


@dataclass(frozen=True)
class DeltaChoice:
    """A method, its scale, and why.

    Attributes:
        method: "dare", "darex_q", "darex_l2" (fine-tune again with AdamR, then DARE), "magnitude" or "wanda".
        scale: what kept entries are divided by, for all tensors or by name.
        reasons: sentences with the numbers that decided.
        measurements: what was measured: "mean_abs_delta", "mean_abs_base", "unchanged" (share of entries that are equal
            in both models), "decoder", "output_change" by scale, "magnitude_change", and what a search added.
    """

    method: Method
    scale: float | dict[str, float]
    reasons: list[str]
    measurements: dict[str, Any]


def choose(
    model: nn.Module,
    base_state: Mapping[str, Tensor],
    batches: Iterable[Batch],
    *,
    density: float,
    metric: Callable[[nn.Module], float] | None = None,
    can_finetune_again: bool = False,
    names: Iterable[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    large_delta: float = LARGE_DELTA,
) -> DeltaChoice:
    """Measure a fine-tuned model's deltas and choose how to prune them.

    Args:
        model: the fine-tuned model, in eval mode; its weights change during the measurements and are restored.
        base_state: the base model's tensors by name.
        batches: samples like those the model is used on, without labels: forward arguments or token ids (B, T).
        density: share of entries to be kept, above 0.
        metric: model -> score on labelled samples, higher is better; searched on instead of the output change.
        can_finetune_again: the fine-tuning can be repeated with another optimizer.
        names: tensors to prune; None = all that model and base share.
        seeds: of the masks measured with.
        large_delta: mean |delta| from which deltas count as large.

    Raises:
        ValueError: density 0 or outside 0..1, a model in training mode, no samples, or a base that does not fit.
        RuntimeError: NaN or infinite outputs of the fine-tuned model.

    Example:
        >>> choose(model, base_state, [{"input_ids": ids}], density=0.01, metric=accuracy).reasons
    """
    check_eval(model)
    if density == 0:
        raise ValueError("density is 0: nothing is kept, so there is nothing to choose; use a density above 0.")
    batches = list(batches)
    if not batches:
        raise ValueError("There are no samples to measure the deltas on; pass at least one batch.")
    with DeltaProbe(model, base_state, density=density, names=names) as probe:
        found = _Measured(probe, batches, seeds)
        reasons = found.describe(large_delta)
        if can_finetune_again:
            reasons.append(
                "The fine-tuning can be repeated: use AdamR, which keeps the deltas small, then DARE at this density."
            )
            return DeltaChoice("darex_l2", density, reasons, found.measurements)
        if found.mean_delta >= large_delta:
            return _ranked(found, reasons)
        if density >= EASY_DENSITY:
            reasons.append(f"At density {density:g} with small deltas plain DARE is enough; no scale was searched.")
            return DeltaChoice("dare", density, reasons, found.measurements)
        return _searched(found, reasons, metric, seeds)


def is_decoder(model: nn.Module, batch: Batch) -> bool:
    """Whether the states of a sequence's first token ignore its last token, found by changing that token.

    Args:
        model: in eval mode.
        batch: with input_ids (B, T) of two tokens or more; with anything else the answer is False.

    Example:
        >>> is_decoder(llama, torch.tensor([[5, 6, 7]]))
        True
    """
    inputs = model_inputs(model, batch)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return False
    row = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    real = row.get("attention_mask")
    if isinstance(real, Tensor) and real.shape == row["input_ids"].shape:
        row = {
            key: value[:, real[0].bool()] if isinstance(value, Tensor) and value.shape == real.shape else value
            for key, value in row.items()
        }
    if row["input_ids"].shape[1] < 2:
        return False
    changed = row["input_ids"].clone()
    changed[:, -1] = changed[:, 0] if changed[0, 0] != changed[0, -1] else (changed[:, 0] == 0).long()
    with torch.no_grad():
        one = last_hidden_state(model, row)[:, 0].float()
        other = last_hidden_state(model, {**row, "input_ids": changed})[:, 0].float()
    return bool(torch.allclose(one, other, rtol=1e-3, atol=1e-5))


class _Measured:
    """What is measured of every delta, whatever is chosen."""

    def __init__(self, probe: DeltaProbe, batches: list[Batch], seeds: Sequence[int]) -> None:
        self.probe, self.batches = probe, batches
        self.decoder = is_decoder(probe.model, batches[0])
        self.kind: Literal["hidden", "logits"] = "logits" if self.decoder and _has_logits(probe, batches) else "hidden"
        self.change = OutputChange(probe.model, batches, kind=self.kind)
        self._seeds = seeds
        self.mean_delta, self.mean_base, self.unchanged = _sizes(probe)
        grid = dict.fromkeys(min(probe.density * factor, 1.0) for factor in (1, 2, 5, 10))
        self.output_change = {q: -self.objective(q) for q in grid}
        probe.transform(partial(_by_magnitude, density=probe.density))
        self.magnitude_change = self.change.measure()
        self.measurements: dict[str, Any] = {
            "mean_abs_delta": self.mean_delta,
            "mean_abs_base": self.mean_base,
            "unchanged": self.unchanged,
            "decoder": self.decoder,
            "compared": self.kind,
            "output_change": dict(self.output_change),
            "magnitude_change": self.magnitude_change,
        }

    def objective(self, scale: Scale) -> float:
        """Minus the output change, averaged over the mask seeds."""
        changes = []
        for seed in self._seeds:
            self.probe.prune(scale, seed=seed)
            changes.append(-self.change.measure())
        return average_over_seeds(changes)

    def describe(self, large_delta: float) -> list[str]:
        """The first sentences, with the numbers."""
        share = self.mean_delta / self.mean_base if self.mean_base else float("inf")
        size = "large" if self.mean_delta >= large_delta else "small"
        reasons = [
            f"The mean |delta| is {self.mean_delta:.3g}, {share:.2%} of the mean |weight| of the base; from "
            f"{large_delta:g} on deltas count as large, so these are {size}."
        ]
        if share > 0.5:
            reasons.append("Deltas of this size mostly mean a wrong base: check that the model was fine-tuned from it.")
        if self.unchanged > 0:
            reasons.append(f"{self.unchanged:.1%} of the entries did not change at all, some of them by rounding.")
        what = "mean squared change of the top logits" if self.kind == "logits" else "mean change of the hidden states"
        listed = ", ".join(f"{change:.3g} at 1/{q:.3g}" for q, change in self.output_change.items())
        reasons.append(
            f"The {what} on your samples at density {self.probe.density:g} is {listed} (random masks), and "
            f"{self.magnitude_change:.3g} with magnitude pruning."
        )
        return reasons


def _ranked(found: _Measured, reasons: list[str]) -> DeltaChoice:
    probe = found.probe
    probe.restore()
    moments = collect_moments(probe.model, found.batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a row too short for one entry shows in the measurement
        probe.transform(partial(_by_wanda, density=probe.density, moments=moments))
    wanda_change = found.change.measure()
    found.measurements["wanda_change"] = wanda_change
    method: Method = "wanda" if wanda_change < found.magnitude_change else "magnitude"
    reasons.append(
        f"Large deltas do not survive random pruning, so their largest entries are kept, unscaled: Wanda changes the "
        f"outputs by {wanda_change:.3g} and magnitude by {found.magnitude_change:.3g}, so {method} is chosen."
    )
    return DeltaChoice(method, 1.0, reasons, found.measurements)


def _searched(
    found: _Measured, reasons: list[str], metric: Callable[[nn.Module], float] | None, seeds: Sequence[int]
) -> DeltaChoice:
    probe, density = found.probe, found.probe.density
    objective = found.objective if metric is None else label_objective(probe, metric, seeds=seeds)
    goal = "minus the output change" if metric is None else "your metric"
    whole = search_scale(objective, density=density)
    dare_score = whole.scores[density]
    found.measurements["search"] = dict(whole.scores)
    scale: float | dict[str, float] = whole.scale
    score = whole.score
    what = f"one scale for the whole model, {whole.scale:.3g},"
    if not found.decoder:
        statistics = collect_statistics(probe, found.batches)
        layers = search_eta(
            objective,
            lambda eta: analytic_scales(statistics, density=density, eta=eta, names=probe.names),
            density=density,
        )
        found.measurements["per_layer_score"] = layers.score
        if layers.score > score:
            scale, score = layers.scales, layers.score
            low, high = min(layers.scales.values()), max(layers.scales.values())
            what = f"one scale per layer, {low:.3g} to {high:.3g},"
    if score <= dare_score:
        reasons.append(f"No scale tried was better than the density itself ({goal}: {dare_score:.4g}): plain DARE.")
        return DeltaChoice("dare", density, reasons, found.measurements)
    reasons.append(
        f"At density {density:g} the divisor was searched on {goal}: {what} gives {score:.4g}, where DARE's "
        f"{density:g} gives {dare_score:.4g}."
    )
    return DeltaChoice("darex_q", scale, reasons, found.measurements)


def _sizes(probe: DeltaProbe) -> tuple[float, float, float]:
    """Mean |delta|, mean |base| and the share of entries that are equal, over all pruned tensors."""
    delta, base, equal, numel = 0.0, 0.0, 0, 0
    for name in probe.names:
        values = probe.deltas[name]
        delta += float(values.abs().sum(dtype=torch.float64))
        base += float(probe.base(name).float().abs().sum(dtype=torch.float64))
        equal += int((values == 0).sum())
        numel += values.numel()
    return delta / numel, base / numel, equal / numel


def _by_magnitude(name: str, delta: Tensor, *, density: float) -> Tensor:
    return magnitude_delta(delta, density=density)


def _by_wanda(name: str, delta: Tensor, *, density: float, moments: Mapping[str, InputMoments]) -> Tensor:
    if name not in moments or not bool(moments[name].squares.any()):
        return magnitude_delta(delta, density=density)
    dim = moments[name].input_dim
    return matrix_view(wanda_delta(matrix_view(delta, dim), moments[name].norms(), density=density), dim)


@torch.no_grad()
def _has_logits(probe: DeltaProbe, batches: list[Batch]) -> bool:
    return getattr(probe.model(**model_inputs(probe.model, batches[0])), "logits", None) is not None
