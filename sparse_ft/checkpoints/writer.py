"""Write a sharded safetensors checkpoint whose tensors arrive one at a time, in any order.

The layout follows from names, dtypes and shapes alone, so every header is written first and each tensor goes straight
to its place in its file: memory is that of one tensor, and the finished files are, byte for byte, those that
`safetensors.torch.save_file` would have written from a whole model.

    plan = [("model.safetensors", {name: (torch.bfloat16, shape) for name, shape in shapes.items()})]
    with CheckpointWriter(directory, plan) as writer:
        for name in shapes:
            writer.write(name, make(name))
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sparse_ft.checkpoints.header import TensorInfo, build_header, tensor_bytes
from sparse_ft.checkpoints.resolve import INDEX_FILE, WEIGHTS_FILE

#: What transformers writes into each weight file, and looks for when it opens one.
TRANSFORMERS_METADATA = {"format": "pt"}


class CheckpointWriter:
    """Files of known layout, filled tensor by tensor.

    Args:
        directory: an existing directory; write into `atomic_directory`.
        shards: for each file its name and its tensors as `(dtype, shape)`.
        metadata: metadata of every file.

    Raises:
        ValueError: if a name occurs twice, a file name is no plain `.safetensors` name, or a dtype cannot be stored.
        FileExistsError: if one of the files exists.
        RuntimeError: if the disk has not enough room for the files.
    """

    def __init__(
        self,
        directory: str | Path,
        shards: Sequence[tuple[str, Mapping[str, tuple[torch.dtype, Sequence[int]]]]],
        metadata: Mapping[str, str] | None = TRANSFORMERS_METADATA,
    ) -> None:
        self.directory = Path(directory)
        self._plan = [
            (file, {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()})
            for file, tensors in shards
        ]
        self._check_plan()
        self._check_room()
        self._descriptors: dict[str, int] = {}
        self._place: dict[str, tuple[str, TensorInfo]] = {}
        self._missing: set[str] = set()
        try:
            for file, tensors in self._plan:
                self._open(file, tensors, metadata)
        except BaseException:
            self._close_files()
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place; it may be on any device and need not be contiguous.

        Raises:
            ValueError: if the name is not in the plan, was written before, or dtype or shape differ from the plan.
        """
        if name not in self._place:
            raise ValueError(f"Tensor '{name}' is not among the {len(self._place)} planned for '{self.directory}'.")
        file, info = self._place[name]
        if name not in self._missing:
            raise ValueError(f"Tensor '{name}' was already written to '{file}'.")
        if (tensor.dtype, tuple(tensor.shape)) != (info.dtype, info.shape):
            raise ValueError(
                f"Tensor '{name}' was planned as {info.dtype} {info.shape} "
                f"but is {tensor.dtype} {tuple(tensor.shape)}; cast or reshape it before writing."
            )
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        write_all(self._descriptors[file], data.data, info.start)
        self._missing.discard(name)

    def close(self) -> None:
        """Check that every tensor was written, flush the files to disk and write the index if one is needed.

        Raises:
            RuntimeError: if a tensor was not written.
        """
        if self._missing:
            self._close_files()
            raise RuntimeError(
                f"{len(self._missing)} of {len(self._place)} tensors were not written to '{self.directory}', "
                f"among them '{min(self._missing)}'."
            )
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self._close_files()
        write_index(self.directory, self._plan)

    def _open(
        self, file: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
    ) -> None:
        header, places = build_header(tensors, metadata)
        descriptor = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors[file] = descriptor
        write_all(descriptor, memoryview(header), 0)
        os.ftruncate(descriptor, max([len(header), *(info.stop for info in places.values())]))
        self._place.update({name: (file, info) for name, info in places.items()})
        # A tensor without elements has no bytes, but must be given all the same.
        self._missing.update(places)

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _check_plan(self) -> None:
        seen: dict[str, str] = {}
        files: set[str] = set()
        for file, tensors in self._plan:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"'{file}' is no plain file name that ends in .safetensors.")
            if file in files:
                raise ValueError(f"The file '{file}' is planned twice; give all its tensors together.")
            if (self.directory / file).exists():
                raise FileExistsError(f"'{self.directory / file}' exists already; write into an empty directory.")
            files.add(file)
            for name in tensors:
                if name in seen:
                    raise ValueError(f"Tensor '{name}' is planned for both '{seen[name]}' and '{file}'.")
                seen[name] = file

    def _check_room(self) -> None:
        needed = sum(tensor_bytes(dtype, shape) for _, tensors in self._plan for dtype, shape in tensors.values())
        check_room(self.directory, needed)


def check_room(directory: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        directory: where it will be written.
        needed: bytes.

    Raises:
        RuntimeError: if fewer are free.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise RuntimeError(
            f"'{directory.parent}' has {free / 1e9:.2f} GB free and the checkpoint needs "
            f"{needed / 1e9:.2f} GB; free some space or give another --output_dir."
        )


def write_index(
    directory: Path, shards: Sequence[tuple[str, Mapping[str, tuple[torch.dtype, tuple[int, ...]]]]]
) -> None:
    """Write `model.safetensors.index.json`, unless the only file has the name that needs no index.

    Args:
        directory: of the files.
        shards: for each file its name and its tensors as `(dtype, shape)`.
    """
    if [file for file, _ in shards] == [WEIGHTS_FILE]:
        return
    tensors = {name: entry for _, part in shards for name, entry in part.items()}
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(shape) for _, shape in tensors.values()),
            "total_size": sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values()),
        },
        "weight_map": {name: file for file, part in shards for name in part},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX_FILE).write_text(text, encoding="utf-8")


def read_all(descriptor: int, room: memoryview, position: int) -> bool:
    """Fill `room` with the bytes at a position of a file; False if the file ends before."""
    while room:
        done = os.preadv(descriptor, [room], position)
        if done == 0:
            return False
        room, position = room[done:], position + done
    return True


def write_all(descriptor: int, data: memoryview, position: int) -> None:
    """Write bytes at a position of a file."""
    # One call writes 2 GB at most, and less when the disk fills up.
    while data:
        done = os.pwrite(descriptor, data, position)
        data, position = data[done:], position + done
