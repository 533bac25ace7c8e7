"""Prune a model block by block, each with statistics of the inputs it gets from the blocks pruned before it.

    for each block, in the order the model calls them:
        run it DENSE on all batches, collecting statistics of its layers' inputs
        prune its matrices
        run it PRUNED on the same inputs; its outputs are the inputs of the next block

That is two passes over the blocks (the last block needs one), and no head.

Source: Frantar & Alistarh 2023 (SparseGPT) and Sun et al. 2023 (Wanda), the calibration procedure of both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparse_ft.models import Target
from sparse_ft.pruning.matrices import MIN_TOKENS, owners_of_weights, prune_matrices
from sparse_ft.pruning.observation import BlockObserver, InputGroup
from sparse_ft.pruning.plan import Budget, Method, Settings
from sparse_ft.pruning.replay import BlockReplay
from sparse_ft.pruning.weight_use import WeightUse


def prune_block_by_block(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    targets: Sequence[Target],
    budgets: Mapping[str, list[Budget]],
    batches: Sequence[dict[str, Any]],
    method: Method,
    settings: Settings,
    *,
    device: torch.device | str,
    finish: Callable[[str, dict[str, Tensor]], None],
    load: Callable[[str], None] = lambda name: None,
) -> None:
    """Prune every target in place, calibrating as it goes.

    A block that the model never calls for these batches is pruned by magnitude, with a warning; so is a matrix that
    fewer than `MIN_TOKENS` tokens reach, and one that is used without a call of its module, which hides its inputs.

    Args:
        model: the model; a block's parameters must be real between `load` and `finish`.
        blocks: its blocks as (canonical name, module).
        targets: what is pruned, in blocks.
        budgets: by target name.
        batches: from `prepare_calibration`.
        method: one with a statistic.
        settings: checked arguments.
        device: of the inputs.
        finish: called with a block's name and its masks, by target name in the parameter's own layout, once it is
            pruned and its output recorded.
        load: called with a block's name before it runs.

    Raises:
        ValueError: if the calibration activations are not finite.
    """
    of_block: dict[str, list[Target]] = {name: [] for name, _ in blocks}
    for target in targets:
        of_block[target.block].append(target)
    left = dict(blocks)
    starved: list[str] = []
    uncalled: list[str] = []
    with BlockReplay(model, blocks, batches, device) as replay, progress_bar(len(blocks), settings) as bar:
        while left:
            index = replay.next_block()
            name = blocks[index][0] if index is not None else next(iter(left))
            block = left.pop(name)
            load(name)
            owners = {weight: owner for weight, (owner, _) in owners_of_weights(block, name).items()}
            groups: list[InputGroup] = []
            hidden: set[str] = set()
            if index is not None:
                pruned = [t for t in of_block[name] if not all(budget.is_dense for budget in budgets[t.name])]
                groups, hidden = _observe(replay, index, [(t, owners[t.name]) for t in pruned], method)
            weights = {t.name: _parameter(owners[t.name], t) for t in of_block[name]}
            masks, few = prune_matrices(of_block[name], weights, budgets, groups, method, settings)
            starved += [matrix for matrix in few if matrix not in hidden]
            uncalled += [matrix for matrix in few if matrix in hidden]
            if index is not None and left:
                replay.run(index, record=True)
            finish(name, masks)
            bar.update()
    _warn_of_starved(starved)
    _warn_of_uncalled(uncalled)


def progress_bar(total: int, settings: Settings, unit: str = "block") -> Any:
    """A bar that shows itself when the work takes more than two seconds."""
    return tqdm(total=total, desc=f"prune {settings.method}", unit=unit, delay=2, disable=not settings.progress)


def _parameter(owner: nn.Module, target: Target) -> Tensor:
    return getattr(owner, target.name.rpartition(".")[2])


def _observe(
    replay: BlockReplay, index: int, targets: Sequence[tuple[Target, nn.Module]], method: Method
) -> tuple[list[InputGroup], set[str]]:
    """What flows into the targets of one block, and the weights that are used without calling their modules."""
    if not targets or method.statistic is None:
        return [], set()
    use = WeightUse({target.name: _parameter(owner, target) for target, owner in targets})
    with BlockObserver(targets, method.statistic) as observer, ExitStack() as first_batch:
        first_batch.enter_context(use)

        def before_batch(number: int) -> None:
            observer.start_batch(number)
            if number == 1:
                first_batch.close()

        replay.run(index, before_batch=before_batch)
    seen = {matrix for group in observer.groups for matrix in group.matrices}
    return observer.groups, use.used - seen


def _warn_of_starved(matrices: Sequence[str]) -> None:
    if matrices:
        warnings.warn(
            f"{len(matrices)} matrices saw fewer than {MIN_TOKENS} calibration tokens, or only zeros, and were pruned "
            f"by magnitude: {_listing(matrices)}; give more calibration data.",
            stacklevel=4,
        )


def _warn_of_uncalled(matrices: Sequence[str]) -> None:
    if matrices:
        warnings.warn(
            f"The model uses {len(matrices)} weights without calling their modules, so their inputs cannot be observed "
            f"and they were pruned by magnitude: {_listing(matrices)}; exclude them to leave them dense.",
            stacklevel=4,
        )


def _listing(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
