"""The metadata of a delta file: what it says of the delta and of each tensor, as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sparse_ft.checkpoints.header import DTYPE_NAMES
from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.random_mask import GENERATOR, check_density, random_positions
from sparse_ft.deltas.scope import Kind
from sparse_ft.deltas.structural import structural_keep

FORMAT_VERSION = 1

Mask = Literal["random", "slices", "bits", "gaps", "all", "none"]
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Part:
    """What the file says of one tensor of the result.

    Attributes:
        kind: as in `scope.Entry`: `"delta"`, `"resized"`, `"finetuned"` (stored whole) or `"base"` (not stored).
        dtype: safetensors name of the result's dtype.
        shape: of the result.
        mask: how the kept entries are known: drawn again one by one (`"random"`) or in whole slices, stored as `"bits"`
            or `"gaps"`, `"all"` of them; `"none"` is for kinds without a delta.
        rows: of a resized tensor, how many leading rows are a delta.
        axis: of slices, the axis they are counted along.
        key: of slices, what their mask is drawn by, where that is not the tensor's name.
        scale: q of this tensor, or None for the delta's.
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    mask: Mask = "none"
    rows: int = 0
    axis: int = 0
    key: str = ""
    scale: float | None = None

    @property
    def delta_shape(self) -> tuple[int, ...]:
        """Shape of the part that is a delta."""
        return (self.rows, *self.shape[1:]) if self.kind == "resized" else self.shape

    @property
    def numel(self) -> int:
        """Entries of the part that is a delta."""
        return math.prod(self.delta_shape)

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
            name: {key: value for key, value in content["tensors"][name].items() if value != _PLAIN.get(key, MISSING)}
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


_PLAIN = {entry.name: entry.default for entry in fields(Part) if entry.default is not MISSING}


def _read_part(name: str, content: Mapping[str, Any]) -> Part:
    part = Part(**{**content, "shape": tuple(content["shape"])})
    counts = (*part.shape, part.rows, part.axis)
    good = (
        part.kind in get_args(Kind)
        and part.dtype in _DTYPES
        and part.mask in get_args(Mask)
        and all(isinstance(count, int) and count >= 0 for count in counts)
        and (part.kind in ("delta", "resized")) == (part.mask != "none")
        and (part.kind != "resized" or (len(part.shape) > 0 and part.rows <= part.shape[0]))
        and (part.mask != "slices" or part.axis < len(part.shape))
    )
    if not good:
        raise ValueError(f"what it says of '{name}' is no description of a tensor")
    if part.scale is not None:
        check_scale(part.scale)
    return part


def drawn_positions(header: Header, name: str, part: Part) -> NDArray[np.int64]:
    """Kept entries of a mask that is not stored: random, of slices, or all; ascending."""
    settings: dict[str, Any] = {"seed": header.seed, "role": header.role}
    if part.mask == "all":
        return np.arange(part.numel)
    if part.mask == "random":
        return random_positions(part.numel, header.density, name=name, **settings)
    slices = part.delta_shape[part.axis]
    keep = structural_keep(slices, density=header.density, name=part.key or name, **settings)
    shape = [slices if axis == part.axis else 1 for axis in range(len(part.shape))]
    return keep.view(shape).expand(part.delta_shape).reshape(-1).numpy().nonzero()[0]


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
