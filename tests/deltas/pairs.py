"""A base and a fine-tune of it on disk, with small deltas, as tensors or as tiny transformers models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from torch import nn

SHAPES = {
    "model.embed_tokens.weight": (48, 16),
    "model.layers.0.mlp.up_proj.weight": (40, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.1.mlp.up_proj.weight": (40, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (48, 16),
}
UP = "model.layers.0.mlp.up_proj.weight"


def base_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a model that is none."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in SHAPES.items()}


def tuned_tensors(base: Mapping[str, torch.Tensor], size: float = 1e-3, seed: int = 1) -> dict[str, torch.Tensor]:
    """The same with a small change of every weight."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (t.float() + torch.randn(t.shape, generator=generator) * size).to(t.dtype) for n, t in base.items()}


def write(directory: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1, config: object = None) -> Path:
    """A checkpoint of these tensors in one or several files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_pair(directory: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> tuple[Path, Path]:
    """`base` and `tuned` below a directory."""
    base = base_tensors(dtype)
    return write(directory / "base", base, shards), write(directory / "tuned", tuned_tensors(base), shards)


def save_models(directory: Path, name: str, dtype: torch.dtype = torch.bfloat16, seeds: int = 1) -> list[Path]:
    """A tiny model and fine-tunes of it: `base`, `tuned0`, ..."""
    base = TINY[name]().to(dtype)
    base.save_pretrained(directory / "base")
    places = [directory / "base"]
    for seed in range(seeds):
        tuned = TINY[name]().to(dtype)
        generator = torch.Generator().manual_seed(10 + seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter += (torch.randn(parameter.shape, generator=generator) * 1e-3).to(dtype)
        tuned.save_pretrained(directory / f"tuned{seed}")
        places.append(directory / f"tuned{seed}")
    return places


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(first.contiguous().view(-1).view(torch.uint8), second.contiguous().view(-1).view(torch.uint8))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all tensors of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    """The model has these tensors and no others, bit for bit."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
