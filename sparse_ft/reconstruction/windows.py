"""How a block is cut into windows, found by running it: no list of architectures.

A window is a part of a block that is trained by itself, against what the dense block computes there:

| granularity | windows of a block |
|---|---|
| `block` | the whole block |
| `attn_mlp` | each attention sublayer with what comes before it, and the rest |
| `linear` | each pruned matrix by itself, in the order of their calls |

An attention window ends where the input of the next sublayer is complete: at the first module called after the
attention, but for norms and dropouts that are applied to the bare attention output (Gemma 2). With a residual stream
that input includes the residual, on the dense side as well. What comes after the cut is run with the recorded outputs
of the attention in place of the attention itself.

In blocks that run attention and MLP side by side (GPT-NeoX, GPT-J, Phi) the input of the MLP does not depend on the
attention: NaN in the attention's output does not reach it. They have no such cut and are one window, as are blocks
without attention. The same NaN tells which parts of that output nobody reads (attention weights); they are not kept.

Source: windows as in arXiv 2510.14444; cutting by observation is ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.pruning.replay import StandIn, StopForward, map_tensors, tensors_in

GRANULARITIES = ("attn_mlp", "block", "linear")
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Window:
    """A part of a block. Paths are names of modules in the block.

    Attributes:
        name: `"attn"`, `"mlp"`, `"block"`, or the path of a matrix.
        modules: whose weights it trains; `""` is the whole block.
        replayed: modules before it that answer with their recorded outputs.
        later: modules after it, which are never called.
        stop: the module at whose call it ends, with that call's first tensor as the result; None: the block's output.
        alone: it is one module, called by itself.
        unused: by path of a replayed module, which tensors of its output the block's result does not depend on.
        is_rest: it ends the block, and the block hands on nothing that the replayed modules made beside its result.
    """

    name: str
    modules: tuple[str, ...] = ("",)
    replayed: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    stop: str | None = None
    alone: bool = False
    unused: Mapping[str, frozenset[int]] = field(default_factory=dict)
    is_rest: bool = False

    def owns(self, name: str) -> bool:
        """Whether the parameter of this name in the block is the window's."""
        return any(not module or name.startswith(f"{module}.") for module in self.modules)


class _WindowEnd(StopForward):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given, self.kwargs_given = args, kwargs


