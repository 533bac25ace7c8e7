"""The windows of one block, one after the other, ready to be trained: inputs, targets and errors.

The dense block is run once on all batches for the targets of all windows. Once a window is trained it is run as it is
then, and what later windows need of it is recorded; the last one's results are what the next block takes in. So a block
costs two passes over the batches, whatever its windows, and nothing that is frozen is run once per training step.

Errors are means over `MEASURED` batches at most, spread evenly; the same ones before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.models import HALF_DTYPES
from sparse_ft.pruning.replay import map_tensors
from sparse_ft.reconstruction.optimise import OfBatch, RunningLoss
from sparse_ft.reconstruction.streams import Streams
from sparse_ft.reconstruction.windows import Arguments, Window, WindowCopy, first_tensor

#: Most batches that an error is measured on.
MEASURED = 16


@dataclass
class Piece:
    """A window ready to be trained; functions of the batch number work with the weights of the moment.

    Attributes:
        window: which.
        batches: numbers of the batches that reach it.
        target: what it should compute.
        before: its error.
        after: its error, what it computes being passed on.
        working: a copy to train: a module, the names its parameters have in the block, and its result for a batch.
    """

    window: Window
    batches: Sequence[int]
    target: OfBatch
    before: Callable[[], float]
    after: Callable[[], float]
    working: Callable[[], tuple[nn.Module, dict[str, str], OfBatch]]


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of the numbers, evenly spread.

    Example:
        >>> spread(range(10), 3)
        [1, 5, 8]
    """
    count = min(most, len(numbers))
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


