"""Models open in the class their config names, whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.models import load_config, load_model, load_skeleton, load_tokenizer, named_weights


@pytest.mark.parametrize("family", TINY)
def test_a_saved_model_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = TINY[family]().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    theirs = named_weights(loaded)
    for name, weight in named_weights(model).items():
        assert theirs[name].dtype == torch.bfloat16 and torch.equal(theirs[name], weight)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_skeleton_has_the_dtypes_of_the_loaded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    TINY[family]().to(dtype).save_pretrained(tmp_path)
    loaded, skeleton = load_model(tmp_path), load_skeleton(tmp_path, dtype=dtype)
    assert torch.get_default_dtype() == torch.float32
    for name, parameter in skeleton.named_parameters():
        assert parameter.is_meta and parameter.dtype == loaded.get_parameter(name).dtype == dtype
    for name, buffer in skeleton.named_buffers():
        theirs = loaded.get_buffer(name)
        assert not buffer.is_meta and buffer.dtype == theirs.dtype and torch.equal(buffer, theirs), name
    assert {p.dtype for p in load_skeleton(tmp_path).parameters()} == {torch.float32}


def test_a_skeleton_that_cannot_be_built_leaves_the_default_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TINY["llama"]()
    model.config.save_pretrained(tmp_path)
    monkeypatch.setattr(type(model), "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_skeleton(tmp_path, dtype=torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


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
