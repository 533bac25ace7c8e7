"""Masks of whole models, from the zeros of weights or from scores; `MaskSet.from_zeros` and `from_scores` call this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_ft.masks.pattern import Pattern, check_sparsity
from sparse_ft.masks.selection import keep_largest, keep_largest_globally, keep_largest_per_row, keep_n_of_m
from sparse_ft.models.targets import Target, matrix_view


def masks_of_zeros(
    weights: Mapping[str, Tensor], targets: Sequence[Target], pattern: Pattern, min_sparsity: float
) -> dict[str, Tensor]:
    """The zeros of some weights as bool masks in the weights' own layout, by name.

    Args:
        weights: by canonical name.
        targets: which of them.
        pattern: that the zeros must have; of n:m, every whole group keeps exactly n.
        min_sparsity: a tensor with a smaller share of zeros is taken as dense.

    Raises:
        ValueError: if the whole is dense, or a group has more than n non-zero weights.
    """
    masks = {}
    for target in targets:
        nonzero = matrix_view(weights[target.name].detach() != 0, target.input_dim)
        if float((~nonzero).float().mean()) < min_sparsity:
            mask = torch.ones_like(nonzero)
        elif pattern.n is not None and pattern.m is not None:
            mask = keep_n_of_m(nonzero.to(torch.uint8), pattern.n, pattern.m)
            _check_pattern_of_zeros(target.name, nonzero & ~mask, pattern)
        else:
            mask = nonzero
        masks[target.name] = matrix_view(mask, target.input_dim).contiguous()
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    if total - kept < min_sparsity * total:
        raise ValueError(
            f"The model is dense: {total - kept} of its {total} prunable weights are zero; prune it first "
            f"(sparse_ft.prune or `sparse-ft prune`), or pass its masks."
        )
    return masks


def _check_pattern_of_zeros(name: str, excess: Tensor, pattern: Pattern) -> None:
    count = int(excess.sum())
    if count:
        raise ValueError(
            f"'{name}' is not {pattern} sparse: {count} non-zero weights exceed {pattern.n} in their group of "
            f"{pattern.m}; use pattern 'unstructured' or prune it again."
        )


def masks_of_scores(
    scores: Mapping[str, Tensor], pattern: Pattern, sparsity: float | None, scope: str, input_dims: Mapping[str, int]
) -> dict[str, Tensor]:
    """Bool masks of the largest scores, in the scores' own layout, by name.

    Args:
        scores: by name.
        pattern: n:m keeps n of every m inputs.
        sparsity: share to prune where the pattern is unstructured.
        scope: what the share is taken of: `"tensor"`, `"row"` or `"global"`.
        input_dims: axis of the inputs of each.

    Raises:
        ValueError: on no scores, a sparsity outside [0, 1), an unknown scope, or NaN scores.
    """
    if not scores:
        raise ValueError("A MaskSet needs at least one tensor of scores, got none.")
    share = check_sparsity(pattern, sparsity)
    if scope not in ("tensor", "row", "global"):
        raise ValueError(f"Unknown scope '{scope}'; use 'tensor', 'row' or 'global'.")
    if pattern.n is None and scope == "global":
        return keep_largest_globally(scores, share)
    masks = {}
    for name, score in scores.items():
        view = matrix_view(score, input_dims[name])
        if pattern.n is not None and pattern.m is not None:
            mask = keep_n_of_m(view, pattern.n, pattern.m)
        elif scope == "row":
            mask = keep_largest_per_row(view, view.shape[-1] - math.floor(share * view.shape[-1]))
        else:
            mask = matrix_view(keep_largest(score, score.numel() - round(share * score.numel())), input_dims[name])
        masks[name] = matrix_view(mask, input_dims[name]).contiguous()
    return masks
