"""Collect statistics of what flows into the prunable weights of one block.

Layers that get the same tensor (q, k and v; gate and up) share one statistic, and it is computed once. Fused experts
have one statistic per expert, over the tokens the router sent there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from sparse_ft.models import Target
from sparse_ft.pruning.expert_inputs import LAST_PROJECTION, between_projections, expert_inputs
from sparse_ft.pruning.plan import Statistic, matrix_names
from sparse_ft.pruning.replay import StopForward

MakeStatistic = Callable[..., Statistic]


class InputGroup:
    """One input and the matrices that receive it.

    Attributes:
        matrices: names of the matrices, see `plan.matrix_names`.
        statistic: their common statistic; None while no token was seen.
    """

    def __init__(self) -> None:
        self.matrices: list[str] = []
        self.statistic: Statistic | None = None
        self._adder: object = None

    @property
    def tokens(self) -> int:
        """Number of tokens seen."""
        return 0 if self.statistic is None else self.statistic.tokens

    def start_batch(self) -> None:
        """Forget which module added last."""
        self._adder = None

    def add(self, inputs: Tensor, make: MakeStatistic, adder: object) -> None:
        """Count `inputs` (…, d), given to module `adder`.

        Raises:
            RuntimeError: if another module of the group has added a different tensor in this forward.
        """
        if self._adder is not None and self._adder is not adder:
            raise RuntimeError(
                f"The inputs of {self.matrices} were one tensor in the first calibration batch and are not in a later "
                f"one; exclude all of them but one."
            )
        self._adder = adder
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        if self.statistic is None:
            self.statistic = make(inputs.shape[1], device=inputs.device)
        self.statistic.add(inputs)


class BlockObserver:
    """Context manager with hooks on the target modules of one block.

    Args:
        targets: the block's targets with the modules that hold them.
        make: makes a statistic, `(d, device=…)`.

    Attributes:
        groups: one `InputGroup` per distinct input, complete when all batches have run.
    """

    def __init__(self, targets: Sequence[tuple[Target, nn.Module]], make: MakeStatistic) -> None:
        self._make = make
        self._targets: dict[nn.Module, list[Target]] = {}
        for target, module in targets:
            self._targets.setdefault(module, []).append(target)
        self._group_of: dict[nn.Module, InputGroup] = {}
        self._expert_groups: dict[nn.Module, tuple[list[InputGroup], list[InputGroup]]] = {}
        self._recent: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], InputGroup]] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._may_stop = False
        self._hooks: list[Any] = []
        self.groups: list[InputGroup] = []

    def __enter__(self) -> BlockObserver:
        for module, targets in self._targets.items():
            if targets[0].kind == "experts":
                hook = partial(self._observe_experts, targets)
            else:
                hook = partial(self._observe_linear, targets[0])
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._recent.clear()

    def start_batch(self, number: int) -> None:
        """Say that a new forward begins.

        When the first batch has shown that every target is used just once, later forwards are stopped as soon as the
        last target has its input: what comes after it (its own product, above all) has no use.
        """
        if number == 1:
            self._may_stop = len(self._calls) == len(self._hooks) and set(self._calls.values()) == {1}
        self._calls.clear()
        self._recent.clear()
        for group in self.groups:
            group.start_batch()

    def _observe_linear(self, target: Target, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        key = (inputs.data_ptr(), inputs.shape, inputs.stride(), inputs._version)
        seen, shared = self._recent.get(key, (None, None))
        if seen is None or seen() is None:  # where a dead tensor was, another may lie now
            shared = None
        group = self._group_of.get(module)
        if group is None:
            group = shared or self._new_group()
            group.matrices.append(target.name)
            self._group_of[module] = group
        if group is not shared:
            group.add(inputs, self._make, module)
            self._recent[key] = (weakref.ref(inputs), group)
        self._count(module)

    def _observe_experts(
        self, targets: Sequence[Target], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        first, last = self._groups_of_experts(module, targets)
        transposed = targets[0].input_dim == 1
        for expert, inputs in expert_inputs(module, targets[0].shape[0], args, kwargs):
            if first:
                first[expert].add(inputs, self._make, module)
            if last:
                inputs = between_projections(module, expert, inputs, transposed=transposed)
                last[expert].add(inputs, self._make, module)
        self._count(module)

    def _groups_of_experts(
        self, module: nn.Module, targets: Sequence[Target]
    ) -> tuple[list[InputGroup], list[InputGroup]]:
        """Per expert, the group of the module's own input and that of the input of its last projection."""
        if module not in self._expert_groups:
            first: list[InputGroup] = []
            last: list[InputGroup] = []
            for target in targets:
                groups = last if target.name.endswith(f".{LAST_PROJECTION}") else first
                groups.extend(self._new_group() for _ in range(target.shape[0] - len(groups)))
                for group, name in zip(groups, matrix_names(target), strict=True):
                    group.matrices.append(name)
            self._expert_groups[module] = (first, last)
        return self._expert_groups[module]

    def _new_group(self) -> InputGroup:
        self.groups.append(InputGroup())
        return self.groups[-1]

    def _count(self, module: nn.Module) -> None:
        self._calls[module] += 1
        if self._may_stop and len(self._calls) == len(self._hooks):
            raise StopForward