class Pieces:
    """The windows of one block.

    Args:
        index: of the block.
        block: to be reconstructed.
        dense: its dense counterpart, on the same device.
        streams: where inputs come from.
        batches: number of batches.
        device: where blocks are trained.
        keep: turns an activation into the copy that is held.
        more: whether other blocks follow.

    Attributes:
        advanced: whether the block's outputs have been passed on to the next block.
    """

    def __init__(
        self,
        index: int,
        block: nn.Module,
        dense: nn.Module,
        streams: Streams,
        batches: int,
        *,
        device: torch.device,
        keep: Callable[[Tensor], Tensor],
        more: bool,
    ) -> None:
        self._index, self._block, self._dense, self._streams = index, block, dense, streams
        self._numbers, self._device, self._keep, self._more = range(batches), device, keep, more
        self._measured = frozenset(spread(self._numbers, MEASURED))
        self._replayed: dict[str, list[Any]] = {}
        self.advanced = False

    def of(self, windows: Sequence[Window]) -> Iterator[Piece]:
        """Each window when those before it are done."""
        if windows and windows[0].alone:
            for window in windows:
                yield self._matrix(window)
            return
        targets = self._targets(windows)
        for number, window in enumerate(windows):
            yield self._part(window, windows[number + 1 :], targets.pop(window.name))

    @torch.no_grad()
    def _targets(self, windows: Sequence[Window]) -> dict[str, list[Tensor]]:
        """What the dense block computes at the end of each window, per batch.

        With dense inputs its own outputs are also those that later windows replay.
        """
        stops = [window.stop for window in windows if window.stop is not None]
        record = windows[-1].unused if self._streams.is_dense else {}
        copied = WindowCopy(self._dense, Window("block"), watch=stops, record=record, keep=self._keep)
        targets: dict[str, list[Tensor]] = {window.name: [] for window in windows}
        for number in self._numbers:
            result = copied(self._streams.dense_inputs(number))
            for window in windows:
                targets[window.name].append(copied.seen[window.stop] if window.stop else self._keep(result))
            for path, output in copied.outputs.items():
                self._replayed.setdefault(path, []).append(output)
        return targets

    def _part(self, window: Window, following: Sequence[Window], targets: list[Tensor]) -> Piece:
        """A window that runs the block's own forward."""

        def after() -> float:
            if window.stop is None and self._more and not self._streams.is_dense:
                return self._advance(window, targets)
            needed = {path: unused for other in following for path, unused in other.unused.items()}
            within = {path: unused for path, unused in needed.items() if path in window.modules}
            return self._error(window, targets, {} if self._streams.is_dense else within)

        def working() -> tuple[nn.Module, dict[str, str], OfBatch]:
            copied = WindowCopy(self._block, window, share=False)
            widen(copied.module)

            def forward(number: int) -> Tensor:
                replayed = {path: self._output(path, number) for path in window.replayed}
                return copied(widened(self._streams.inputs(number)), widened(replayed))

            return copied.module, {name: name for name, _ in copied.module.named_parameters()}, forward

        return Piece(
            window, self._numbers, targets.__getitem__, lambda: self._error(window, targets, {}), after, working
        )

    def _output(self, path: str, number: int) -> Any:
        """The recorded output of a module for one batch, to be written into at will."""
        return map_tensors(self._replayed[path][number], lambda tensor: tensor.to(self._device, copy=True))

    @torch.no_grad()
    def _error(self, window: Window, targets: Sequence[Tensor], record: Mapping[str, frozenset[int]]) -> float:
        """The error of a window; if something of it is to be recorded, all batches are run for that."""
        copied, loss = WindowCopy(self._block, window, record=record, keep=self._keep), RunningLoss()
        for path in record:
            self._replayed[path] = []
        for number in self._numbers if record else sorted(self._measured):
            replayed = {path: self._output(path, number) for path in window.replayed}
            result = copied(self._streams.inputs(number), replayed)
            if number in self._measured:
                loss.add(result, targets[number])
            for path, output in copied.outputs.items():
                self._replayed[path].append(output)
        return loss.mean()

    def _advance(self, window: Window, targets: Sequence[Tensor]) -> float:
        """The error of a block's last window, run as part of the model, which hands its results on."""
        loss = RunningLoss()

        def compare(number: int, result: Tensor) -> None:
            if number in self._measured:
                loss.add(result, targets[number])

        self.advanced = True
        self._streams.advance(self._index, compare, self._output, window.replayed if window.is_rest else ())
        return loss.mean()

    @torch.no_grad()
    def _matrix(self, window: Window) -> Piece:
        """A window that is one module, called with what reaches it."""
        path = window.name
        source = self._dense if self._streams.is_dense else self._block
        copied = WindowCopy(source, Window(path, stop=path))
        calls: dict[int, Arguments] = {}
        targets: dict[int, Tensor] = {}
        for number in self._numbers:
            call = copied.reach(self._streams.inputs(number))
            if call is None or first_tensor(call).numel() == 0:
                continue
            calls[number] = map_tensors(call, self._keep)
            targets[number] = self._keep(first_tensor(self._dense.get_submodule(path)(*call[0], **call[1])))

        def given(number: int) -> Arguments:
            args, kwargs = map_tensors(calls[number], lambda tensor: tensor.to(self._device, copy=True))
            return args, kwargs

        @torch.no_grad()
        def error() -> float:
            loss, module = RunningLoss(), self._block.get_submodule(path)
            for number in spread(list(calls), MEASURED):
                args, kwargs = given(number)
                loss.add(first_tensor(module(*args, **kwargs)), targets[number])
            return loss.mean()

        def working() -> tuple[nn.Module, dict[str, str], OfBatch]:
            holder = nn.ModuleDict({"matrix": deepcopy(self._block.get_submodule(path)).eval()})
            widen(holder)

            def forward(number: int) -> Tensor:
                args, kwargs = widened(given(number))
                return first_tensor(holder["matrix"](*args, **kwargs))

            names = {name: name.replace("matrix", path, 1) for name, _ in holder.named_parameters()}
            return holder, names, forward

        return Piece(window, list(calls), targets.__getitem__, error, error, working)


def widen(module: nn.Module) -> None:
    """Put all 16-bit parameters and buffers of a module into fp32."""
    module._apply(lambda tensor: tensor.float() if tensor.dtype in HALF_DTYPES else tensor)


def widened(value: Any) -> Any:
    """Nested arguments with all 16-bit tensors in fp32."""
    return map_tensors(value, lambda tensor: tensor.float() if tensor.dtype in HALF_DTYPES else tensor)