class WindowCopy:
    """A window as a function: the block's own forward, with other modules in place of what is not run.

    The block itself is not touched: this is a copy of its structure, in eval mode, which shares its weights or has
    copies of those it needs.

    Args:
        block: the block.
        window: which part of it.
        share: use the block's own weights; else all weights that are run are copied.
        watch: modules whose first input tensor is noted in `seen` at each call.
        record: modules whose output is noted in `outputs` at each call, with the numbers of the tensors in it that are
            left out, as in `Window.unused`.
        keep: turns a tensor into the copy that is noted.

    Attributes:
        module: the copy. Names of its modules and parameters are those of the block.
        seen: by path, from the latest call.
        outputs: by path, from the latest call.
    """

    def __init__(
        self,
        block: nn.Module,
        window: Window,
        *,
        share: bool = True,
        watch: Iterable[str] = (),
        record: Mapping[str, frozenset[int]] | None = None,
        keep: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self._replayed: Mapping[str, Any] = {}
        self._keep = keep
        self.seen: dict[str, Tensor] = {}
        self.outputs: dict[str, Any] = {}
        memo: dict[int, Any] = {}
        if share:
            memo.update((id(tensor), tensor) for tensor in (*block.parameters(), *block.buffers()))
        for path in window.replayed:
            memo[id(block.get_submodule(path))] = StandIn(block.get_submodule(path), partial(self._answer, path))
        for path in (*window.later, *([window.stop] if window.stop else [])):
            memo[id(block.get_submodule(path))] = StandIn(block.get_submodule(path), _end)
        self.module = deepcopy(block, memo).eval()
        for path in watch:
            self.module.get_submodule(path).register_forward_pre_hook(partial(self._see, path), with_kwargs=True)
        for path, unused in (record or {}).items():
            self.module.get_submodule(path).register_forward_hook(partial(self._record, path, unused))

    def __call__(self, arguments: Arguments, replayed: Mapping[str, Any] | None = None) -> Tensor:
        """The window's result for one call of the block.

        Args:
            arguments: of the block; the tensors may be written into.
            replayed: outputs of the replayed modules by path, from `outputs`.
        """
        ended, values = self._run(arguments, replayed)
        return first_tensor(values if ended else values[0])

    def reach(self, arguments: Arguments) -> Arguments | None:
        """The arguments of the stop's first call; None if the block does not call it."""
        ended, values = self._run(arguments, None)
        return values if ended else None

    def _run(self, arguments: Arguments, replayed: Mapping[str, Any] | None) -> tuple[bool, Any]:
        self._replayed = replayed or {}
        self.seen, self.outputs = {}, {}
        args, kwargs = arguments
        try:
            return False, (self.module(*args, **kwargs),)
        except _WindowEnd as end:
            return True, (end.args_given, end.kwargs_given)
        finally:
            self._replayed = {}

    def _answer(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._replayed[path]

    def _see(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen[path] = self._keep(first_tensor((args, kwargs)))  # the block may go on to write into it

    def _record(self, path: str, unused: frozenset[int], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        numbers = iter(range(sum(1 for _ in tensors_in(output))))
        self.outputs[path] = map_tensors(output, lambda tensor: None if next(numbers) in unused else self._keep(tensor))


def _end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise _WindowEnd(args, kwargs)


def is_plain(value: Any, *, dictionaries: bool = True) -> bool:
    """Whether nested values hold nothing that a call could change beside tensors, such as a cache of keys.

    Args:
        value: anything.
        dictionaries: whether they may be among them, though a call could put something in.
    """
    inner = partial(is_plain, dictionaries=dictionaries)
    if isinstance(value, (tuple, list)):
        return all(map(inner, value))
    if isinstance(value, dict):
        return dictionaries and all(map(inner, value.values()))
    return value is None or isinstance(value, (Tensor, int, float, str, torch.dtype, torch.device))


def first_tensor(value: Any) -> Tensor:
    """The hidden states: a tensor, or the first one in a tuple or dictionary."""
    return next(iter(tensors_in(value)))


def find_windows(
    block: nn.Module, arguments: Callable[[], Arguments], granularity: str, matrices: Sequence[str]
) -> list[Window]:
    """Cut a block.

    Args:
        block: real weights, any mode; not changed.
        arguments: gives those of one call, anew each time: a block may write into what it is given.
        granularity: one of `GRANULARITIES`.
        matrices: parameters of the block that have a mask, by their names in the block.

    Returns:
        The windows in the order in which they are run. For `attn_mlp` just one, called `"block"`, if there is no cut.
    """
    if granularity == "block":
        return [Window("block")]
    module = WindowCopy(block, Window("block")).module
    if granularity == "linear":
        return _linear_windows(module, arguments(), matrices)
    calls, is_alone = _trace(module, arguments())
    windows = _cut(calls, [call for call in calls if _is_attention(call)])
    unused = _examine(module, arguments, windows) if len(windows) > 1 else None
    if unused is None:
        return [Window("block")]
    return [
        replace(
            window,
            unused={path: unused[path] for path in window.replayed},
            is_rest=window.stop is None and is_alone,
        )
        for window in windows
    ]


@dataclass(frozen=True)
class _Call:
    """One call of an outermost module of a block."""

    path: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None


@torch.no_grad()
def _trace(module: nn.Module, arguments: Arguments) -> tuple[list[_Call], bool]:
    """The calls of a block's outermost modules, in order, and whether its hidden states are all that it hands on.

    Tensors are kept, so that they can be told apart.
    """
    calls: list[_Call] = []
    depth = 0

    def enter(path: str, inner: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            calls.append(_Call(path, inner, next(iter(tensors_in((args, kwargs))), None), None))

    def leave(path: str, inner: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls[-1] = _Call(path, inner, calls[-1].given, next(iter(tensors_in(output)), None))

    hooks = []
    for path, inner in module.named_modules():
        if path:
            hooks.append(inner.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
            hooks.append(inner.register_forward_hook(partial(leave, path), with_kwargs=True))
    try:
        output = module(*arguments[0], **arguments[1])
    finally:
        for hook in hooks:
            hook.remove()
    given = (*arguments[0], *arguments[1].values())
    parts = [part for part in (output if isinstance(output, (tuple, list)) else (output,)) if part is not None]
    is_alone = len(parts) == 1 and isinstance(parts[0], Tensor) and is_plain(given, dictionaries=False)
    return calls, is_alone


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _is_attention(call: _Call) -> bool:
    names = (type(call.module).__name__.lower(), call.path.rpartition(".")[2].lower())
    return any(word in name for name in names for word in ("attention", "attn")) and _has_matrices(call.module)


def _cut(calls: Sequence[_Call], attention: Sequence[_Call]) -> list[Window]:
    """Windows between the cuts after each attention sublayer; fewer than two if there is no cut."""
    count = Counter(call.path for call in calls)
    stops = []
    for sublayer in attention:
        after = calls.index(sublayer) + 1
        while after < len(calls) and calls[after].given is calls[after - 1].returned is not None:
            if _has_matrices(calls[after].module):
                break
            after += 1
        if after < len(calls):
            stops.append(after)
    if not stops:
        return []
    starts, ends = [0, *stops], [*stops, len(calls)]
    names = ["attn", *(f"attn{number}" for number in range(2, len(stops) + 1)), "mlp"]
    windows = []
    for name, start, end in zip(names, starts, ends, strict=True):
        before = {call.path for call in calls[:start]}
        within = dict.fromkeys(call.path for call in calls[start:end] if call.path not in before)
        replayed = dict.fromkeys(call.path for call in calls[:start] if _has_matrices(call.module))
        later = {call.path for call in calls[end + 1 :]} - before - set(within)
        stop = calls[end].path if end < len(calls) else None
        if any(count[path] > 1 for path in (*replayed, *([stop] if stop else []))):
            return []
        windows.append(Window(name, tuple(within), tuple(replayed), tuple(sorted(later - {stop})), stop))
    return windows


def _examine(
    module: nn.Module, arguments: Callable[[], Arguments], windows: Sequence[Window]
) -> dict[str, frozenset[int]] | None:
    """What of the replayed outputs is not used; None if one of the cuts does not depend on what lies before it."""
    stops = [window.stop for window in windows if window.stop is not None]
    numbers, ends = _poisoned(module, arguments(), stops, windows[-1].replayed)
    unused: dict[str, frozenset[int]] = {}
    for window in windows[:-1]:
        reached = False
        for path in window.modules:
            for number in numbers.get(path, ()):
                _, poisoned = _poisoned(module, arguments(), stops, windows[-1].replayed, (path, number))
                reached = reached or not torch.equal(poisoned[window.stop], ends[window.stop])
                if torch.equal(poisoned[None], ends[None]):
                    unused[path] = unused.get(path, frozenset()) | {number}
        if not reached:
            return None
    return {path: unused.get(path, frozenset()) for path in windows[-1].replayed}


@torch.no_grad()
def _poisoned(
    module: nn.Module,
    arguments: Arguments,
    stops: Sequence[str],
    observed: Sequence[str],
    poison: tuple[str, int] | None = None,
) -> tuple[dict[str, list[int]], dict[str | None, Tensor]]:
    """Run a block with NaN in place of one tensor of one module's output.

    Returns:
        The numbers of the floating point tensors in each observed module's output, and the tensors at the stops and at
        the end, under None.
    """
    numbers: dict[str, list[int]] = {}
    ends: dict[str | None, Tensor] = {}

    def see(path: str, inner: nn.Module, args: Any, kwargs: Any) -> None:
        ends[path] = first_tensor((args, kwargs)).clone()

    def change(path: str, inner: nn.Module, args: Any, output: Any) -> Any:
        tensors = list(tensors_in(output))
        numbers[path] = [number for number, tensor in enumerate(tensors) if tensor.is_floating_point()]
        count = iter(range(len(tensors)))
        return map_tensors(output, lambda t: torch.full_like(t, torch.nan) if (path, next(count)) == poison else t)

    hooks = [
        module.get_submodule(path).register_forward_pre_hook(partial(see, path), with_kwargs=True) for path in stops
    ]
    hooks += [module.get_submodule(path).register_forward_hook(partial(change, path)) for path in observed]
    try:
        ends[None] = first_tensor(module(*arguments[0], **arguments[1]))
    finally:
        for hook in hooks:
            hook.remove()
    return numbers, ends


@torch.no_grad()
def _linear_windows(module: nn.Module, arguments: Arguments, matrices: Sequence[str]) -> list[Window]:
    """One window per module that holds matrices with a mask, in the order of their first calls, then the uncalled."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in matrices)
    called: dict[str, None] = {}
    hooks = [
        module.get_submodule(path).register_forward_pre_hook(lambda inner, args, path=path: called.setdefault(path))
        for path in owners
    ]
    try:
        module(*arguments[0], **arguments[1])
    finally:
        for hook in hooks:
            hook.remove()
    paths = dict.fromkeys([*called, *owners])
    return [Window(path, modules=(path,), stop=path, alone=True) for path in paths]
