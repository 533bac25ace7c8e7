"""`prune`: make a model sparse in place, with any method, pattern and calibration data. Read this file first.

    masks = prune(model, pattern="2:4", method="wanda", calibration=batches)

A method is a pure function of one (out, in) matrix in a file of its own; `METHODS` says how the drivers call it. To add
one: write that file, then an entry here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import find_blocks, find_targets
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.pruning.inside import check_inside, check_zeros
from sparse_ft.pruning.magnitude import magnitude_mask
from sparse_ft.pruning.matrices import PackedMasks, matrices_of, owners_of_weights, prune_matrices
from sparse_ft.pruning.plan import (
    Budget,
    Method,
    Settings,
    check_settings,
    check_target,
    divisible_targets,
    make_budgets,
)
from sparse_ft.pruning.random import random_mask
from sparse_ft.pruning.sequential import progress_bar, prune_block_by_block
from sparse_ft.pruning.sparsegpt import InverseFactor, factorize, sparsegpt
from sparse_ft.pruning.statistics import Hessian, SecondMoment
from sparse_ft.pruning.wanda import wanda_mask


def _magnitude(weight: Tensor, statistic: None, budget: Budget, settings: Settings) -> tuple[Tensor, None]:
    return magnitude_mask(weight, **_count(budget)), None


def _random(weight: Tensor, statistic: None, budget: Budget, settings: Settings) -> tuple[Tensor, None]:
    return random_mask(tuple(weight.shape), budget.matrix, settings.seed, **_count(budget)), None


def _wanda(weight: Tensor, moment: Tensor | None, budget: Budget, settings: Settings) -> tuple[Tensor, None]:
    if moment is None:  # equal input norms: row-wise magnitude
        moment = torch.ones(weight.shape[1], device=weight.device)
    sparsity = None if budget.pattern.is_structured else budget.sparsity
    return wanda_mask(weight, moment, pattern=budget.pattern, sparsity=sparsity, inside=budget.inside), None


def _sparsegpt(
    weight: Tensor, factor: InverseFactor | None, budget: Budget, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    if factor is None:
        return _magnitude(weight, None, budget, settings)
    result = sparsegpt(
        weight,
        factor,
        pattern=budget.pattern,
        sparsity=None if budget.pattern.is_structured else budget.sparsity,
        block_size=settings.block_size,
        update=settings.update_weights,
        inside=budget.inside,
    )
    return result.mask, result.weight if settings.update_weights else None


def _count(budget: Budget) -> dict[str, Any]:
    return {"pattern": budget.pattern, "inside": budget.inside} | (
        {} if budget.pattern.is_structured else {"removed": budget.removed}
    )


METHODS: dict[str, Method] = {
    "magnitude": Method(_magnitude, allocations=("uniform", "global", "erk")),
    "random": Method(_random, allocations=("uniform", "erk")),
    "wanda": Method(
        _wanda,
        SecondMoment,
        lambda moment, settings: moment.second_moment(),
        allocations=("uniform", "erk"),
        by_row=True,
    ),
    "sparsegpt": Method(
        _sparsegpt,
        Hessian,
        lambda hessian, settings: factorize(hessian.matrix(), damping=settings.damping),
        allocations=("uniform", "erk"),
    ),
}


def prune(
    model: nn.Module,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    allocation: str = "uniform",
    exclude: Sequence[str] = (),
    indivisible: str = "error",
    seed: int = 0,
    update_weights: bool = True,
    block_size: int = 128,
    damping: float = 0.01,
    min_keep: float = 0.0005,
    inside: MaskSet | None = None,
    progress: bool = True,
) -> MaskSet:
    """Set a share of a model's weights to zero, in place, and return which.

    Pruned are the weights that `find_targets` lists: matrices inside the repeated blocks, each expert by itself. A
    fused tensor (GPT-2's `c_attn`, GPT-NeoX's `query_key_value`, `gate_up_proj`) is one matrix: for n:m and Wanda its
    rows are independent anyway, unstructured magnitude and SparseGPT put one threshold on the whole of it.

    Args:
        model: any transformers model with float weights.
        pattern: `"unstructured"`, or `"n:m"`: n kept of every m along the input.
        sparsity: share removed, in [0, 1); needed for, and only for, `"unstructured"`.
        method: `"magnitude"` (per tensor), `"random"`, `"wanda"` (per output row) or `"sparsegpt"` (per slab of
            columns, updates the kept weights).
        calibration: for Wanda and SparseGPT: batches of token ids `(B, T)`, or dictionaries for the model's forward.
            Padding (`attention_mask` 0) is taken out, and batching and order do not matter. 128 sequences are usual.
        allocation: `"uniform"` sparsity for all tensors; `"erk"`, higher for larger ones; `"global"`, one magnitude
            threshold for all (magnitude only).
        exclude: globs of modules to leave dense: `"k_proj"`, `"layers.0.*"`.
        indivisible: what to do with a tensor whose inputs m does not divide: `"error"`, `"skip"` it, or leave a
            `"dense_tail"` of d % m inputs.
        seed: for `"random"`.
        update_weights: SparseGPT: let kept weights make up for removed ones. False prunes with its mask only.
        block_size: SparseGPT: columns per slab.
        damping: SparseGPT: share of the mean of the Hessian's diagonal that is added to it.
        min_keep: allocation `"global"`: least number kept per tensor, as a share of all weights.
        inside: masks of an earlier pruning of this model, whose removed weights are zero and stay removed: the new
            masks are a subset, with the exact counts of the new sparsity. A tensor without a mask counts as dense.
        progress: show a progress bar when it takes more than two seconds.

    Returns:
        The masks by canonical parameter name.

    Raises:
        ValueError: if an argument, the model or the calibration data cannot be used, or no masks with these counts
            exist inside `inside`; the model is then untouched, but for activations that turn out not finite.

    Example:
        >>> masks = prune(model, sparsity=0.5, method="wanda", calibration=[tokenizer(text, return_tensors="pt")])
        >>> masks.sparsity()
        0.5
    """
    _check_is_model(model)
    settings = check_settings(
        METHODS, pattern=pattern, sparsity=sparsity, method=method, allocation=allocation, exclude=exclude,
        indivisible=indivisible, seed=seed, update_weights=update_weights, block_size=block_size, damping=damping,
        min_keep=min_keep, progress=progress,
    )  # fmt: skip
    settings = replace(settings, inside=inside)
    model = getattr(model, "_orig_mod", model)  # a compiled module runs its graph, which knows no hooks
    return prune_with(model, settings, calibration)


def _check_is_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"prune takes a loaded model, got {type(model).__name__} {str(model)!r:.80}; for a directory use "
            f"sparse_ft.prune_checkpoint(source, output_dir, ...)."
        )


def prune_with(model: nn.Module, settings: Settings, calibration: Iterable[Any] | None) -> MaskSet:
    """`prune` with checked settings."""
    targets = divisible_targets(find_targets(model, exclude=settings.exclude), settings)
    owners = owners_of_weights(model)
    weights: dict[str, Tensor] = {target.name: getattr(*owners[target.name]) for target in targets}
    for target in targets:
        check_target(target, weights[target.name])
    method = METHODS[settings.method]
    batches = prepare_calibration(model, calibration, settings.method) if method.statistic is not None else []
    budgets = make_budgets(targets, settings, matrices_of(targets, weights))
    if settings.inside is not None:
        check_inside(settings.inside, targets, budgets, by_row=method.by_row)
        check_zeros(settings.inside, weights)
    masks = PackedMasks()
    if is_calibrated(method, budgets):
        device = getattr(model, "device", next(iter(weights.values())).device)
        prune_block_by_block(
            model, find_blocks(model), targets, budgets, batches, method, settings,
            device=device, finish=lambda block, found: masks.update(found),
        )  # fmt: skip
    else:
        with progress_bar(len(targets), settings, unit="tensor") as bar:
            for target in targets:
                masks.update(prune_matrices([target], weights, budgets, [], method, settings)[0])
                bar.update()
    return masks.as_mask_set(targets, settings)


def is_calibrated(method: Method, budgets: Mapping[str, list[Budget]]) -> bool:
    """Whether the method must see activations: it uses a statistic, and anything is removed at all."""
    return method.statistic is not None and not all(budget.is_dense for parts in budgets.values() for budget in parts)
