"""Models open in the class their config names, whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.models import load_config, load_model, load_tokenizer, named_weights


@pytest.mark.parametrize("family", TINY)
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = TINY[family]().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    theirs = named_weights(loaded)
    for name, weight in named_weights(model).items():
        assert theirs[name].dtype == torch.bfloat16 and torch.equal(theirs[name], weight)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors .* 'model.layers.1.mlp.up_proj.weight'"):
        load_model(tmp_path)


def test_missing_or_odd_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No config.json in"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="Cannot read the config"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="Cannot read the config"):
        load_config(tmp_path)


def test_pickle_weights_are_refused(tmp_path: Path) -> None:
    model = TINY["llama"]()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Cannot load the weights"):
        load_model(tmp_path)


def test_a_directory_without_tokenizer_says_so(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No usable tokenizer"):
        load_tokenizer(tmp_path)
