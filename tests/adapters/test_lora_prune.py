"""LoRA-Prune's two faces: ordinary LoRA in forward, a masked update once merged, and exactly how far they are apart."""

from __future__ import annotations

import pytest
import torch
from adapters.sparse_models import adapted, logits, perturb, sparse_model
from peft import LoraConfig, get_peft_model

from sparse_ft.adapters.masked_layer import MaskedLayer


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "bert", "t5"])
def test_forward_is_ordinary_lora(name: str) -> None:
    model, masks = sparse_model(name)
    unmerged = logits(adapted(model, masks, method="lora_prune", lora_alpha=8))
    model, _ = sparse_model(name)
    modules = [n.removesuffix(".weight") for n in masks if len(masks.shape(n)) == 2]
    stacks = [n for n in masks if len(masks.shape(n)) == 3] or None
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=stacks))
    perturb(theirs)
    torch.testing.assert_close(unmerged, logits(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5"])
def test_merging_changes_each_layer_by_the_pruned_part_of_the_update(name: str) -> None:
    model, masks = sparse_model(name, dtype=torch.float64)
    peft_model = adapted(model, masks, method="lora_prune", lora_alpha=6, use_rslora=True)
    for layer in (layer for layer in peft_model.modules() if isinstance(layer, MaskedLayer)):
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        unmerged = layer(x)
        layer.merge()
        merged = layer(x)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        mask = masks[layer.lora_mask["default"].name]
        lost = 3.0 * (B @ A) * ~(mask.T if layer.fan_in_fan_out else mask)  # 6 / sqrt(4)
        assert lost.abs().max() > 0.01
        torch.testing.assert_close(unmerged - merged, x @ lost.T, rtol=1e-9, atol=1e-12)


def test_merging_changes_each_expert_by_the_pruned_part_of_the_update() -> None:
    model, masks = sparse_model("mixtral", dtype=torch.float64)
    peft_model = adapted(model, masks, method="lora_prune", lora_alpha=8)
    stacks = [layer for layer in peft_model.modules() if isinstance(layer, MaskedLayer) and layer.num_experts > 1]
    assert len(stacks) == 4
    for layer in stacks:
        with layer._activate_lora(["default"]):
            seen = layer.get_param().detach().clone()
        layer.merge()
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = 2.0 * torch.stack([B[:, e::4] @ A[4 * e : 4 * e + 4] for e in range(4)])  # 4 experts of rank 4
        mask = masks[layer.lora_mask["default"].name]
        torch.testing.assert_close(seen - layer.get_param(), update * ~mask, rtol=1e-9, atol=1e-12)


def test_dropout_on_stacks_is_refused_before_anything_changes() -> None:
    model, masks = sparse_model("mixtral")
    with pytest.raises(
        ValueError, match=r"lora_dropout is 0.1, which does not work on fused experts such as '.*experts"
    ):
        adapted(model, masks, method="lora_prune", lora_dropout=0.1)
    assert not any(isinstance(module, MaskedLayer) for module in model.modules())
