"""Prune the matrices of some tensors in place: statistics and budgets in, masks out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet, pack_bits
from sparse_ft.models import Target, canonical_name, matrix_view
from sparse_ft.pruning.inside import budgets_inside
from sparse_ft.pruning.observation import InputGroup
from sparse_ft.pruning.plan import Budget, Method, Settings, matrix_names

#: A matrix that saw fewer tokens than this (an expert the router avoids) is pruned by magnitude.
MIN_TOKENS = 32


def owners_of_weights(module: nn.Module, prefix: str = "") -> dict[str, tuple[nn.Module, str]]:
    """The module that holds each parameter and the parameter's name in it, by canonical parameter name.

    Args:
        module: a model, or a block of one.
        prefix: canonical name of `module` in the model; empty for the model itself.
    """
    return {
        canonical_name(".".join(part for part in (prefix, path, name) if part)): (owner, name)
        for path, owner in module.named_modules()
        for name, _ in owner.named_parameters(recurse=False)
    }


def split_matrices(target: Target, weight: Tensor) -> list[Tensor]:
    """Views (o, d) of a target's weight, in the order of its budgets: one, or one per expert."""
    view = matrix_view(weight.detach(), target.input_dim)
    return list(view) if target.kind == "experts" else [view]


def matrices_of(targets: Sequence[Target], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views (o, d) of all targets' matrices by matrix name, given the weights by target name."""
    return {
        name: matrix
        for target in targets
        for name, matrix in zip(matrix_names(target), split_matrices(target, weights[target.name]), strict=True)
    }


def return_free_memory() -> None:
    """Give freed memory back to the system.

    glibc keeps it in the pieces it was freed in, which tensors of other sizes do not fit: without this, memory creeps
    up with every block.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PackedMasks:
    """Masks collected tensor by tensor, held as one bit per weight."""

    def __init__(self) -> None:
        self._packed: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def update(self, masks: Mapping[str, Tensor]) -> None:
        """Add bool masks by name."""
        for name, mask in masks.items():
            self._packed[name], self._shapes[name] = pack_bits(mask).cpu(), mask.shape

    def as_mask_set(self, targets: Sequence[Target], settings: Settings) -> MaskSet:
        """The masks as a `MaskSet`, in the order of the targets.

        Raises:
            RuntimeError: if they are not inside the older masks, which is a defect of the method.
        """
        return_free_memory()
        packed = {target.name: self._packed[target.name] for target in targets}
        axes = {target.name: target.input_dim for target in targets}
        masks = MaskSet.from_packed(packed, self._shapes, pattern=settings.pattern, input_dims=axes)
        if settings.inside is not None and not masks <= settings.inside:
            raise RuntimeError(f"Method '{settings.method}' kept weights that the mask to stay inside had removed.")
        return masks


@torch.no_grad()
def prune_matrices(
    targets: Sequence[Target],
    weights: Mapping[str, Tensor],
    budgets: Mapping[str, list[Budget]],
    groups: Sequence[InputGroup],
    method: Method,
    settings: Settings,
) -> tuple[dict[str, Tensor], list[str]]:
    """Prune targets in place.

    Statistics are given up as soon as they are used, so that no two Hessians are prepared at a time.

    Args:
        targets: what to prune.
        weights: their parameters, by target name.
        budgets: by target name.
        groups: what was observed of their inputs; empty for a method without calibration.
        method: how.
        settings: checked arguments.

    Returns:
        The masks in the parameters' own layout, by target name, and the names of the matrices that were pruned without
        a statistic, because too few tokens or none were observed.

    Raises:
        ValueError: if a statistic is not finite.
    """
    matrices = {
        budget.matrix: (budget, matrix)
        for target in targets
        for budget, matrix in zip(
            budgets_inside(target, budgets[target.name], settings.inside),
            split_matrices(target, weights[target.name]),
            strict=True,
        )
    }
    masks: dict[str, Tensor] = {}
    enough = min(MIN_TOKENS, max((group.tokens for group in groups), default=0))
    starved = []
    for group in groups:
        statistic = _prepare(group, method, settings) if group.tokens >= max(enough, 1) else None
        group.statistic = None
        for name in group.matrices:
            masks[name] = _prune_matrix(*matrices[name], statistic, method, settings)
        starved += group.matrices if statistic is None else []
        del statistic
    for name in matrices.keys() - masks.keys():
        masks[name] = _prune_matrix(*matrices[name], None, method, settings)
        starved += [] if matrices[name][0].is_dense else [name]
    return {target.name: _join_masks(target, budgets[target.name], masks) for target in targets}, starved


def _prepare(group: InputGroup, method: Method, settings: Settings) -> Any:
    moment = group.statistic.second_moment() if group.statistic is not None else torch.zeros(0)
    if not bool(torch.isfinite(moment).all()):
        raise ValueError(
            f"The calibration inputs of '{group.matrices[0]}' contain NaN or infinite values; check the weights before "
            f"it and the dtype (float16 overflows where bfloat16 does not)."
        )
    return method.prepare(group.statistic, settings) if bool(moment.any()) else None


def _prune_matrix(budget: Budget, weight: Tensor, statistic: Any, method: Method, settings: Settings) -> Tensor:
    if budget.is_dense:  # an older mask has room for it only if it is dense as well
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    mask, updated = method.prune(weight, statistic, budget, settings)
    mask = mask.to(weight.device)
    if updated is not None:
        weight.copy_(updated)
    weight.masked_fill_(~mask, 0)
    return mask


def _join_masks(target: Target, budgets: Sequence[Budget], masks: dict[str, Tensor]) -> Tensor:
    parts = [masks.pop(budget.matrix) for budget in budgets]
    whole = torch.stack(parts) if target.kind == "experts" else parts[0]
    return matrix_view(whole, target.input_dim).contiguous()
