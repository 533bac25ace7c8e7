"""The weight files of a merge's output: known by name and shape beforehand, filled in pieces, noted when finished."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import torch
from torch import Tensor

from sparse_ft.checkpoints import atomic_write
from sparse_ft.checkpoints.header import TensorInfo, build_header, tensor_bytes
from sparse_ft.checkpoints.resumable import NOTES
from sparse_ft.checkpoints.writer import TRANSFORMERS_METADATA, check_room, read_all, write_all, write_index
from sparse_ft.merging.plan import MergePlan, TensorPlan

_FINISHED = "finished.json"


class OutputFiles:
    """The files of the unfinished output, of which some may be there already.

    Raises:
        RuntimeError: if the disk has no room for the others.
    """

    def __init__(self, directory: Path, plan: MergePlan) -> None:
        self._directory, self._lock = directory, threading.Lock()
        by_name = {tensor.name: tensor for tensor in plan.tensors}
        self._shards = [
            (file, {name: (by_name[name].dtype, tuple(by_name[name].shape)) for name in names})
            for file, names in plan.shards
        ]
        self.finished = self._read_finished()
        self._remove_others()
        missing = [tensors for file, tensors in self._shards if file not in self.finished]
        check_room(directory, sum(tensor_bytes(*entry) for tensors in missing for entry in tensors.values()))
        self._left = {file: len(tensors) for file, tensors in self._shards}
        self._file_of = {name: file for file, tensors in self._shards for name in tensors}
        self._open: dict[str, tuple[int, dict[str, TensorInfo]]] = {}

    def write(self, tensor: TensorPlan, start: int, values: Tensor) -> None:
        """Put elements in their place, `start` counted within the tensor."""
        descriptor, places = self._opened(self._file_of[tensor.name])
        data = values.view(torch.uint8).numpy().data.cast("B")
        write_all(descriptor, data, places[tensor.name].start + start * tensor.dtype.itemsize)

    def read(self, tensor: TensorPlan, start: int, out: Tensor) -> None:
        """Read back elements that were written, into `out` of the tensor's dtype."""
        descriptor, places = self._opened(self._file_of[tensor.name])
        room = out.view(torch.uint8).numpy().data.cast("B")
        read_all(descriptor, room, places[tensor.name].start + start * tensor.dtype.itemsize)

    def tensor_done(self, file: str) -> None:
        """One more tensor of a file is whole; with the last one the file is flushed and noted."""
        with self._lock:
            self._left[file] -= 1
            if self._left[file]:
                return
        descriptor, _ = self._opened(file)
        os.fsync(descriptor)
        with self._lock:
            os.close(self._open.pop(file)[0])
            self.finished = sorted([*self.finished, file])
            atomic_write(self._directory / NOTES / _FINISHED, json.dumps(self.finished))

    def complete(self) -> None:
        """Write the index when all files are there."""
        for file, tensors in self._shards:
            if not tensors and file not in self.finished:
                self._opened(file)
        self.close()
        write_index(self._directory, self._shards)

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1][0])

    def _opened(self, file: str) -> tuple[int, dict[str, TensorInfo]]:
        with self._lock:
            if file not in self._open:
                header, places = build_header(dict(self._shards)[file], TRANSFORMERS_METADATA)
                descriptor = os.open(self._directory / file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                self._open[file] = descriptor, places
                write_all(descriptor, memoryview(header), 0)
                os.ftruncate(descriptor, max([len(header), *(info.stop for info in places.values())]))
            return self._open[file]

    def _read_finished(self) -> list[str]:
        notes = self._directory / NOTES / _FINISHED
        noted = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else []
        return [file for file in noted if (self._directory / file).is_file()]

    def _remove_others(self) -> None:
        """An interrupted run may have left files half written, or what `finish` had added."""
        for entry in self._directory.iterdir():
            if entry.name not in (*self.finished, NOTES):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
