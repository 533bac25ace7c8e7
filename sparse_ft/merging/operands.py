"""Input tensors in files, readable in pieces: plain ones, ones with a permuted vocabulary, ones with a LoRA on top.

Pieces are read with `pread` into a buffer that is used again, so nothing of a file stays in this process's memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.checkpoints.header import TensorInfo
from sparse_ft.checkpoints.writer import read_all
from sparse_ft.deltas.lora import LoraAdapter, load_lora
from sparse_ft.merging.chunks import MemoryOperand, Operand, Workspace
from sparse_ft.merging.plan import NO_ROW, MergeInput, Source, TensorPlan


class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        descriptor: of the open file.
        info: dtype, shape and place in it.
        workspace: where the piece just read lies; each reading is copied out of it before the next.
        where: for errors.
    """

    def __init__(self, descriptor: int, info: TensorInfo, workspace: Workspace, where: str) -> None:
        self._descriptor, self.info, self._workspace, self._where = descriptor, info, workspace, where
        self.dtype = info.dtype

    def stored(self, start: int, stop: int) -> Tensor:
        """The elements `start .. stop` as stored, in a buffer that the next call uses again.

        Raises:
            ValueError: if the file ends before them.
        """
        piece = self._workspace.get("stored", stop - start, self.info.dtype)
        self._fill(start, piece)
        return piece

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Read a range, and convert it if `out` has another dtype."""
        if out.dtype == self.info.dtype:
            self._fill(start, out)
        else:
            out.copy_(self.stored(start, stop))

    def _fill(self, start: int, out: Tensor) -> None:
        position = self.info.start + start * self.info.dtype.itemsize
        if not read_all(self._descriptor, out.view(torch.uint8).numpy().data.cast("B"), position):
            raise ValueError(f"{self._where} ends in the middle of a tensor; was the file changed?")


class SumOperand:
    """An operand with something added: a base and the product of a LoRA adapter, which is formed when first used.

    Args:
        operand: the base.
        make: forms what is added, fp32, of the same number of elements.
    """

    dtype = None

    def __init__(self, operand: Operand, make: Callable[[], Tensor]) -> None:
        self._operand, self._make = operand, make
        self._addend: Tensor | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Read a range and add to it."""
        if self._addend is None:
            self._addend = self._make().reshape(-1)
        self._operand.read(start, stop, out)
        out.add_(self._addend[start:stop])


