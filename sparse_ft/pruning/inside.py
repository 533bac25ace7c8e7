"""Pruning further under an older mask: what it removed stays removed, and the counts are those of the new sparsity.

A pruned weight is zero and so is its score, but it is not the only zero: kept weights can be zero by chance, the inputs
of a dead neuron make every score of a column zero, and random scores know no weights at all. So the scores of removed
weights are set to minus infinity: of m candidates they go first, and no method can bring one back.

Example:
    >>> older = prune(model, sparsity=0.5)
    >>> newer = prune(model, sparsity=0.7, inside=older)             # newer <= older
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import Target, matrix_view
from sparse_ft.pruning.plan import Budget


def hide_removed(scores: Tensor, inside: Tensor | None) -> Tensor:
    """`scores` with minus infinity where an older mask (same shape, True = keep) removed the weight already."""
    return scores if inside is None else scores.masked_fill(~inside.to(scores.device), -math.inf)


def check_room(
    inside: Tensor,
    pattern: Pattern,
    *,
    removed: int | None = None,
    removed_per_row: int | None = None,
    name: str = "weight",
) -> None:
    """Check that a mask with exact counts exists inside an older one.

    Args:
        inside: (o, d) bool, the older mask.
        pattern: of the new mask.
        removed: how many weights of the matrix the new mask removes, where it counts by matrix.
        removed_per_row: how many of each row, where it counts by row.
        name: of the matrix, for the message.

    Raises:
        ValueError: if the older mask removed more of the matrix, of a row or of a group than the new one may.
    """
    if pattern.n is not None and pattern.m is not None:
        whole = inside.shape[-1] // pattern.m * pattern.m
        short = int((inside[..., :whole].unflatten(-1, (-1, pattern.m)).sum(-1) < pattern.n).sum())
        if short:
            raise ValueError(
                f"'{name}' has {short} groups of {pattern.m} inputs in which the mask to stay inside keeps fewer than "
                f"{pattern.n} weights, so pattern '{pattern}' cannot be reached exactly; start from the dense model or "
                f"from a mask of {pattern.m}s, or use pattern 'unstructured'."
            )
        return
    gone = (~inside).sum(-1)
    if removed_per_row is not None and int(gone.max()) > removed_per_row:
        raise ValueError(
            f"Row {int(gone.argmax())} of '{name}' has lost {int(gone.max())} weights in the mask to stay inside, but "
            f"this method and sparsity remove {removed_per_row} of each row; raise the sparsity, or use a method that "
            f"counts by tensor, such as 'magnitude'."
        )
    if removed is not None and int(gone.sum()) > removed:
        raise ValueError(
            f"'{name}' has lost {int(gone.sum())} weights in the mask to stay inside, but this sparsity removes only "
            f"{removed} of it; raise the sparsity."
        )


def matrices_inside(target: Target, inside: MaskSet) -> list[Tensor | None]:
    """The older masks (o, d) of a target's matrices, one, or one per expert; None where there is no older mask."""
    if target.name not in inside:
        return [None] * (target.shape[0] if target.kind == "experts" else 1)
    view = matrix_view(inside[target.name], target.input_dim)
    return list(view) if target.kind == "experts" else [view]


def budgets_inside(target: Target, budgets: Sequence[Budget], inside: MaskSet | None) -> list[Budget]:
    """A target's budgets, each with the older mask that it must stay inside."""
    if inside is None:
        return list(budgets)
    return [replace(b, inside=mask) for b, mask in zip(budgets, matrices_inside(target, inside), strict=True)]


def check_inside(
    inside: MaskSet, targets: Sequence[Target], budgets: Mapping[str, list[Budget]], *, by_row: bool
) -> None:
    """Check, before any work, that every matrix can be pruned further under its older mask.

    Args:
        inside: the older masks.
        targets: what will be pruned.
        budgets: by target name.
        by_row: whether the method counts by row.

    Raises:
        ValueError: if the older masks have another shape, have removed weights of a tensor that is not pruned now, or
            removed more than the new ones may.
    """
    for name, (kept, total) in inside.counts().items():
        if kept < total and all(target.name != name for target in targets):
            raise ValueError(
                f"'{name}' was pruned in the mask to stay inside but is not pruned now; leave it out of "
                f"exclude (--exclude) and indivisible (--indivisible)."
            )
    for target in targets:
        _check_shape(target.name, target.shape, inside)
        for budget in budgets_inside(target, budgets[target.name], inside):
            if budget.inside is not None:
                count = {"removed_per_row": budget.removed_per_row} if by_row else {"removed": budget.removed}
                check_room(budget.inside, budget.pattern, name=budget.matrix, **count)


def check_zeros(inside: MaskSet, weights: Mapping[str, Tensor]) -> None:
    """Refuse an older mask whose removed weights are alive: statistics and thresholds would count them.

    Args:
        inside: the older masks.
        weights: some of the tensors that will be pruned, by canonical name.

    Raises:
        ValueError: if a removed weight is not zero, or a mask has another shape.
    """
    for name in inside.keys() & weights.keys():
        _check_shape(name, tuple(weights[name].shape), inside)
        alive = int((weights[name].detach()[~inside[name].to(weights[name].device)] != 0).sum())
        if alive:
            raise ValueError(
                f"{alive} weights of '{name}' are not zero though the mask to stay inside removed them; call "
                f"inside.apply_(model) first, or prune the model these masks were saved with."
            )


def _check_shape(name: str, shape: tuple[int, ...], inside: MaskSet) -> None:
    if name in inside and inside.shape(name) != shape:
        raise ValueError(
            f"'{name}' has shape {shape} but the mask to stay inside has {inside.shape(name)}; they are of two models."
        )
