"""config.json and generation_config.json of the output: the reference model's, brought up to date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints.resolve import CONFIG_FILE
from sparse_ft.merging.inputs import OpenModel, read_json
from sparse_ft.merging.planning import Planned
from sparse_ft.merging.structure import layer_count_key, stacks_of

_GENERATION_FILE = "generation_config.json"
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def output_config(planned: Planned, models: Mapping[str, OpenModel], tokenizer_source: str) -> dict[str, Any]:
    """The configuration of the output.

    Layers, vocabulary, dtype and tying follow the tensors that are written; ids of special tokens follow the model the
    tokenizer comes from; a list with one entry per layer is put together like the layers.

    Args:
        planned: the merge.
        models: every model, by label.
        tokenizer_source: label of the model whose tokenizer the output has.
    """
    config: dict[str, Any] = json.loads(json.dumps(dict(planned.reference.config)))
    config.pop("_name_or_path", None)
    if planned.layer_origins:
        _renumber(config, planned, models)
    if planned.rows is not None:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = planned.rows
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("tie_word_embeddings") and not planned.tied:
            part["tie_word_embeddings"] = False
    dtypes = {tensor.dtype for tensor in planned.plan.tensors if tensor.dtype.is_floating_point}
    if len(dtypes) == 1:
        name = str(dtypes.pop()).removeprefix("torch.")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = name
    source = models[tokenizer_source]
    if source is not planned.reference:
        config.update({key: source.config[key] for key in _SPECIAL_IDS if key in source.config})
    return config


def write_configs(planned: Planned, models: Mapping[str, OpenModel], tokenizer_source: str, directory: Path) -> None:
    """Write config.json and, if there is one, generation_config.json."""
    _write(directory / CONFIG_FILE, output_config(planned, models, tokenizer_source))
    generation = read_json(models[tokenizer_source].input.path, _GENERATION_FILE)
    generation = generation or read_json(planned.reference.input.path, _GENERATION_FILE)
    if generation:
        _write(directory / _GENERATION_FILE, generation)


def _renumber(config: dict[str, Any], planned: Planned, models: Mapping[str, OpenModel]) -> None:
    old = max(stacks_of(planned.reference.names).values(), default=0)
    key = layer_count_key(config, old)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == old and "layer" in name:
            origins = [(models[label].config.get(name) or value, layer) for label, layer in planned.layer_origins]
            config[name] = [entries[layer] for entries, layer in origins]
    if key is not None:
        config[key] = len(planned.layer_origins)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
