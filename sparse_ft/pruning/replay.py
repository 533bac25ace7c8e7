"""Run a model's own forward, over and over, one block further each time.

To calibrate block k, its inputs must come from blocks 0…k-1 that are already pruned, and its other arguments (masks,
position embeddings, an encoder's output) must be exactly those the model passes. So the model itself is called, once
per batch and pass: blocks that are done answer with the output recorded when they were last run, block k really runs,
and the forward is stopped where the next block would begin. Nothing is called with arguments made by hand, whatever
the architecture; a decoder sees the output of the pruned encoder; and of all the model only block k costs time.

    with BlockReplay(model, find_blocks(model), batches) as replay:
        while (index := replay.next_block()) is not None:
            replay.run(index)                        # dense: observe with hooks
            ...                                      # prune it
            replay.run(index, record=True)           # pruned: its output is what the following blocks see

Recorded tensors are dropped as soon as they are dead: one that a block took in and the next block did not. Should a
model read such a tensor later after all, it reads NaN, never a wrong number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):
    """Raised inside the model's forward when nothing more is needed of it; `BlockReplay` catches it."""


class _BlockReached(StopForward):
    def __init__(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(index)
        self.index, self.args_given, self.kwargs_given = index, args, kwargs


@dataclass(frozen=True)
class _Call:
    """What one call of a block left behind.

    Attributes:
        output: what it returned.
        notes: what it wrote into dictionaries it was given, by argument name: Gemma's blocks share keys and values so.
    """

    output: Any
    notes: dict[str, dict[Any, Any]]


@dataclass(frozen=True)
class _Dropped:
    """Stands for a recorded tensor that is dead."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class StandIn(nn.Module):
    """Takes a module's place and answers its calls. Attributes that are read of the module are still the module's.

    Args:
        module: whose place it takes.
        answer: called with the arguments of each call, `(args, kwargs)`; its result is the call's.
    """

    def __init__(self, module: nn.Module, answer: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["_module"] = module  # not as a submodule: the module is not in the model now
        self.__dict__["_answer"] = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `answer` says."""
        return self._answer(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_module"], name)


class BlockReplay:
    """Context manager that runs the blocks of a model one at a time; the model is as before when it ends.

    Inside, the model is in eval mode without gradients, and blocks that are not running are out of it.

    Args:
        model: any transformers model.
        blocks: its repeated blocks as (name, module), in any order.
        batches: keyword arguments of the model's forward.
        device: where the batches are moved.
        keep: turns a tensor of a recorded output into the one that is held until it is dead: its copy, unless it is
            to lie elsewhere than on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        batches: Sequence[dict[str, Any]],
        device: torch.device | str = "cpu",
        *,
        keep: Callable[[Tensor], Tensor] = torch.clone,
    ) -> None:
        self._model = model
        self._names = [name for name, _ in blocks]
        self._blocks = [block for _, block in blocks]
        self._batches = batches
        self._device = device
        self._keep = keep
        self._stand_ins = [StandIn(block, partial(self._answer, i)) for i, block in enumerate(self._blocks)]
        self._slots: list[list[tuple[nn.Module, str]]] = []
        self._recorded: list[dict[int, list[_Call]]] = [{} for _ in batches]  # batch -> block -> its calls
        self._taken: list[set[int]] = [set() for _ in batches]  # batch -> id of recorded tensors a block took in
        self._number = 0
        self._copies: dict[int, Tensor] = {}  # this forward's copy of each recorded tensor, by its id
        self._sources: dict[int, tuple[Tensor, int]] = {}  # by id of a copy: what it copies, and its version then
        self._nans: dict[_Dropped, Tensor] = {}  # this forward's tensors of NaN
        self._calls: dict[int, int] = {}
        self._asked = False  # whether this forward is one for `arguments`
        self._dictionaries: dict[str, dict[Any, Any]] = {}  # what the running block was given, before it ran
        accepted = inspect.signature(model.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    def __enter__(self) -> BlockReplay:
        self._was_training = [module for module in self._model.modules() if module.training]
        self._slots = [_slots(self._model, block) for block in self._blocks]
        self._model.eval()
        get_head = getattr(self._model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # before other hooks: a head that is not used need not be loaded
        self._head_hook = head.register_forward_pre_hook(_stop, prepend=True) if isinstance(head, nn.Module) else None
        for index in range(len(self._blocks)):
            self._place(index, self._stand_ins[index])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index, block in enumerate(self._blocks):
            self._place(index, block)
        if self._head_hook is not None:
            self._head_hook.remove()
        for module in self._was_training:
            module.training = True
        self._recorded.clear()
        self._copies.clear()

    def next_block(self) -> int | None:
        """Index of the block that the model calls after the recorded ones; None when it calls no other."""
        try:
            self._forward(0)
        except _BlockReached as reached:
            return reached.index
        except StopForward:
            pass
        return None

    def arguments(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model calls its next block with for one batch.

        The tensors are those that are held, recorded before or by `keep`: they may lie elsewhere than on the device,
        and are not to be written into.

        Raises:
            RuntimeError: if the model calls no other block for this batch.
        """
        self._asked = True
        try:
            self._forward(number)
        except _BlockReached as reached:
            return reached.args_given, reached.kwargs_given
        except StopForward:
            pass
        finally:
            self._asked = False
        raise RuntimeError(
            f"The model calls no further block for calibration batch {number} but does for others; give batches with "
            f"the same kinds of input."
        )

    def run(self, index: int, *, record: bool = False, before_batch: Callable[[int], None] | None = None) -> None:
        """Run one block on every batch, with the arguments the model passes.

        Args:
            index: what `next_block` returned.
            record: keep the outputs, as the inputs of the blocks that follow.
            before_batch: called with the number of each batch before it runs. Hooks inside the block may raise
                `StopForward` when they have seen enough of a batch whose output is not recorded.

        Raises:
            RuntimeError: if the model does not call the block for one of the batches.
        """
        block = self._blocks[index]
        calls: list[_Call] = []
        hooks = [block.register_forward_pre_hook(partial(self._on_entry, index), with_kwargs=True, prepend=True)]
        if record:
            hooks.append(block.register_forward_hook(partial(self._on_exit, calls), with_kwargs=True))
        self._place(index, block)
        try:
            for number in range(len(self._batches)):
                calls.clear()
                if before_batch is not None:
                    before_batch(number)
                try:
                    self._forward(number)
                except StopForward:
                    pass
                if index not in self._calls:
                    raise RuntimeError(
                        f"The model called '{self._names[index]}' for the first calibration batch but not for batch "
                        f"{number}; give batches with the same kinds of input."
                    )
                if record:
                    self._recorded[number][index] = list(calls)
        finally:
            self._place(index, self._stand_ins[index])
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _forward(self, number: int) -> None:
        self._number = number
        self._calls = {}
        batch = {
            key: value.to(self._device) if isinstance(value, Tensor) else value
            for key, value in self._batches[number].items()
        }
        try:
            self._model(**batch, **self._options)
        finally:
            self._copies, self._nans, self._sources = {}, {}, {}

    def _answer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block that is not running does: it repeats its recorded call, or ends this forward."""
        recorded = self._recorded[self._number].get(index)
        if recorded is None:
            if self._asked:
                self._drop_dead(args, kwargs)
                args, kwargs = map_tensors((args, kwargs), self._held)
            raise _BlockReached(index, args, kwargs)
        number = self._calls.get(index, 0)
        self._calls[index] = number + 1
        call = recorded[min(number, len(recorded) - 1)]
        for name, notes in call.notes.items():
            kwargs[name].update(map_tensors(notes, self._copy))
        return map_tensors(call.output, self._copy)

    def _copy(self, tensor: Tensor | _Dropped) -> Tensor:
        """A block or the model may write into what it is given, so recorded tensors are given as copies."""
        device = tensor.device if self._keep is torch.clone else self._device
        if isinstance(tensor, _Dropped):
            if tensor not in self._nans:
                self._nans[tensor] = torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=device)
            return self._nans[tensor]
        if id(tensor) not in self._copies:
            copy = self._copies[id(tensor)] = tensor.to(device, copy=True)
            self._sources[id(copy)] = (tensor, copy._version)
        return self._copies[id(tensor)]

    def _held(self, tensor: Tensor) -> Tensor:
        """The recorded tensor that this is a copy of, unless it was written into; else what `keep` makes of it."""
        source, version = self._sources.get(id(tensor), (None, None))
        return source if source is not None and tensor._version == version else self._keep(tensor)

    def _on_exit(
        self, calls: list[_Call], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        notes = {
            name: {key: value for key, value in kwargs[name].items() if before.get(key) is not value}
            for name, before in self._dictionaries.items()
        }
        # The model may go on to write into what it was given back, so what is kept are copies.
        copies: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                copies[id(tensor)] = self._keep(tensor)
            return copies[id(tensor)]

        kept = map_tensors(output, keep)
        calls.append(_Call(kept, {name: written for name, written in notes.items() if written}))

    def _on_entry(self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._dictionaries = {name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        self._calls[index] = self._calls.get(index, 0) + 1
        if self._calls[index] == 1:
            self._drop_dead(args, kwargs)

    def _drop_dead(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See which recorded tensors the next block takes in, and drop those that no block takes any more."""
        given = {id(tensor) for tensor in tensors_in((args, kwargs))}
        now = {original for original, copy in self._copies.items() if id(copy) in given}
        taken = self._taken[self._number]
        dead = taken - now
        taken |= now
        if not dead:
            return
        recorded = self._recorded[self._number]
        for done, calls in recorded.items():
            recorded[done] = [
                _Call(map_tensors(call.output, lambda t: _drop(t) if id(t) in dead else t), call.notes)
                for call in calls
            ]
        taken -= dead  # their ids may be used again

    def _place(self, index: int, module: nn.Module) -> None:
        for parent, name in self._slots[index]:
            parent._modules[name] = module


def _slots(model: nn.Module, block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place in the model where this very block hangs."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is block]


def _stop(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise StopForward


def _drop(tensor: Any) -> Any:
    if isinstance(tensor, Tensor) and tensor.is_floating_point():
        return _Dropped(tensor.shape, tensor.dtype, tensor.device)
    return tensor


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every tensor in nested tuples, lists and dictionaries (transformers' outputs are such)."""
    if isinstance(value, (Tensor, _Dropped)):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        items = {key: map_tensors(item, change) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
