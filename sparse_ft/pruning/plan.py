"""What is removed from which matrix: one checked `Settings`, and a `Budget` per weight matrix.

Everything a user can get wrong is refused here, before a weight is touched. A matrix is one (out, in) weight; a stack
of fused experts `(E, o, d)` is E matrices, named `"….gate_up_proj[0]"`, `"….gate_up_proj[1]"`, … .
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import Target
from sparse_ft.naming import check_choice
from sparse_ft.pruning.allocation import check_min_keep, erk, global_magnitude, uniform
from sparse_ft.pruning.validation import check_block_size, check_damping, check_weight, resolve_pattern, share_of_row

ALLOCATIONS = ("uniform", "global", "erk")
INDIVISIBLE = ("error", "skip", "dense_tail")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Statistic(Protocol):
    """A running statistic of a layer's inputs, such as `SecondMoment` and `Hessian`."""

    tokens: int

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs` (T, d)."""

    def second_moment(self) -> Tensor:
        """Mean square of each of the d features."""


@dataclass(frozen=True)
class Budget:
    """What goes from one matrix.

    Attributes:
        matrix: its name; the tensor's canonical name, with `[e]` behind it for expert e.
        shape: (o, d), inputs last.
        pattern: unstructured or n:m.
        sparsity: share removed.
        removed: exact number removed; None for n:m, where the pattern fixes it.
        inside: (o, d) bool, an older mask that the new one must not exceed; None where there is none.
    """

    matrix: str
    shape: tuple[int, int]
    pattern: Pattern
    sparsity: float
    removed: int | None
    inside: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        """True when nothing is removed."""
        return self.removed == 0 or (self.pattern.is_structured and self.pattern.n == self.pattern.m)

    @property
    def removed_per_row(self) -> int | None:
        """How many weights of each row go, for methods that count by row; None for n:m."""
        return None if self.pattern.is_structured else share_of_row(self.shape[1], self.sparsity)


@dataclass(frozen=True)
class Settings:
    """Checked arguments of `prune` and `prune_checkpoint`; see there for their meaning."""

    method: str
    pattern: Pattern
    sparsity: float
    allocation: str
    exclude: tuple[str, ...]
    indivisible: str
    seed: int
    update_weights: bool
    block_size: int
    damping: float
    min_keep: float
    progress: bool
    inside: MaskSet | None = None


@dataclass(frozen=True)
class Method:
    """A pruning method as the drivers see it.

    Attributes:
        prune: `(weight (o, d), statistic, budget, settings) -> (mask, new weight or None)`. The statistic is what
            `prepare` returned, or None where too few tokens reached the layer.
        statistic: makes the running statistic of an input, `(d, device=…)`; None for methods without calibration.
        prepare: turns the finished statistic into what `prune` needs, once for all layers that share the input.
        allocations: how the budget may be spread over the tensors.
        by_row: whether an unstructured mask has the same count in every row.
    """

    prune: Callable[[Tensor, Any, Budget, Settings], tuple[Tensor, Tensor | None]]
    statistic: Callable[..., Statistic] | None = None
    prepare: Callable[[Any, Settings], Any] = field(default=lambda statistic, settings: statistic)
    allocations: tuple[str, ...] = ("uniform",)
    by_row: bool = False


def check_settings(
    methods: Mapping[str, Method],
    *,
    pattern: str | Pattern,
    sparsity: float | None,
    method: str,
    allocation: str,
    exclude: Sequence[str],
    indivisible: str,
    seed: int,
    update_weights: bool,
    block_size: int,
    damping: float,
    min_keep: float,
    progress: bool,
) -> Settings:
    """Check the arguments of `prune` that need no model.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    check_choice("method", method, methods)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("indivisible", indivisible, INDIVISIBLE)
    parsed, share = resolve_pattern(pattern, sparsity)
    allowed = methods[method].allocations
    if allocation not in allowed:
        raise ValueError(f"method '{method}' cannot use allocation '{allocation}'; use one of {', '.join(allowed)}.")
    if parsed.is_structured and allocation != "uniform":
        raise ValueError(f"pattern '{parsed}' fixes every tensor's sparsity; leave out allocation '{allocation}'.")
    check_block_size(block_size)
    check_damping(damping)
    check_min_keep(min_keep)
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return Settings(
        method, parsed, share, allocation, names, indivisible, seed, update_weights, block_size, damping, min_keep,
        progress,
    )  # fmt: skip


def divisible_targets(targets: Sequence[Target], settings: Settings) -> list[Target]:
    """The targets that the pattern can be put on, after `indivisible` was applied to the others.

    Raises:
        ValueError: if an input dimension is no multiple of m and `indivisible` is "error", or none is left.
    """
    m, odd = settings.pattern.m, []
    if m is not None and settings.indivisible != "dense_tail":
        odd = [t for t in targets if t.in_features % m]
    if not odd:
        return list(targets)
    first = odd[0]
    what = f"'{first.name}' has {first.in_features} inputs, which pattern '{settings.pattern}' cannot split into {m}s"
    if settings.indivisible == "error":
        tail = first.module.rpartition(".")[2]
        raise ValueError(
            f"{what}; exclude (--exclude) {tail}, or set indivisible (--indivisible) to skip or dense_tail."
        )
    kept = [t for t in targets if t not in odd]
    if not kept:
        raise ValueError(
            f"{what}, nor any other of the {len(odd)} tensors; set indivisible (--indivisible) to dense_tail."
        )
    warnings.warn(f"{what}; {len(odd)} tensors stay dense for this reason.", stacklevel=3)
    return kept


def check_target(target: Target, weight: Tensor) -> None:
    """Check that a weight can be pruned where it is: real memory, its full shape, a float dtype, finite values.

    Raises:
        ValueError: naming the tensor and what is wrong with it.
    """
    if weight.is_meta:
        raise ValueError(f"'{target.name}' is on the meta device; load its weights, or use prune_checkpoint.")
    if tuple(weight.shape) != target.shape or weight.dtype not in _DTYPES:
        raise ValueError(
            f"'{target.name}' holds {weight.dtype} {tuple(weight.shape)} where its layer has {target.shape}: it is "
            f"quantised or sharded; load the model in float16, bfloat16 or float32, whole."
        )
    check_weight(weight, target.name)


def matrix_names(target: Target) -> list[str]:
    """Names of the matrices of a tensor: its own, or one per expert."""
    if target.kind != "experts":
        return [target.name]
    return [f"{target.name}[{expert}]" for expert in range(target.shape[0])]


def make_budgets(
    targets: Sequence[Target], settings: Settings, matrices: Mapping[str, Tensor]
) -> dict[str, list[Budget]]:
    """The budgets of each target's matrices, by target name.

    Args:
        targets: what is pruned.
        settings: checked arguments.
        matrices: weights (o, d) by matrix name, read one at a time and only for allocation "global".

    Raises:
        ValueError: if the allocation cannot reach the sparsity.
    """
    shapes = {name: _matrix_shape(target) for target in targets for name in matrix_names(target)}
    removed: dict[str, int | None] = dict.fromkeys(shapes)
    shares = dict.fromkeys(shapes, settings.sparsity)
    if not settings.pattern.is_structured:
        removed.update(_allocate(shapes, settings, matrices))
    if settings.allocation != "uniform":
        shares = {name: (removed[name] or 0) / (o * d) for name, (o, d) in shapes.items()}
    return {
        target.name: [
            Budget(name, shapes[name], settings.pattern, shares[name], removed[name]) for name in matrix_names(target)
        ]
        for target in targets
    }


def _matrix_shape(target: Target) -> tuple[int, int]:
    outputs = target.numel // target.in_features
    if target.kind == "experts":
        outputs //= target.shape[0]
    return outputs, target.in_features


def _allocate(
    shapes: Mapping[str, tuple[int, int]], settings: Settings, matrices: Mapping[str, Tensor]
) -> dict[str, int]:
    if settings.allocation == "erk":
        return erk(shapes, settings.sparsity)
    if settings.allocation == "global":
        return global_magnitude(matrices, settings.sparsity, min_keep=settings.min_keep)
    return uniform({name: o * d for name, (o, d) in shapes.items()}, settings.sparsity)
