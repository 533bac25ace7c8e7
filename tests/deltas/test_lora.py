"""A LoRA adapter as a delta: what PEFT merges, without PEFT; then the same through the delta file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from deltas.pairs import read, same_bits
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.lora import dora_delta, load_lora
from sparse_ft.deltas.store import DeltaFile

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", dict(target_modules=["q_proj", "down_proj"])),
    "rslora": ("llama", dict(target_modules=["q_proj"], use_rslora=True)),
    "patterns": (
        "llama",
        dict(
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={r"layers\.1\..*up_proj": 32},
        ),
    ),
    "conv1d": ("gpt2", dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "dora": ("llama", dict(target_modules=["q_proj", "v_proj"], use_dora=True)),
    "dora conv1d": ("gpt2", dict(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "embedding": ("llama", dict(target_modules=["embed_tokens", "q_proj"])),
    "whole modules": ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])),
    "biases": ("qwen", dict(target_modules=["q_proj"], bias="lora_only")),
}


def make_adapter(directory: Path, kind: str) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Base and adapter directories with random weights, and what PEFT merges of them."""
    family, settings = KINDS[kind]
    model = TINY[family]()
    model.save_pretrained(directory / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    adapted.save_pretrained(directory / "adapter")
    merged = adapted.merge_and_unload()
    return directory / "base", directory / "adapter", {n: t.clone() for n, t in merged.state_dict().items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_base_plus_delta_is_what_peft_merges(kind: str, tmp_path: Path) -> None:
    base, directory, merged = make_adapter(tmp_path, kind)
    tensors = read(base)
    adapter = load_lora(directory)
    adapter.check_base(tensors)
    assert len(adapter) > 0 and set(adapter) == set(adapter.targets)
    for name, tensor in tensors.items():
        if name in adapter.targets:
            delta = adapter.delta(name, tensor)
            assert delta.dtype == torch.float32 and delta.shape == tensor.shape
            torch.testing.assert_close(tensor + delta, merged[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(tensor, merged[name])
        elif name in adapter.whole:
            assert torch.equal(adapter.replacement(name), merged[name])
        else:
            assert torch.equal(tensor, merged[name]), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "conv1d", "dora", "whole modules"])
def test_an_adapter_goes_through_the_delta_file(kind: str, tmp_path: Path) -> None:
    base, directory, merged = make_adapter(tmp_path, kind)
    extract_delta(base, directory, tmp_path / "delta", Settings(density=1.0), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    for name, tensor in read(tmp_path / "out").items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    delta = extract_delta(base, directory, tmp_path / "pruned", Settings(density=0.2), progress=False)
    adapter = load_lora(directory)
    changed = {name for name, part in delta.header.tensors.items() if part.kind == "delta"}
    assert changed == {*adapter.targets, *adapter.whole}
    assert not any(file.name == "adapter_config.json" for file in (tmp_path / "pruned").iterdir())


def test_dora_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    base, product = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    magnitude = torch.rand(3, generator=generator) + 1
    rows = [base[i] + product[i] for i in range(3)]
    expected = torch.stack([magnitude[i] * rows[i] / rows[i].square().sum().sqrt() - base[i] for i in range(3)])
    torch.testing.assert_close(dora_delta(base, product, magnitude), expected)
    torch.testing.assert_close(dora_delta(base.T, product.T, magnitude, transposed=True), expected.T)


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another type": ({"peft_type": "IA3"}, "IA3"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "experts as parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    "bias of B": ({"lora_bias": True}, "lora_bias"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_kinds_that_are_more_than_a_product(case: str, tmp_path: Path) -> None:
    base, directory, _ = make_adapter(tmp_path, "plain")
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | REFUSED[case][0]))
    with pytest.raises(ValueError, match=REFUSED[case][1]):
        load_lora(directory)
    with pytest.raises(ValueError, match=REFUSED[case][1]):
        extract_delta(base, directory, tmp_path / "delta", progress=False)
    assert not (tmp_path / "delta").exists()


def test_adapters_that_are_damaged_or_of_another_base(tmp_path: Path) -> None:
    base, directory, _ = make_adapter(tmp_path, "plain")
    with pytest.raises(ValueError, match="which the base does not have"):
        load_lora(directory).check_base(["model.norm.weight"])
    TINY["gpt2"]().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="base it was trained on"):
        extract_delta(tmp_path / "other", directory, tmp_path / "delta", progress=False)
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file)
    with pytest.raises(ValueError, match="both A and B"):
        load_lora(directory)
    save_file(tensors | {gone: torch.zeros(7, 3)}, file)
    with pytest.raises(ValueError, match="do not fit"):
        load_lora(directory)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_lora(directory)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_lora(base)


def test_the_mask_of_an_adapter_is_that_of_the_tensor(tmp_path: Path) -> None:
    base, directory, _ = make_adapter(tmp_path, "plain")
    delta = extract_delta(base, directory, tmp_path / "delta", Settings(density=0.3, seed=4), progress=False)
    name = next(iter(load_lora(directory)))
    positions = torch.from_numpy(DeltaFile(tmp_path / "delta").positions(name))
    expected = load_lora(directory).delta(name).flatten()[positions]
    assert same_bits(delta.values(name), expected)
