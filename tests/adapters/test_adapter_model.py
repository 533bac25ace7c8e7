"""Masked adapters within PEFT: options, several adapters on one model, switching, hooks, copies and casts."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapters.sparse_models import CONFIGS, adapted, every_method, logits, perturb, snapshot, sparse_model, train
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import TINY, tiny_batch

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

every_model = pytest.mark.parametrize("name", list(TINY))
three_layouts = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])


# -- options ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_an_all_true_mask_is_ordinary_lora(method: str, name: str) -> None:
    model = TINY[name]()
    targets = find_targets(model)
    full = MaskSet({t.name: torch.ones(t.shape, dtype=torch.bool) for t in targets})
    ours = adapted(copy.deepcopy(model), full, method=method, lora_alpha=8)
    modules = [t.module for t in targets if t.kind != "experts"]
    stacks = [t.name for t in targets if t.kind == "experts"] or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that it sets fan_in_fan_out for Conv1D
        config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=stacks)
        theirs = get_peft_model(model, config).eval()
    perturb(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_scaling_is_two_by_default_and_rank_stabilised_on_request(method: str) -> None:
    def scalings(**options: object) -> set[float]:
        model, masks = sparse_model()
        peft_model = adapted(model, masks, method=method, **options)
        layers = [m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)]
        return {layer.scaling["default"] for layer in layers}

    assert CONFIGS[method]().r == 16
    assert scalings(r=16) == scalings(r=4) == {2.0}
    assert scalings(r=16, lora_alpha=8) == {0.5}
    assert scalings(r=16, lora_alpha=8, use_rslora=True) == {2.0}
    assert scalings(r=4, rank_pattern={"k_proj": 8}, lora_alpha=8) == {2.0, 1.0}
    assert scalings(r=4, alpha_pattern={"k_proj": 4}) == {2.0, 1.0}


@every_method
def test_rank_pattern_reaches_modules_and_stacks(method: str) -> None:
    model, masks = sparse_model("mixtral")
    peft_model = adapted(model, masks, method=method, rank_pattern={"k_proj": 2, "experts.down_proj": 3})
    ranks = {n.partition(".lora_A")[0]: p.shape[0] for n, p in peft_model.named_parameters() if ".lora_A" in n}
    assert {r for n, r in ranks.items() if n.endswith("k_proj")} == {2}
    assert {r for n, r in ranks.items() if n.endswith(("q_proj", "v_proj", "o_proj"))} == {4}
    assert sorted(r for n, r in ranks.items() if "experts" in n) == [3 * 4, 3 * 4, 4 * 4, 4 * 4]
    unmerged = logits(peft_model)
    merged = peft_model.merge_and_unload()
    if method != "lora_prune":
        torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


@every_method
def test_pruned_is_exactly_the_masked_modules(method: str) -> None:
    model, masks = sparse_model()
    some = MaskSet({name: masks[name] for name in masks if "mlp" in name or "layers.1.self_attn.q_proj" in name})
    config = CONFIGS[method](r=4, masks=some, exclude_modules=["down_proj"])
    peft_model = get_peft_model(model, config)
    names = {n.split(".lora_A")[0] for n, _ in peft_model.named_parameters() if ".lora_A" in n}
    expected = {n for n in some if "down_proj" not in n}
    assert {f"{n.removeprefix('base_model.model.')}.weight" for n in names} == expected
    assert set(config.masks) == expected


@every_method
def test_biases_and_modules_to_save_are_trained_beside_the_factors(method: str) -> None:
    model, masks = sparse_model("opt")
    config = CONFIGS[method](r=4, masks=masks, bias="lora_only", modules_to_save=["final_layer_norm"])
    peft_model = get_peft_model(model, config)
    before = snapshot(peft_model)
    train(peft_model)
    after = snapshot(peft_model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert any(n.endswith("q_proj.bias") for n in changed)
    assert any("final_layer_norm.modules_to_save.default.weight" in n for n in changed)
    assert not any(n.endswith(("q_proj.weight", "original_module.weight")) for n in changed)


def test_dropout_acts_in_training_only() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method="lora_prune", lora_dropout=0.5)
    still = logits(peft_model)
    assert torch.equal(logits(peft_model), still)
    peft_model.train()
    assert not torch.equal(logits(peft_model), still)


def test_ordinary_lora_loses_the_sparsity() -> None:
    model, masks = sparse_model()
    modules = [name.removesuffix(".weight") for name in masks]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=modules))
    perturb(peft_model)
    weights = named_weights(peft_model.merge_and_unload())
    zeros = sum(int((weights[n] == 0).sum()) for n in masks)
    assert zeros / sum(weights[n].numel() for n in masks) < 1e-3
    with pytest.raises(RuntimeError, match="pruned weights in 14 tensors are not zero"):
        masks.verify(weights)


# -- several adapters ------------------------------------------------------------------------------------------------


@three_layouts
@every_method
def test_active_adapters_add_up_each_under_its_own_mask(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    wider = masks | MaskSet.from_scores({n: torch.rand(masks.shape(n)) for n in masks}, sparsity=0.5)
    wider = MaskSet(dict(wider), input_dims=masks.input_dims)
    peft_model = adapted(model, masks, method=method)
    peft_model.add_adapter("second", CONFIGS[method](r=2, masks=wider))
    perturb(peft_model, adapter="second", seed=5)
    base = snapshot(peft_model)
    outputs = {}
    for active in (["default"], ["second"], ["default", "second"]):
        peft_model.base_model.set_adapter(active)
        outputs[tuple(active)] = logits(peft_model)
    peft_model.merge_adapter(adapter_names=["default"])
    peft_model.merge_adapter(adapter_names=["second"])
    if method != "lora_prune":
        torch.testing.assert_close(logits(peft_model), outputs["default", "second"], rtol=1e-4, atol=1e-5)
    both = named_weights(peft_model)
    revived = {n: int((both[n][~masks[n]] != 0).sum()) for n in masks}
    assert any(revived.values()) is (method != "scale_lora")
    wider.verify(peft_model)
    peft_model.unmerge_adapter()
    assert all(torch.equal(w, base[n]) for n, w in snapshot(peft_model).items())
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), outputs[("second",)])
    assert not torch.equal(outputs[("second",)], outputs[("default",)])
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), outputs[("default",)])
    assert not any("second" in key for key in peft_model.state_dict())


@three_layouts
@every_method
def test_merged_together_they_are_the_sum_of_their_deltas(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    peft_model = adapted(model, masks, method=method)
    peft_model.add_adapter("second", CONFIGS[method](r=2, masks=masks))
    perturb(peft_model, adapter="second", seed=5)
    before = snapshot(peft_model)
    layers = {layer.lora_mask["default"].name: layer for layer in peft_model.modules() if hasattr(layer, "lora_mask")}
    deltas = {n: layer.get_delta_weight("default") + layer.get_delta_weight("second") for n, layer in layers.items()}
    peft_model.merge_adapter(adapter_names=["default", "second"])
    after = snapshot(peft_model)
    assert all(torch.allclose(after[n], before[n] + deltas[n], atol=1e-6) for n in masks)


@every_method
def test_adapter_names_choose_per_sample(method: str) -> None:
    model, masks = sparse_model("gpt2")
    base = logits(model)
    peft_model = adapted(model, masks, method=method)
    peft_model.add_adapter("second", CONFIGS[method](r=2, masks=masks))
    perturb(peft_model, adapter="second", seed=5)
    first = logits(peft_model)
    peft_model.set_adapter("second")
    second = logits(peft_model)
    batch = tiny_batch(model)
    repeated = {key: torch.cat([value, value[:1]]) for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        mixed = peft_model(**repeated, adapter_names=["second", "default", "__base__"]).logits
    expected = torch.stack([second[0], first[1], base[0]])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_merge_and_unload_takes_adapter_names(method: str) -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method=method)
    first = logits(peft_model)
    peft_model.add_adapter("second", CONFIGS[method](r=2, masks=masks))
    perturb(peft_model, adapter="second", seed=5)
    merged = peft_model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(logits(merged), first, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


# -- elsewhere -------------------------------------------------------------------------------------------------------


@every_method
def test_hooks_on_the_base_layer_still_run(method: str) -> None:
    model, masks = sparse_model("gpt2")
    peft_model = adapted(model, masks, method=method)
    fused = logits(peft_model)
    calls = []
    layer = peft_model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc")
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1) and None)
    torch.testing.assert_close(logits(peft_model), fused, rtol=1e-4, atol=1e-5)
    assert calls == [1]


@every_method
def test_copies_and_casts_keep_the_masks(method: str) -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method=method)
    twin = copy.deepcopy(peft_model).to(torch.bfloat16)
    assert all(m.keep.dtype == torch.uint8 for m in twin.modules() if hasattr(m, "keep"))
    torch.testing.assert_close(logits(twin).float(), logits(peft_model), rtol=0.1, atol=0.1)
    masks.verify(twin.merge_and_unload())


def test_masks_take_a_bit_per_weight() -> None:
    model, masks = sparse_model()
    held = sum(m.keep.nbytes for m in adapted(model, masks).modules() if hasattr(m, "keep"))
    assert held == sum(total for _, total in masks.counts().values()) // 8


@every_method
def test_masks_move_with_the_model(method: str) -> None:
    model, masks = sparse_model()
    moved = adapted(model, masks, method=method).to("meta")
    keeps = [module.keep for module in moved.modules() if hasattr(module, "keep")]
    assert len(keeps) == len(masks) and all(keep.is_meta and keep.dtype == torch.uint8 for keep in keeps)


@every_method
def test_targets_found_and_adapted_agree(method: str) -> None:
    for name in ("llama", "gpt2", "bert"):
        model, masks = sparse_model(name)
        peft_model = adapted(model, masks, method=method)
        assert {t.name for t in find_targets(peft_model)} == set(masks)
