"""The header of a safetensors file: parsed with checks and clear errors, and written byte for byte as the library does.

A file is `<u64 length of header> <JSON header, padded with spaces to 8 bytes> <data>`. Each header entry gives dtype,
shape and the byte range of one tensor inside the data; the ranges must cover the data without gap or overlap.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

#: The library's own limit; a longer header is an attack or not a header.
MAX_HEADER_BYTES = 100_000_000
#: torch's own limit.
MAX_DIMENSIONS = 64

# torch dtype and safetensors name, in the library's order: it lays tensors out from the last to the first.
_ORDERED_NAMES = (
    ("bool", "BOOL"),
    ("uint8", "U8"),
    ("int8", "I8"),
    ("float8_e5m2", "F8_E5M2"),
    ("float8_e4m3fn", "F8_E4M3"),
    ("float8_e8m0fnu", "F8_E8M0"),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ"),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ"),
    ("int16", "I16"),
    ("uint16", "U16"),
    ("float16", "F16"),
    ("bfloat16", "BF16"),
    ("int32", "I32"),
    ("uint32", "U32"),
    ("float32", "F32"),
    ("complex64", "C64"),
    ("float64", "F64"),
    ("int64", "I64"),
    ("uint64", "U64"),
)
#: safetensors name of every dtype this torch has.
DTYPE_NAMES: dict[torch.dtype, str] = {
    getattr(torch, dtype): name for dtype, name in _ORDERED_NAMES if hasattr(torch, dtype)
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LAYOUT_ORDER = {dtype: -rank for rank, dtype in enumerate(DTYPE_NAMES)}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype, shape, and its byte range `[start, stop)` counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Size in bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def build_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Lay out a file for tensors known by dtype and shape only.

    The bytes equal what `safetensors.torch.save_file` writes for the same tensors and metadata (which may have one
    key at most for that: the library writes several in random order, here they are sorted).

    Returns:
        The bytes that open the file, up to where the data begins, and the place of every tensor.

    Raises:
        ValueError: for a dtype that safetensors cannot store, or a tensor named like the metadata.
    """
    if "__metadata__" in tensors:
        raise ValueError("A safetensors file cannot hold a tensor named '__metadata__'; rename it.")
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"Tensor '{name}' has dtype {dtype}, which safetensors cannot store; cast it first.")
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = dict(sorted(metadata.items()))
    ranges: dict[str, tuple[int, int]] = {}
    position = 0
    for name in sorted(tensors, key=lambda name: (_LAYOUT_ORDER[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        ranges[name] = (position, position + tensor_bytes(dtype, shape))
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": list(ranges[name])}
        position = ranges[name][1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    places = {
        name: TensorInfo(tensors[name][0], tuple(tensors[name][1]), base + start, base + stop)
        for name, (start, stop) in ranges.items()
    }
    return struct.pack("<Q", len(text)) + text, places


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parse and check the header of a safetensors file; no tensor is read.

    Returns:
        The place of every tensor, in file order, and the metadata.

    Raises:
        ValueError: if the file is empty, truncated, or its header is malformed or inconsistent with the file's size.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        opening = file.read(8)
        if len(opening) < 8:
            raise ValueError(f"'{path}' has {size} bytes, too few for a safetensors file; download or write it again.")
        length = struct.unpack("<Q", opening)[0]
        _check_length(path, opening, length, size)
        text = file.read(length)
    entries, metadata = _parse(path, text)
    infos = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in entries.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(path, infos, 8 + length, size)
    return infos, metadata


def _check_length(path: Path, opening: bytes, length: int, size: int) -> None:
    if opening.startswith(b"version "):
        raise ValueError(f"'{path}' is a Git LFS pointer, not the weights themselves; fetch them with `git lfs pull`.")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"'{path}' announces a header of {length} bytes where {MAX_HEADER_BYTES} is the most allowed; "
            f"it is not a safetensors file, or a damaged one: download or write it again."
        )
    if 8 + length > size:
        raise ValueError(
            f"'{path}' is truncated: its header alone needs {8 + length} bytes and the file has {size}; "
            f"download or write it again."
        )


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError(f"The header of '{path}' is nested too deeply to be a safetensors header.") from None
    except ValueError as error:
        raise ValueError(
            f"The header of '{path}' is not valid ({error}); it is not a safetensors file, or a damaged one."
        ) from None
    if not isinstance(header, dict):
        raise ValueError(f"The header of '{path}' must be a JSON object, got {type(header).__name__}.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"The metadata of '{path}' must map strings to strings, got {str(metadata)[:80]}.")
    return header, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"'{key}' appears twice")
        result[key] = value
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor_info(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"Tensor '{name}' in '{path}' has no proper dtype, shape and data_offsets; the file is damaged."
        )
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"Tensor '{name}' in '{path}' has dtype {str(entry['dtype'])[:40]!r}; supported are {', '.join(_DTYPES)}."
        )
    dtype = _DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(value) for value in shape):
        raise ValueError(
            f"Tensor '{name}' in '{path}' has shape {str(shape)[:80]}; it must be at most {MAX_DIMENSIONS} counts."
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(value) for value in offsets):
        raise ValueError(
            f"Tensor '{name}' in '{path}' has data_offsets {str(offsets)[:80]}; they must be [start, stop]."
        )
    start, stop = offsets
    expected = tensor_bytes(dtype, tuple(shape))
    if stop - start != expected:
        raise ValueError(
            f"Tensor '{name}' in '{path}' of shape {tuple(shape)} and dtype {entry['dtype']} needs {expected} bytes, "
            f"but its offsets [{start}, {stop}] give {stop - start}; the file is damaged."
        )
    return TensorInfo(dtype, tuple(shape), base + start, base + stop)


def _check_cover(path: Path, infos: Mapping[str, TensorInfo], base: int, size: int) -> None:
    position, previous = base, "the header"
    for name, info in infos.items():
        if info.start != position:
            kind = "overlaps" if info.start < position else "leaves a gap after"
            raise ValueError(
                f"Tensor '{name}' in '{path}' {kind} {previous}: it starts at byte {info.start}, "
                f"not at {position}; the file is damaged."
            )
        position, previous = info.stop, f"'{name}'"
    if position > size:
        raise ValueError(
            f"'{path}' is truncated: its tensors need {position} bytes and the file has {size}; "
            f"download or write it again."
        )
    if position < size:
        raise ValueError(
            f"'{path}' has {size - position} bytes after its last tensor ({size} instead of {position}); "
            f"it is damaged: download or write it again."
        )
