"""Checkpoints of a few small tensors, named like a Llama's, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_ft.merging.config import parse_config
from sparse_ft.merging.inputs import OpenModel, open_models
from sparse_ft.merging.merge import PreparedMerge, merge_checkpoints, prepare_merge
from sparse_ft.merging.yaml_text import read_yaml

HIDDEN, ROWS = 4, 10


def tensors_of(layers: int = 3, *, seed: int = 0, rows: int = ROWS, head: bool = True) -> dict[str, Tensor]:
    """Random tensors of a model."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (rows, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{i}.mlp.up_proj.weight": (6, HIDDEN),
        }
    shapes |= {"lm_head.weight": (rows, HIDDEN)} if head else {}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def near(tensors: Mapping[str, Tensor], seed: int, scale: float = 1e-3) -> dict[str, Tensor]:
    """A fine-tune: the same plus noise; integers stay."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.randn(tensor.shape, generator=generator) * scale if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def write(directory: Path, tensors: Mapping[str, Tensor], ids: Mapping[str, int] | None = None, **config: Any) -> Path:
    """A model directory; `ids` gives it a word-level tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    rows = next((len(t) for name, t in tensors.items() if "embed_tokens" in name), 0)
    settings: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN}
    settings |= {"num_attention_heads": 2, "num_hidden_layers": len(layers), "vocab_size": rows, **config}
    (directory / "config.json").write_text(json.dumps(settings))
    if ids is not None:
        write_tokenizer(directory, ids)
    return directory


def write_tokenizer(directory: Path, ids: Mapping[str, int]) -> None:
    """A tokenizer with these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def prepare(place: Path, text: str, **options: Any) -> PreparedMerge:
    """Plan the merge of a YAML in which `@name` stands for a model in `place`."""
    file = place / "merge.yaml"
    file.write_text(text.replace("@", f"{place}/"))
    return prepare_merge(file, **options)


def merge(place: Path, text: str, **options: Any) -> dict[str, Tensor]:
    """The tensors of a merge carried out; its directory is `place / "out"`."""
    merge_checkpoints(prepare(place, text, **options), place / "out", overwrite=True, progress=False)
    return read(place / "out")


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, whatever its files."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def opened(place: Path, text: str) -> dict[str, OpenModel]:
    """The models of a YAML, opened."""
    return open_models(parse_config(read_yaml(text.replace("@", f"{place}/"), "'x'")).references())
