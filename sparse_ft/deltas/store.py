"""`delta.safetensors`: a pruned delta on disk, and its metadata.

Tensors are named by what they are and whose: `values/NAME` are the kept entries of a delta, unscaled and in ascending
position; `bits/NAME` or `gaps/NAME` say which they are (see `positions.py`) unless the mask is random, which is drawn
again from (generator, seed, role, name); `whole/NAME` are weights stored as they are, and `rows/NAME` those rows of a
resized vocabulary that the base does not have. Nothing is stored of a tensor that is the base's.

The metadata has one entry, `sparse_ft_delta`, a JSON object: see `Header`. The scale q that kept entries are divided by
is only there, so another one can be tried without touching a value. Equal deltas give equal bytes, whatever the shards,
the order or the thread count they were made with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter, atomic_directory, copy_side_files, versions
from sparse_ft.checkpoints.resolve import member
from sparse_ft.deltas.delta_header import Header, Part, drawn_positions, with_scale
from sparse_ft.deltas.positions import decode_positions, encode_positions

DELTA_FILE = "delta.safetensors"
RECORD_FILE = "delta.json"
_KEY = "sparse_ft_delta"
_SPOOL = ".values.partial"


class DeltaFile:
    """A delta on disk, read one tensor at a time.

    Args:
        path: a delta directory, or its `delta.safetensors`.

    Attributes:
        header: the metadata.
        directory: where it lies.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated, of another kind, or does not hold what its metadata says.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.directory = path.parent if path.suffix == ".safetensors" else path
        if not (self.directory / DELTA_FILE).exists():
            raise FileNotFoundError(f"No {DELTA_FILE} in '{self.directory}'; make one with `sparse-ft delta`.")
        file = member(self.directory, DELTA_FILE)
        self._reader = CheckpointReader(file)
        text = self._reader.metadata.get(_KEY)
        if text is None:
            raise ValueError(f"'{file}' is a safetensors file but no delta: its metadata has no '{_KEY}'.")
        self.header = Header.from_json(text, str(file))
        self._check_tensors(file)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return (self.directory / DELTA_FILE).stat().st_size

    def positions(self, name: str) -> NDArray[np.int64]:
        """Flat indices of the kept entries of a delta, ascending.

        Raises:
            ValueError: if they are not as many as the values.
        """
        part = self.header.tensors[name]
        if part.mask in ("random", "slices", "all"):
            found = drawn_positions(self.header, name, part)
        else:
            found = decode_positions(part.mask, self._reader.get(f"{part.mask}/{name}"), part.numel)  # type: ignore[arg-type]
        stored = self._reader.shape(f"values/{name}")[0]
        if len(found) != stored:
            raise ValueError(
                f"'{self.directory}' has {stored} values of '{name}' but its mask keeps {len(found)}; it is damaged."
            )
        return found

    def values(self, name: str) -> Tensor:
        """The kept entries, unscaled, (kept,)."""
        return self._reader.get(f"values/{name}")

    def whole(self, name: str) -> Tensor:
        """A tensor that is stored as it is; of a resized one, the rows behind the delta."""
        kind = self.header.tensors[name].kind
        return self._reader.get(f"{'rows' if kind == 'resized' else 'whole'}/{name}")

    def kept(self, name: str) -> int:
        """Number of kept entries of a delta."""
        return self._reader.shape(f"values/{name}")[0]

    def delta(self, name: str) -> Tensor:
        """The pruned and rescaled delta, dense, fp32, in the shape of the part that is a delta."""
        part = self.header.tensors[name]
        flat = torch.zeros(part.numel, dtype=torch.float32)
        scale = torch.tensor(self.header.scale_of(name))
        flat[torch.from_numpy(self.positions(name))] = self.values(name).float() / scale
        return flat.view(part.delta_shape)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the file and tensors, one at a time."""
        for name in self._reader.names():
            yield name, self._reader.get(name)

    def save(self, directory: str | Path, *, header: Header | None = None) -> None:
        """Write the same file into an existing directory, with another header if one is given."""
        plan = {name: (self._reader.dtype(name), self._reader.shape(name)) for name in self._reader.names()}
        metadata = {_KEY: (header or self.header).to_json()}
        with CheckpointWriter(directory, [(DELTA_FILE, plan)], metadata) as writer:
            for name, tensor in self.tensors():
                writer.write(name, tensor)
        _remove_index(Path(directory))

    def _check_tensors(self, file: Path) -> None:
        expected: set[str] = set()
        for name, part in self.header.tensors.items():
            keys = {
                "delta": ["values"],
                "resized": ["values", "rows"],
                "finetuned": ["whole"],
                "base": [],
            }[part.kind] + [part.mask] * (part.mask in ("bits", "gaps"))
            expected.update(f"{key}/{name}" for key in keys)
            for key in keys:
                self._check_shape(file, key, name, part)
        strangers = sorted(set(self._reader) - expected)
        if strangers:
            raise ValueError(f"'{file}' holds '{strangers[0]}', which its metadata does not name; it is damaged.")

    def _check_shape(self, file: Path, key: str, name: str, part: Part) -> None:
        stored = f"{key}/{name}"
        if stored not in self._reader:
            raise ValueError(f"'{file}' lacks '{stored}', which its metadata names; it is damaged.")
        dtype, shape = self._reader.dtype(stored), self._reader.shape(stored)
        whole = {"whole": part.shape, "rows": (part.shape[0] - part.rows, *part.shape[1:]) if part.shape else ()}
        good = dtype == torch.uint8 and len(shape) == 1
        if key == "values":
            good = dtype.is_floating_point and len(shape) == 1 and shape[0] <= part.numel
        elif key in whole:
            good = dtype == part.torch_dtype and shape == whole[key]
        if not good:
            raise ValueError(f"'{stored}' in '{file}' is {dtype} {shape}, not what its metadata says; it is damaged.")


class DeltaWriter:
    """A delta file whose tensors arrive one at a time, their sizes unknown before.

    Kept entries go to a spool file first; the finished file is laid out when all are there. Memory is one tensor's.

        with DeltaWriter(directory, header) as writer:
            writer.add_delta(name, part, positions, values)

    Attributes:
        header: what is written, but for its tensors; it may be changed until the block ends.
        parts: the tensors noted so far.
    """

    def __init__(self, directory: str | Path, header: Header) -> None:
        self._directory, self.header = Path(directory), header
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self.parts: dict[str, Part] = {}
        self._spool = open(self._directory / _SPOOL, "xb")  # closed by __exit__

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._spool.close()
        if kind is None:
            self._finish()
        (self._directory / _SPOOL).unlink(missing_ok=True)

    def add(self, name: str, part: Part, *, whole: Tensor | None = None) -> None:
        """Note a tensor without a delta, with its values if they are stored."""
        self.parts[name] = part
        if whole is not None:
            self._put(f"whole/{name}", whole)

    def add_rows(self, name: str, rows: Tensor) -> None:
        """The rows behind the delta of a resized tensor."""
        self._put(f"rows/{name}", rows)

    def add_delta(self, name: str, part: Part, positions: NDArray[np.int64], values: Tensor) -> None:
        """Note a delta.

        Args:
            name: of the tensor.
            part: with a mask that is drawn, or any other for the smaller of the two that are stored.
            positions: kept entries, ascending.
            values: (kept,), unscaled, in the dtype they are stored in.
        """
        if part.mask not in ("random", "slices", "all"):
            encoding, data = encode_positions(positions, part.numel)
            part = replace(part, mask=encoding)
            self._put(f"{encoding}/{name}", data)
        self.parts[name] = part
        self._put(f"values/{name}", values)

    def _put(self, key: str, tensor: Tensor) -> None:
        self._places[key] = (tensor.dtype, tuple(tensor.shape), self._spool.tell())
        self._spool.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _finish(self) -> None:
        header = replace(self.header, tensors=dict(sorted(self.parts.items())))
        plan = {key: (dtype, shape) for key, (dtype, shape, _) in self._places.items()}
        spool = self._directory / _SPOOL
        with CheckpointWriter(self._directory, [(DELTA_FILE, plan)], {_KEY: header.to_json()}) as writer:
            for key, (dtype, shape, start) in self._places.items():
                tensor = torch.empty(shape, dtype=dtype)
                if tensor.numel():
                    data = np.fromfile(spool, dtype=np.uint8, count=tensor.nbytes, offset=start)
                    tensor = torch.from_numpy(data).view(dtype).view(shape)
                writer.write(key, tensor)
        _remove_index(self._directory)


def read_record(directory: str | Path) -> dict[str, Any]:
    """`delta.json`: how the delta came to be, for people and scripts; empty if it is gone. Applying never needs it."""
    file = Path(directory) / RECORD_FILE
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}); restore it or remove it.") from None
    return content if isinstance(content, dict) else {}


def write_record(directory: str | Path, content: Mapping[str, Any]) -> None:
    """Add to `delta.json`."""
    record = {**(read_record(directory) or {"versions": versions()}), **content}
    text = json.dumps(record, indent=2, default=str) + "\n"
    (Path(directory) / RECORD_FILE).write_text(text, encoding="utf-8")


def rescale(directory: str | Path, *, scale: float | None = None, scales: Mapping[str, float] | None = None) -> None:
    """Give a delta on disk another q. No value changes; the directory is replaced as a whole.

    Args:
        directory: of the delta.
        scale: q of all tensors that have none of their own; None leaves it.
        scales: q of single tensors; tensors that are not named lose theirs. None leaves them.

    Raises:
        ValueError: if a scale is not positive, a name is no delta's, or there is no delta to scale.
    """
    delta = DeltaFile(directory)
    header = with_scale(delta.header, scale=scale, scales=scales)
    with atomic_directory(delta.directory, overwrite=True) as target:
        delta.save(target, header=header)
        copy_side_files(delta.directory, target)


def _remove_index(directory: Path) -> None:
    """The writer adds an index to files that are not called model.safetensors; a delta is one file."""
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