class RowsOperand:
    """An operand whose rows are taken in another order.

    Args:
        operand: the tensor as it is.
        rows: for each row of the result the row of the operand, or negative.
        width: elements of a row.
        missing: gives the row (width,) of the result where this operand has none; zeros without it.
    """

    dtype = None

    def __init__(
        self, operand: Operand, rows: NDArray[np.int64], width: int, missing: Callable[[int, Tensor], None] | None
    ) -> None:
        self._operand, self._rows, self._width, self._missing = operand, rows, width, missing

    def has(self, row: int) -> bool:
        """Whether the row of the result is not `NO_ROW` here."""
        return bool(self._rows[row] != NO_ROW)

    def read_row(self, row: int, out: Tensor) -> None:
        """One row of the result."""
        self._part(row, 0, self._width, out)

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Read a range of the result, whole runs of neighbouring rows at a time."""
        position = start
        while position < stop:
            row, column = divmod(position, self._width)
            last = row
            # A run: rows that also follow each other in the operand.
            while (
                self._rows[row] >= 0
                and (last + 1) * self._width < stop
                and self._rows[last + 1] == self._rows[last] + 1
            ):
                last += 1
            end = min((last + 1) * self._width, stop)
            part = out[position - start : end - start]
            if self._rows[row] >= 0:
                place = int(self._rows[row]) * self._width + column
                self._operand.read(place, place + end - position, part)
            else:
                self._part(row, column, column + end - position, part)
            position = end

    def _part(self, row: int, first: int, last: int, out: Tensor) -> None:
        if self._rows[row] >= 0:
            place = int(self._rows[row]) * self._width
            self._operand.read(place + first, place + last, out)
        elif self._rows[row] == NO_ROW and self._missing is not None:
            whole = torch.empty(self._width)
            self._missing(row, whole)
            out.copy_(whole[first:last])
        else:
            out.zero_()


class Inputs:
    """The models of a plan, opened: headers are read and checked, files stay open until the end.

    Args:
        models: of the plan.
        stack: closes the files.

    Raises:
        ValueError: if a checkpoint or adapter is damaged.
        FileNotFoundError: if one is missing.
    """

    def __init__(self, models: Sequence[MergeInput], stack: ExitStack) -> None:
        self.models = models
        self.readers = [CheckpointReader(model.path) for model in models]
        self._adapters: list[LoraAdapter | None] = [load_lora(m.adapter) if m.adapter else None for m in models]
        self._descriptors: dict[Path, int] = {}
        for reader in self.readers:
            for file in {reader.place(name)[0] for name in reader.names()}:
                if file not in self._descriptors:
                    self._descriptors[file] = os.open(file, os.O_RDONLY)
                    stack.callback(os.close, self._descriptors[file])

    def shape(self, source: Source) -> tuple[int, ...]:
        """Shape of a source's tensor: the adapter's where it brought a whole one, which may have more rows."""
        adapter = self._adapters[source.model]
        if adapter is not None and source.name in adapter.whole:
            return adapter.shape(source.name)
        return self.readers[source.model].shape(source.name)

    def forms_whole(self, tensor: TensorPlan) -> bool:
        """Whether an adapter's product has to be formed for a tensor."""
        sources = [tensor.copy] if tensor.copy else [*filter(None, [tensor.base]), *tensor.sources, *tensor.fallbacks]
        adapters = [(self._adapters[source.model], source.name) for source in sources if source]
        return any(adapter is not None and name in adapter for adapter, name in adapters)

    def stored(self, source: Source, workspace: Workspace) -> StoredTensor | None:
        """A source's tensor as it lies in its file; None if rows or an adapter come in between."""
        adapter = self._adapters[source.model]
        if source.rows is not None or (adapter and (source.name in adapter or source.name in adapter.whole)):
            return None
        return self._in_file(source, workspace)

    def operand(self, source: Source, workspace: Workspace) -> Operand:
        """A source's tensor with its adapter, in its own rows."""
        adapter = self._adapters[source.model]
        if adapter is not None and source.name in adapter.whole:
            return MemoryOperand(adapter.replacement(source.name))
        stored = self._in_file(source, workspace)
        if adapter is None or source.name not in adapter:
            return stored
        reader, chosen = self.readers[source.model], adapter
        return SumOperand(stored, lambda: chosen.delta(source.name, reader.get(source.name)))

    def _in_file(self, source: Source, workspace: Workspace) -> StoredTensor:
        file, info = self.readers[source.model].place(source.name)
        return StoredTensor(self._descriptors[file], info, workspace, f"'{file}'")


def operands_of(tensor: TensorPlan, inputs: Inputs, workspace: Workspace) -> tuple[Operand | None, list[Operand]]:
    """The base and the other models of one output tensor, in the output's rows.

    Args:
        tensor: the plan; a row that a model lacks is filled as `TensorPlan.fallbacks` says.
        inputs: the opened models.
        workspace: of this thread.
    """
    members = [*([tensor.base] if tensor.base else []), *tensor.sources]
    if all(source.rows is None for source in members):
        plain = [inputs.operand(source, workspace) for source in members]
        return (plain[0], plain[1:]) if tensor.base else (None, plain)
    width = int(np.prod(tensor.shape[1:], dtype=np.int64))

    def in_rows(source: Source, missing: Callable[[int, Tensor], None] | None) -> RowsOperand:
        rows = np.arange(tensor.shape[0]) if source.rows is None else source.rows
        return RowsOperand(inputs.operand(source, workspace), rows, width, missing)

    first = [in_rows(source, None) for source in (*tensor.fallbacks, *([tensor.base] if tensor.base else []))]
    others = [in_rows(source, None) for source in tensor.sources]

    def missing(row: int, out: Tensor) -> None:
        for candidate in first:
            if candidate.has(row):
                return candidate.read_row(row, out)
        having = [candidate for candidate in others if candidate.has(row)]
        out.zero_()
        one = torch.empty_like(out)
        for candidate in having:
            candidate.read_row(row, one)
            out.add_(one)
        if len(having) > 1:
            out.div_(len(having))
        return None

    filled: list[Operand] = [in_rows(source, missing) for source in members]
    return (filled[0], filled[1:]) if tensor.base else (None, filled)
