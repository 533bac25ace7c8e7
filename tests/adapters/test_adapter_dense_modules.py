"""`dense_modules`: ordinary LoRA on modules that are not pruned, beside the masked adapters and merged with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.saved_adapter import Saved, by_second_adapter, by_transformers, files
from adapters.sparse_models import CONFIGS, adapted, every_method, logits, snapshot, sparse_model, train
from peft import LoraConfig, PeftModel, get_peft_model

from sparse_ft.adapters.masked_layer import AdapterMask
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import named_weights


def lora_deltas(model: PeftModel) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    prefix = "base_model.model.lm_head"
    A, B = (parameters[f"{prefix}.lora_{factor}.default.weight"] for factor in "AB")
    return {"lm_head.weight": 2.0 * B @ A}


@every_method
def test_the_head_gets_ordinary_lora_in_forward_and_when_merged(method: str) -> None:
    model, masks = sparse_model()
    before = snapshot(model)
    peft_model = adapted(model, masks, method=method, dense_modules=["lm_head"])
    assert not hasattr(peft_model.peft_config["default"].masks, "lm_head")
    assert set(peft_model.peft_config["default"].masks) == set(masks)
    head = peft_model.get_submodule("base_model.model.lm_head")
    x = torch.randn(3, 32)
    delta = lora_deltas(peft_model)["lm_head.weight"]
    torch.testing.assert_close(head(x), x @ (before["lm_head.weight"] + delta).T)
    unmerged = logits(peft_model)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(named_weights(merged)["lm_head.weight"], before["lm_head.weight"] + delta)
    if method != "lora_prune":
        torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


@every_method
def test_step_zero_and_unmerging_are_exact(method: str) -> None:
    model, masks = sparse_model(dtype=torch.bfloat16)
    before = logits(model)
    peft_model = get_peft_model(model, CONFIGS[method](r=4, masks=masks, dense_modules=["lm_head"]))
    assert torch.equal(logits(peft_model), before)
    train(peft_model, steps=2)
    weights, trained = snapshot(peft_model), logits(peft_model)
    assert not torch.equal(trained, before)
    peft_model.merge_adapter()
    peft_model.unmerge_adapter()
    assert all(torch.equal(weight, weights[name]) for name, weight in snapshot(peft_model).items())
    assert torch.equal(logits(peft_model), trained)


@every_method
def test_only_the_head_is_the_same_as_pefts_lora(method: str) -> None:
    model, masks = sparse_model()
    one = MaskSet({"model.layers.0.mlp.up_proj.weight": masks["model.layers.0.mlp.up_proj.weight"]})
    ours = get_peft_model(model, CONFIGS[method](r=4, masks=one, dense_modules=["lm_head"]))
    theirs = get_peft_model(sparse_model()[0], LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"]))
    weights = {name: torch.randn_like(p) for name, p in theirs.named_parameters() if "lora_" in name}
    for peft_model in (ours, theirs):
        for name, parameter in peft_model.named_parameters():
            if name in weights:
                parameter.data.copy_(weights[name])
    torch.testing.assert_close(logits(ours), logits(theirs))


@every_method
@pytest.mark.parametrize(
    "targets", ["pruned", ["q_proj", "v_proj"], r".*\.(q|v)_proj"], ids=["pruned", "list", "regex"]
)
def test_it_is_saved_loaded_and_saved_again(tmp_path: Path, method: str, targets: list[str] | str) -> None:
    saved = Saved(tmp_path, "llama", method, dense_modules=["lm_head"], target_modules=targets)
    names = [key for key in files(saved.adapter) if key.endswith(MASKS_FILE)]
    assert names == [MASKS_FILE] and "lm_head.weight" not in MaskSet.load(saved.adapter)
    loaded = PeftModel.from_pretrained(saved.load_base(), saved.adapter)
    assert torch.equal(logits(loaded), saved.logits)
    loaded.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(saved.adapter)
    for route in (by_second_adapter, by_transformers):
        assert torch.equal(logits(route(saved, saved.adapter)), saved.logits)


@every_method
def test_another_head_is_another_base(tmp_path: Path, method: str) -> None:
    saved = Saved(tmp_path, "llama", method, dense_modules=["lm_head"])
    model = saved.load_base()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="trained on base weights"):
        PeftModel.from_pretrained(model, saved.adapter)


def test_the_mask_of_a_dense_module_takes_no_memory() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, dense_modules=["lm_head"])
    head = peft_model.get_submodule("base_model.model.lm_head")
    assert head.lora_mask["default"].keep.numel() == 1


def test_a_mask_is_held_once() -> None:
    """One bit per weight, in the user's own set: neither the config nor the layers copy it."""
    model, masks = sparse_model()
    peft_model = adapted(model, masks)
    kept = {layer.name: layer.keep for layer in peft_model.modules() if isinstance(layer, AdapterMask)}
    assert kept.keys() == set(masks)
    for name, bits in kept.items():
        assert bits.data_ptr() == masks.packed(name).data_ptr()


def test_rank_and_alpha_of_the_head_are_its_own() -> None:
    model, masks = sparse_model()
    config = {"rank_pattern": {"lm_head": 2}, "alpha_pattern": {"lm_head": 6}}
    head = adapted(model, masks, dense_modules=["lm_head"], **config).get_submodule("base_model.model.lm_head")
    assert (head.r["default"], head.scaling["default"]) == (2, 3.0)


def test_the_head_is_adapted_beside_some_layers() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, dense_modules=["lm_head"], target_modules=["q_proj"], layers_to_transform=[1])
    adapted_modules = {name.partition(".lora_A")[0] for name, _ in peft_model.named_parameters() if ".lora_A" in name}
    assert {name.removeprefix("base_model.model.") for name in adapted_modules} == {
        "lm_head",
        "model.layers.1.self_attn.q_proj",
    }


def refused(match: str, name: str = "llama", **options: object) -> None:
    model, masks = sparse_model(name)
    before = [(n, type(module)) for n, module in model.named_modules()]
    with pytest.raises(ValueError, match=match) as caught:
        get_peft_model(model, CONFIGS["mask_lora"](**{"r": 4, "masks": masks, **options}))
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"
    assert [(n, type(module)) for n, module in model.named_modules()] == before


def test_what_cannot_be_a_dense_module() -> None:
    refused("no module 'head', which dense_modules names", dense_modules=["head"])
    refused("'model.layers.0.mlp.up_proj' has a mask, so it is no dense module", dense_modules=["up_proj"])
    refused("does not support 'model.embed_tokens' of type Embedding", dense_modules=["embed_tokens"])
    refused("'lm_head.weight' is shared with another module.*untie", "qwen", dense_modules=["lm_head"])
    refused("'lm_head' is in dense_modules and in", dense_modules=["lm_head"], exclude_modules=["lm_head"])
    refused("'lm_head' is in dense_modules and in", dense_modules=["lm_head"], modules_to_save=["lm_head"])
    refused(r"r=33 is more than the rank 32 that 'lm_head'", dense_modules=["lm_head"], rank_pattern={"lm_head": 33})
    with pytest.raises(ValueError, match="dense_modules is a list of names"):
        CONFIGS["mask_lora"](dense_modules="lm_head")


def test_a_module_cannot_be_dense_for_one_adapter_and_masked_for_another() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, dense_modules=["lm_head"])
    full = MaskSet({**masks, "lm_head.weight": torch.ones(96, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'lm_head' has an adapter of another method"):
        peft_model.add_adapter("second", CONFIGS["mask_lora"](r=2, masks=full))
