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
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter, atomic_directory, copy_side_files
from sparse_ft.checkpoints.header import DTYPE_NAMES
from sparse_ft.checkpoints.resolve import member
from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.positions import decode_positions, encode_positions
from sparse_ft.deltas.random_mask import GENERATOR, check_density, random_positions
from sparse_ft.deltas.scope import Kind

DELTA_FILE = "delta.safetensors"
RECORD_FILE = "delta.json"
FORMAT_VERSION = 1
_KEY = "sparse_ft_delta"
_SPOOL = ".values.partial"

Mask = Literal["random", "bits", "gaps", "all", "none"]
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Part:
    """What the file says of one tensor of the result.

    Attributes:
        kind: as in `scope.Entry`: `"delta"`, `"resized"`, `"finetuned"` (stored whole) or `"base"` (not stored).
        dtype: safetensors name of the result's dtype.
        shape: of the result.
        mask: how the kept entries are known; `"all"` keeps every one, `"none"` is for kinds without a delta.
        rows: of a resized tensor, how many leading rows are a delta.
        scale: q of this tensor, or None for the delta's.
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    mask: Mask = "none"
    rows: int = 0
    scale: float | None = None

    @property
    def numel(self) -> int:
        """Entries of the part that is a delta."""
        return math.prod((self.rows, *self.shape[1:]) if self.kind == "resized" else self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The result's dtype."""
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The metadata of a delta file.

    Attributes:
        method: how entries were chosen.
        density: share kept.
        scale: q, what kept entries are divided by.
        seed: of the mask.
        role: of the mask, see `random_keep`.
        generator: of the mask.
        base_digest: of the base, see `fingerprint.base_digest`.
        selection: preset, exclude and excluded of the scope.
        settings: of the method, beyond the density.
        aliases: further names of tied tensors.
        tensors: what the file says of each tensor.
    """

    method: str
    density: float
    scale: float
    seed: int
    base_digest: str
    role: str = ""
    generator: str = GENERATOR
    selection: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Part] = field(default_factory=dict)

    def to_json(self) -> str:
        """Compact JSON, the same for equal headers."""
        content = asdict(self)
        content["tensors"] = {
            name: {key: value for key, value in content["tensors"][name].items() if value != _PLAIN.get(key, ())}
            for name in sorted(content["tensors"])
        }
        return json.dumps({"format_version": FORMAT_VERSION, **content}, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str) -> Header:
        """Undo `to_json`.

        Raises:
            ValueError: if it is not JSON, of another format or generator, or a value is not what it should be.
        """
        try:
            content = json.loads(text)
            version = content.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"it has format {version}, this version reads {FORMAT_VERSION}; upgrade sparse-ft")
            parts = {name: _read_part(name, part) for name, part in content.pop("tensors").items()}
            header = cls(**content, tensors=parts)
            check_density(header.density)
            check_scale(header.scale)
            if header.generator != GENERATOR:
                raise ValueError(f"its masks come from generator '{header.generator}', this version has {GENERATOR}")
            if not all(alias not in parts and name in parts for alias, name in header.aliases.items()):
                raise ValueError("its aliases name tensors it does not have")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ValueError(f"'{source}' is no delta that can be read: {error}.") from error
        return header

    def scale_of(self, name: str) -> float:
        """q of one tensor."""
        own = self.tensors[name].scale
        return self.scale if own is None else own


_PLAIN = {entry.name: entry.default for entry in fields(Part) if entry.name in ("mask", "rows", "scale")}


def _read_part(name: str, content: Mapping[str, Any]) -> Part:
    part = Part(**{**content, "shape": tuple(content["shape"])})
    counts = (*part.shape, part.rows)
    good = (
        part.kind in get_args(Kind)
        and part.dtype in _DTYPES
        and part.mask in get_args(Mask)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and (part.kind in ("delta", "resized")) == (part.mask != "none")
        and (part.kind != "resized" or (len(part.shape) > 0 and part.rows <= part.shape[0]))
    )
    if not good:
        raise ValueError(f"what it says of '{name}' is no description of a tensor")
    if part.scale is not None:
        check_scale(part.scale)
    return part


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
        header, part = self.header, self.header.tensors[name]
        if part.mask == "random":
            found = random_positions(part.numel, header.density, seed=header.seed, name=name, role=header.role)
        elif part.mask == "all":
            found = np.arange(part.numel)
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
        return flat.view(part.rows, *part.shape[1:]) if part.kind == "resized" else flat.view(part.shape)

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
        expected = set()
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
            writer.add_delta(entry, positions, values, "random")
    """

    def __init__(self, directory: str | Path, header: Header) -> None:
        self._directory, self._header = Path(directory), header
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        self._parts: dict[str, Part] = {}
        self._spool = open(self._directory / _SPOOL, "xb")  # closed by __exit__

    def __enter__(self) -> DeltaWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._spool.close()
        if kind is None:
            self._finish()
        (self._directory / _SPOOL).unlink(missing_ok=True)

    def add(self, name: str, part: Part, *, rows: Tensor | None = None, whole: Tensor | None = None) -> None:
        """Note a tensor, with what is stored whole of it."""
        self._parts[name] = part
        for key, tensor in (("rows", rows), ("whole", whole)):
            if tensor is not None:
                self._put(f"{key}/{name}", tensor)

    def add_delta(self, name: str, part: Part, positions: NDArray[np.int64], values: Tensor) -> None:
        """Note a delta.

        Args:
            name: of the tensor.
            part: with mask `"random"` or `"all"`, or any other for the smaller of the two stored ones.
            positions: kept entries, ascending.
            values: (kept,), unscaled, in the dtype they are stored in.
        """
        if part.mask not in ("random", "all"):
            encoding, data = encode_positions(positions, part.numel)
            part = replace(part, mask=encoding)
            self._put(f"{encoding}/{name}", data)
        self._parts[name] = part
        self._put(f"values/{name}", values)

    def _put(self, key: str, tensor: Tensor) -> None:
        self._places[key] = (tensor.dtype, tuple(tensor.shape), self._spool.tell())
        self._spool.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _finish(self) -> None:
        header = replace(self._header, tensors=dict(sorted(self._parts.items())))
        plan = {key: (dtype, shape) for key, (dtype, shape, _) in self._places.items()}
        spool = self._directory / _SPOOL
        with CheckpointWriter(self._directory, [(DELTA_FILE, plan)], {_KEY: header.to_json()}) as writer:
            for key, (dtype, shape, start) in self._places.items():
                count = math.prod(shape) * dtype.itemsize
                data = np.fromfile(spool, dtype=np.uint8, count=count, offset=start)
                writer.write(key, torch.from_numpy(data).view(dtype).view(shape))
        _remove_index(self._directory)


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


def with_scale(header: Header, *, scale: float | None = None, scales: Mapping[str, float] | None = None) -> Header:
    """The header with another q, checked as `rescale` says."""
    pruned = [name for name, part in header.tensors.items() if part.mask != "none"]
    unknown = sorted(set(scales or {}) - set(pruned))
    if unknown or not pruned:
        what = f"'{unknown[0]}' is none of" if unknown else "the delta has none of"
        raise ValueError(f"A scale is for pruned deltas and {what} its {len(pruned)} pruned tensors.")
    for value in (scale, *(scales or {}).values()):
        if value is not None:
            check_scale(value)
    parts = dict(header.tensors)
    if scales is not None:
        parts |= {name: replace(parts[name], scale=scales.get(name)) for name in pruned}
    return replace(header, scale=header.scale if scale is None else float(scale), tensors=parts)


def _remove_index(directory: Path) -> None:
    """The writer adds an index to files that are not called model.safetensors; a delta is one file."""
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
