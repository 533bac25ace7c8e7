"""Prune a little, retrain, prune further: iterative pruning in one call.

    for each sparsity s of the schedule:
        masks = prune(model, s, inside the masks so far)      # what is pruned stays pruned
        retrain(model, masks)                                 # yours: a fresh optimizer, fresh adapters
        merge adapters; check the zeros; give every parameter its requires_grad back

How to retrain is passed in, so that any trainer and any adapter will do. An adapter has to be merged before its weights
are pruned, and a new one is made for the new masks: one trained for the old masks would revive what is pruned now.

Example:
    >>> def retrain(model, masks, cycle):
    ...     adapted = prepare_perp(model, "mask_lora", masks)
    ...     Trainer(adapted, arguments(cycle), train_dataset=data, callbacks=[MaskCallback(masks)]).train()
    ...     return merge_perp(adapted)
    >>> result = prune_retrain(model, sparsities=[0.3, 0.5, 0.7], method="wanda", calibration=batches, retrain=retrain)
    >>> print(result.table())

Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.4 (iterative
pruning); Zimmer et al., PERP, arXiv 2312.15230, for retraining a small part in each cycle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

from torch import nn

from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import canonical_name
from sparse_ft.pruning.prune import prune
from sparse_ft.pruning.validation import resolve_pattern

_Schedule = list[tuple[Pattern, float]]


@dataclass(frozen=True)
class Cycle:
    """What one cycle did.

    Attributes:
        cycle: its number, from 1.
        pattern: `"unstructured"` or `"n:m"`.
        sparsity: share of pruned weights in the masked tensors.
        removed: number of weights pruned in this cycle.
        pruned: what `measure` gave after pruning; None without it.
        retrained: what it gave after retraining.
        prune_seconds: time for pruning, calibration included.
        retrain_seconds: time for retraining and merging.
    """

    cycle: int
    pattern: str
    sparsity: float
    removed: int
    pruned: float | None
    retrained: float | None
    prune_seconds: float
    retrain_seconds: float


@dataclass(frozen=True)
class PruneRetrainResult:
    """What `prune_retrain` made.

    Attributes:
        model: the plain model, the one that was passed in unless `retrain` returned another.
        masks: of the last cycle.
        cycles: one entry per cycle.
    """

    model: nn.Module
    masks: MaskSet
    cycles: list[Cycle]

    def table(self) -> str:
        """The cycles as lines of text, one each, under a line of headings."""
        lines = [f"{'cycle':>5}  {'pattern':<13}{'sparsity':>9}{'removed':>13}{'pruned':>11}{'retrained':>11}{'s':>9}"]
        for c in self.cycles:
            pruned, retrained = ("-" if value is None else f"{value:.4g}" for value in (c.pruned, c.retrained))
            seconds = c.prune_seconds + c.retrain_seconds
            lines.append(
                f"{c.cycle:>5}  {c.pattern:<13}{c.sparsity:>9.2%}{c.removed:>13,}{pruned:>11}{retrained:>11}"
                f"{seconds:>9.1f}"
            )
        return "\n".join(lines)


def prune_retrain(
    model: nn.Module,
    *,
    retrain: Callable[[nn.Module, MaskSet, int], nn.Module | None],
    sparsities: Sequence[float] | None = None,
    patterns: Sequence[str | Pattern] | None = None,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    inside: MaskSet | None = None,
    measure: Callable[[nn.Module], SupportsFloat] | None = None,
    **options: Any,
) -> PruneRetrainResult:
    """Prune and retrain in turns, each time sparser, the zeros of every cycle kept in all that follow.

    Args:
        model: a plain model, changed in place.
        retrain: `(model, masks, cycle from 1)`; trains the model with its zeros kept, by `MaskCallback` or a masked
            adapter. It returns None if it trained the model itself, else the model to go on with. A PEFT model is
            merged by its `merge_and_unload`; for groups trained beside an adapter return `merge_perp(adapted)`.
        sparsities: share removed after each cycle, rising, for unstructured pruning.
        patterns: instead, an n:m pattern for each cycle, each sparser than the one before: `["3:4", "2:4", "1:4"]`.
        method: as in `prune`, for all cycles.
        calibration: as in `prune`; run through the model again in each cycle.
        inside: masks of a model that is sparse already; the first cycle goes on from them.
        measure: called after each pruning and each retraining, for the table; what it returns is made a float, as the
            result of `perplexity` can be.
        **options: further arguments of `prune`: `exclude`, `allocation`, `seed`, …

    Returns:
        The plain model, its final masks, and what each cycle did.

    Raises:
        ValueError: before any work, if not exactly one schedule is given, or it is empty or does not rise; and whatever
            `prune` refuses.
        RuntimeError: after a cycle's retraining, if a pruned weight is not zero, or adapters are left in the model.
    """
    steps = _schedule(sparsities, patterns, inside)
    batches = None if calibration is None else list(calibration)  # a generator would be empty in the second cycle
    plain = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training, masks, cycles = model.training, inside, list[Cycle]()
    for cycle, (pattern, sparsity) in enumerate(steps, start=1):
        started, older = time.perf_counter(), masks
        masks = prune(
            model,
            pattern=pattern,
            sparsity=None if pattern.is_structured else sparsity,
            method=method,
            calibration=batches,
            inside=older,
            **options,
        )
        pruned_at = time.perf_counter()
        pruned = None if measure is None else float(measure(model))
        retrain_at = time.perf_counter()
        model = _merged(retrain(model, masks, cycle) or model)
        _check_plain(model, plain, cycle)
        masks.verify(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
        model.train(training)
        seconds = (pruned_at - started, time.perf_counter() - retrain_at)
        retrained = None if measure is None else float(measure(model))
        removed = _removed(masks) - (0 if older is None else _removed(older))
        cycles.append(Cycle(cycle, str(pattern), masks.sparsity(), removed, pruned, retrained, *seconds))
    assert masks is not None
    return PruneRetrainResult(model, masks, cycles)


def _schedule(
    sparsities: Sequence[float] | None, patterns: Sequence[str | Pattern] | None, inside: MaskSet | None
) -> _Schedule:
    """Pattern and sparsity of each cycle, checked to rise."""
    given = [steps for steps in (sparsities, patterns) if steps is not None]
    if len(given) != 1 or not given[0]:
        raise ValueError(
            f"prune_retrain needs either sparsities or patterns, and at least one, got sparsities={sparsities!r} and "
            f"patterns={patterns!r}."
        )
    if sparsities is not None:
        steps = [resolve_pattern("unstructured", sparsity) for sparsity in sparsities]
    else:
        steps = [resolve_pattern(pattern) for pattern in patterns or ()]
    # The sparsity to start from may be spread otherwise: whether each tensor has room for more is for `prune` to say.
    before = 0.0 if inside is None else inside.sparsity()
    for pattern, sparsity in steps:
        if sparsity <= before:
            raise ValueError(
                f"Each cycle must be sparser than the one before, but {sparsity:.4g} ({pattern}) follows {before:.4g}; "
                f"give rising sparsities, or patterns with fewer and fewer weights kept."
            )
        before = sparsity
    return steps


def _merged(model: nn.Module) -> nn.Module:
    """The plain model of a PEFT model; any other model as it is."""
    merge = getattr(model, "merge_and_unload", None)
    return model if merge is None else merge()


def _check_plain(model: nn.Module, plain: dict[str, tuple[int, ...]], cycle: int) -> None:
    """Refuse a model that has other parameters than before it was retrained."""
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    other = next((name for name in {**found, **plain} if found.get(name) != plain.get(name)), None)
    if other is not None:
        raise RuntimeError(
            f"After retraining in cycle {cycle} '{canonical_name(other)}' has shape {found.get(other)} but before it "
            f"had {plain.get(other)}; let `retrain` return the plain model, with its adapters merged."
        )


def _removed(masks: MaskSet) -> int:
    return sum(total - kept for kept, total in masks.counts().values())
