"""Saved adapters that must not load: without their masks, with others, on another base, or swapped in unnoticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from adapters.saved_adapter import (
    PEFT_ROUTES,
    WEIGHTS,
    Route,
    Saved,
    by_peft_model,
    by_transformers,
    by_transformers_with_config,
    every_route,
)
from adapters.sparse_models import CONFIGS, adapted, logits, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import named_weights

OTHER = "saved with another mask or another base model"


@pytest.fixture(params=list(CONFIGS))
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    return Saved(tmp_path, method=request.param)


@pytest.fixture
def mask_lora(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


def fewer_masks(saved: Saved) -> tuple[PreTrainedModel, MaskSet]:
    """The base pruned further, and its masks."""
    fewer = MaskSet({name: saved.masks[name] & (torch.rand(saved.masks.shape(name)) > 0.1) for name in saved.masks})
    model = saved.load_base()
    fewer.apply_(model)
    return model, fewer


@pytest.mark.parametrize("route", PEFT_ROUTES, ids=lambda route: route.__name__)
def test_without_its_masks_it_does_not_load(mask_lora: Saved, route: Route) -> None:
    (mask_lora.adapter / MASKS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {MASKS_FILE}"):
        route(mask_lora, mask_lora.adapter)


def test_the_message_names_the_method(saved: Saved) -> None:
    (saved.adapter / MASKS_FILE).unlink()
    name = {"mask_lora": "MaskLoRA", "scale_lora": "ScaleLoRA", "lora_prune": "LoRA-Prune"}[saved.method]
    with pytest.raises(FileNotFoundError, match=f"The {name} adapter in .* has no {MASKS_FILE}"):
        by_peft_model(saved, saved.adapter)


@every_route
def test_with_other_masks_it_does_not_load(saved: Saved, route: Route) -> None:
    name = next(iter(saved.masks))
    kept = saved.masks[name]
    kept.view(-1)[kept.view(-1).nonzero()[0]] = False
    other = MaskSet({**saved.masks, name: kept})
    model = saved.load_base()
    other.apply_(model)
    adapted(model, other, method=saved.method).save_pretrained(saved.adapter)
    (saved.base / MASKS_FILE).unlink(missing_ok=True)
    saved.masks.save(saved.adapter)
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=r"mask"):
        route(saved, saved.adapter)


@every_route
def test_on_another_base_it_does_not_load(saved: Saved, route: Route) -> None:
    model = saved.load_base()
    with torch.no_grad():
        weight = named_weights(model)["model.layers.1.mlp.down_proj.weight"]
        weight.view(-1)[int(weight.view(-1).nonzero()[3])] += 1e-3
    model.save_pretrained(saved.base)
    with pytest.raises((ValueError, RuntimeError), match=r"base (weights|model)"):
        route(saved, saved.adapter)


def test_in_another_precision_it_does_not_load(saved: Saved) -> None:
    with pytest.raises(ValueError, match="in the same precision"):
        PeftModel.from_pretrained(saved.load_base(dtype=torch.bfloat16), saved.adapter)


def test_on_a_model_of_another_size_it_does_not_load(mask_lora: Saved) -> None:
    larger = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"has shape \(32, 32\) but the weight has \(64, 64\)"):
        PeftModel.from_pretrained(LlamaForCausalLM(larger), mask_lora.adapter)


def test_on_a_dense_model_it_does_not_load(saved: Saved) -> None:
    from tiny_models import TINY

    with pytest.raises(ValueError, match=r"was trained on base weights .* but this model has .*; load the base"):
        PeftModel.from_pretrained(TINY["llama"](), saved.adapter)


def test_masks_of_a_denser_model_are_called_other_masks_not_revived_weights(saved: Saved) -> None:
    name = next(iter(saved.masks))
    pruned = saved.masks[name].clone()
    pruned.view(-1)[pruned.view(-1).nonzero()[0]] = False  # the base is not zero there
    MaskSet({**saved.masks, name: pruned}).save(saved.adapter)
    with pytest.raises(ValueError, match=r"was trained with masks .* but these are .*; give the"):
        by_peft_model(saved, saved.adapter)


def test_damaged_masks_do_not_load(mask_lora: Saved) -> None:
    file = mask_lora.adapter / MASKS_FILE
    for damage in (b"", file.read_bytes()[:-100], b"not safetensors at all"):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged"):
            by_peft_model(mask_lora, mask_lora.adapter)


def test_tensors_of_ordinary_lora_do_not_load_as_masked(saved: Saved, tmp_path: Path) -> None:
    modules = [name.removesuffix(".weight") for name in saved.masks]
    get_peft_model(saved.load_base(), LoraConfig(r=4, target_modules=modules)).save_pretrained(tmp_path / "lora")
    shutil.copy(tmp_path / "lora" / WEIGHTS, saved.adapter / WEIGHTS)
    with pytest.raises(RuntimeError, match=r"were not saved by (MaskLoRA|ScaleLoRA|LoRA-Prune)"):
        by_peft_model(saved, saved.adapter)


def test_tensors_of_another_method_do_not_load(saved: Saved, tmp_path: Path) -> None:
    for method in set(CONFIGS) - {saved.method}:
        shutil.copy(Saved(tmp_path / method, method=method).adapter / WEIGHTS, saved.adapter / WEIGHTS)
        with pytest.raises(RuntimeError, match=OTHER):
            by_peft_model(saved, saved.adapter)


def test_tensors_of_other_masks_do_not_load_through_any_state_dict(saved: Saved) -> None:
    model = adapted(*fewer_masks(saved), method=saved.method)
    tensors = load_file(saved.adapter / WEIGHTS)
    with pytest.raises(RuntimeError, match=OTHER):
        peft.set_peft_model_state_dict(model, tensors)
    with pytest.raises(RuntimeError, match=OTHER):
        model.load_state_dict(by_peft_model(saved, saved.adapter).state_dict())


def test_transformers_state_dict_of_other_masks_fails_at_the_first_forward(saved: Saved) -> None:
    model, fewer = fewer_masks(saved)
    tensors = load_file(saved.adapter / WEIGHTS)
    model.load_adapter(peft_config=saved.config(masks=fewer), adapter_state_dict=tensors)
    with pytest.raises(RuntimeError, match=OTHER):
        logits(model)


def test_transformers_finds_masks_with_zeros_among_the_kept_only_beside_the_base(saved: Saved) -> None:
    model = saved.load_base()
    name = next(iter(saved.masks))
    with torch.no_grad():
        weight = named_weights(model)[name].view(-1)
        weight[int(weight.nonzero()[0])] = 0  # kept, but zero: the zeros are not the mask any more
    model.save_pretrained(saved.base)
    peft_model = adapted(saved.load_base(), saved.masks, method=saved.method)
    wanted = logits(peft_model)
    peft_model.save_pretrained(saved.adapter)
    with pytest.raises(FileNotFoundError, match="neither beside the base model nor its zeros"):
        by_transformers(saved, saved.adapter)
    assert torch.equal(logits(by_transformers_with_config(saved, saved.adapter)), wanted)
    saved.masks.save(saved.base)
    assert torch.equal(logits(by_transformers(saved, saved.adapter)), wanted)


def test_a_config_without_masks_is_neither_used_nor_saved(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the masks"):
        get_peft_model(saved.load_base(), saved.config_class())
    with pytest.raises(ValueError, match="needs the masks"):
        get_peft_model(saved.load_base(), saved.config_class(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=f"A {saved.config_class.__name__} without masks cannot be saved"):
        saved.config_class().save_pretrained(tmp_path / "config")


# -- hotswap ---------------------------------------------------------------------------------------------------------


def test_hotswap_refuses_the_methods(saved: Saved) -> None:
    model = by_peft_model(saved, saved.adapter)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, saved.adapter, adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model), saved.logits)


def tensors_for(saved: Saved, file: Path) -> dict[str, Tensor]:
    """A saved adapter's tensors under the names hotswap wants."""
    return _insert_adapter_name_into_state_dict(load_file(file), adapter_name="default", parameter_prefix="lora_")


