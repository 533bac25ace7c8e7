"""Small checkpoints and hand-made safetensors files for the tests beside this file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

METADATA = {"format": "pt"}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(header: Any, data: bytes = bytes(8), *, length: int | None = None) -> bytes:
    """A safetensors file with any header; `length` is what the first eight bytes claim."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model.embed.weight": torch.randn(8, 4, generator=generator),
        "model.layers.0.weight": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "model.layers.1.weight": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "model.norm.weight": torch.ones(4),
    }


def make_single(directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    save_file(tensors(), directory / "model.safetensors", metadata=METADATA)
    return tensors()


def make_sharded(directory: Path) -> dict[str, torch.Tensor]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    names = list(tensors())
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in part}, directory / file, metadata=METADATA)
        weight_map.update(dict.fromkeys(part, file))
    write_index(directory, weight_map)
    return tensors()


def write_index(directory: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (directory / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