@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_hotswap_by_state_dict_takes_an_adapter_of_the_same_masks_and_no_other(tmp_path: Path, method: str) -> None:
    saved = Saved(tmp_path, method=method)
    config = saved.config()
    second = adapted(saved.load_base(), saved.masks, method=method, seed=9)
    second.save_pretrained(tmp_path / "second")
    model = by_peft_model(saved, saved.adapter)
    logits(model)
    hotswap_adapter_from_state_dict(model, tensors_for(saved, tmp_path / "second" / WEIGHTS), "default", config)
    assert torch.equal(logits(model), logits(second))
    adapted(*fewer_masks(saved), method=method).save_pretrained(tmp_path / "other")
    hotswap_adapter_from_state_dict(model, tensors_for(saved, tmp_path / "other" / WEIGHTS), "default", config)
    with pytest.raises(RuntimeError, match=OTHER):
        logits(model)
    with pytest.raises(RuntimeError, match=OTHER):
        model.merge_adapter()


@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_hotswap_by_state_dict_of_ordinary_lora_does_not_run(tmp_path: Path, method: str) -> None:
    saved = Saved(tmp_path, method=method)
    model = by_peft_model(saved, saved.adapter)
    logits(model)
    factors = {k: t for k, t in tensors_for(saved, saved.adapter / WEIGHTS).items() if "lora_mask" not in k}
    hotswap_adapter_from_state_dict(model, factors, "default", saved.config())
    with pytest.raises(RuntimeError, match=OTHER):
        logits(model)


def test_hotswap_by_state_dict_does_not_know_scale_lora(tmp_path: Path) -> None:
    saved = Saved(tmp_path, method="scale_lora")
    model = by_peft_model(saved, saved.adapter)
    before = snapshot(model)
    with pytest.raises(TypeError):
        tensors = tensors_for(saved, saved.adapter / WEIGHTS)
        hotswap_adapter_from_state_dict(model, tensors, "default", saved.config())
    assert all(torch.equal(weight, before[name]) for name, weight in snapshot(model).items())
