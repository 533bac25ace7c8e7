"""What holds for every masked adapter on every architecture: the start, what is trained, merging and unmerging."""

from __future__ import annotations

import pytest
import torch
from adapters.sparse_models import (
    CONFIGS,
    adapted,
    every_family,
    every_method,
    layers_of,
    logits,
    pair_of,
    product,
    snapshot,
    sparse_model,
    train,
)
from peft import get_peft_model
from tiny_models import TINY, tiny_batch
from torch import Tensor

from sparse_ft.adapters import scale_lora_weight
from sparse_ft.adapters.masked_layer import MaskedLayer
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

every_model = pytest.mark.parametrize("name", list(TINY))
three_layouts = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def merged_weight(method: str, layer: MaskedLayer, weight: Tensor, mask: Tensor) -> Tensor:
    """The definition, in fp64."""
    weight, BA = weight.double(), product(layer, *(factor.detach().double() for factor in pair_of(layer)))
    return weight * BA * mask if method == "scale_lora" else weight + layer.scaling["default"] * BA * mask


# -- before merging --------------------------------------------------------------------------------------------------


@every_model
@every_method
def test_step_zero_is_the_pruned_model_bit_for_bit(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    before = logits(model)
    assert torch.equal(logits(get_peft_model(model, CONFIGS[method](r=4, masks=masks))), before)


@every_model
@every_method
def test_only_factors_are_trained_and_all_else_stays_bit_identical(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    before = snapshot(model)
    peft_model = get_peft_model(model, CONFIGS[method](r=4, masks=masks))
    trainable = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    sizes = [masks.shape(n) for n in masks]
    assert len(trainable) == 2 * len(masks)
    assert all(".lora_A.default.weight" in n or ".lora_B.default.weight" in n for n in trainable)
    assert sum(p.numel() for p in trainable.values()) == sum(
        4 * (s[0] + s[1]) if len(s) == 2 else 4 * s[0] * (s[1] + s[2]) for s in sizes
    )
    start = logits(peft_model)
    train(peft_model)
    after = snapshot(peft_model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not torch.equal(logits(peft_model), start)


@every_method
def test_gradients_reach_the_factors_of_every_adapted_tensor(method: str) -> None:
    model, masks = sparse_model("mixtral")
    peft_model = adapted(model, masks, method=method)
    peft_model(**tiny_batch(model)).loss.backward()
    gradients = [p.grad for n, p in peft_model.named_parameters() if "lora_" in n]
    assert len(gradients) == 2 * len(masks)
    assert all(g is not None and g.any() for g in gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method: str, use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model, masks = sparse_model("mixtral")
        peft_model = adapted(model, masks, method=method).train()
        if checkpointing:
            peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            peft_model.enable_input_require_grads()
        peft_model(**tiny_batch(model)).loss.backward()
        return [p.grad for p in peft_model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


@every_method
def test_training_lowers_the_loss_and_what_is_merged_is_as_sparse(method: str) -> None:
    model, masks = sparse_model()
    peft_model = get_peft_model(model, CONFIGS[method](r=8, masks=masks))
    start = float(peft_model(**tiny_batch(model)).loss.detach())
    train(peft_model, steps=30)
    trained = float(peft_model(**tiny_batch(model)).loss.detach())
    assert trained < start - (0.15 if method == "scale_lora" else 0.5)  # ScaleLoRA only rescales rows and columns
    merged = peft_model.merge_and_unload()
    masks.verify(merged)
    found = float(merged(**tiny_batch(model)).loss.detach())
    assert found == pytest.approx(trained, abs=1e-4) if method != "lora_prune" else found != trained


@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_autocast_sees_nearly_the_same_model_and_trains_fp32_factors(method: str) -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method=method)
    full = logits(peft_model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(logits(peft_model).float(), full, rtol=0.05, atol=0.05)
        loss = peft_model(**tiny_batch(model)).loss
    loss.backward()
    assert {p.grad.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}


# -- merging ---------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_merged_equals_unmerged(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    before = logits(model)
    peft_model = adapted(model, masks, method=method)
    unmerged = logits(peft_model)
    merged = peft_model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)
    assert (unmerged - before).abs().max() > 1e-3
    assert type(merged) is type(TINY[name]())


@every_model
@every_method
def test_each_merged_weight_is_the_definition_rounded_once(method: str, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, masks = sparse_model(name, dtype=dtype)
        peft_model = adapted(model, masks, method=method)
        layers, before = layers_of(peft_model), snapshot(peft_model)
        wanted = {n: merged_weight(method, layers[n], before[n], masks[n]).to(dtype) for n in masks}
        weights = named_weights(peft_model.merge_and_unload())
        for n in masks:
            torch.testing.assert_close(weights[n], wanted[n], rtol=torch.finfo(dtype).eps, atol=1e-6)
            if dtype != torch.float32:  # fp32 sums tell from fp64 sums only next to a tie
                assert float((weights[n] == wanted[n]).float().mean()) > 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@every_dtype
def test_scale_lora_weight_is_what_is_merged(dtype: torch.dtype, name: str) -> None:
    model, masks = sparse_model(name, dtype=dtype)
    for layer in layers_of(adapted(model, masks, method="scale_lora")).values():
        weight = layer.get_base_layer().weight.detach().clone()
        wanted = scale_lora_weight(weight.float(), *pair_of(layer), fan_in_fan_out=name == "gpt2").to(dtype)
        layer.merge()
        assert torch.equal(layer.get_base_layer().weight, wanted)


@every_model
@every_dtype
@every_method
def test_merging_revives_nothing_in_any_precision(method: str, dtype: torch.dtype, name: str) -> None:
    model, masks = sparse_model(name, dtype=dtype)
    others = {n: w for n, w in snapshot(model).items() if n not in masks}
    merged = adapted(model, masks, method=method).merge_and_unload()
    masks.verify(merged)
    weights = named_weights(merged)
    assert all(torch.equal(weights[n], others[n]) for n in others)
    assert all(weights[n].dtype == dtype for n in masks)
    pruned = sum(total - kept for kept, total in masks.counts().values())
    assert pruned <= sum(int((weights[n] == 0).sum()) for n in masks) <= pruned * 1.01


@every_family
@pytest.mark.parametrize(
    ("pattern", "dtype"), [("2:4", torch.bfloat16), ("1:4", torch.float16), ("4:8", torch.bfloat16)]
)
@every_method
def test_merging_keeps_the_n_of_m_groups(method: str, pattern: str, dtype: torch.dtype, name: str) -> None:
    model, masks = sparse_model(name, pattern=pattern, dtype=dtype)
    merged = adapted(model, masks, method=method).merge_and_unload()
    kept, group = (int(part) for part in pattern.split(":"))
    for target in find_targets(merged):
        weight = named_weights(merged)[target.name].movedim(target.input_dim, -1)
        per_group = (weight != 0).reshape(*weight.shape[:-1], -1, group).sum(-1)
        assert int(per_group.max()) <= kept


@every_family
@every_method
def test_kept_weights_that_merging_makes_zero_are_counted_and_stay_kept(method: str, name: str) -> None:
    """fp16 has steps of 6e-8 near zero, to which smaller weights are rounded; the mask does not follow."""
    model, masks = sparse_model(name, dtype=torch.float16)
    first = next(iter(masks))
    with torch.no_grad():
        weight = named_weights(model)[first]
        weight.mul_(1e-7 / float(weight.abs().max()))
    peft_model = adapted(model, masks, method=method)
    layer, before = layers_of(peft_model)[first], snapshot(peft_model)[first]
    with torch.no_grad():
        for factor in pair_of(layer):  # c B A is near 4e-8 then
            factor.mul_(1 if method == "scale_lora" else 1e-3)
    wanted = merged_weight(method, layer, before, masks[first]).to(torch.float16)
    merged = peft_model.merge_and_unload()
    masks.verify(merged)
    found = {name: surprise.kept_zero for name, surprise in masks.surprises(merged).items()}
    assert found[first] == int(((wanted == 0) & masks[first]).sum()) > 0
    again = MaskSet.from_zeros(merged, targets=find_targets(merged), min_sparsity=0)
    assert int(again[first].sum()) == int(masks[first].sum()) - found[first], "zeros would have lost these"


@three_layouts
@every_dtype
@every_method
def test_unmerging_restores_every_bit(method: str, dtype: torch.dtype, name: str) -> None:
    model, masks = sparse_model(name, dtype=dtype)
    peft_model = adapted(model, masks, method=method)
    before, start = snapshot(peft_model), logits(peft_model)
    peft_model.merge_adapter()
    masks.verify(peft_model)
    assert any(not torch.equal(w, before[n]) for n, w in snapshot(peft_model).items())
    peft_model.unmerge_adapter()
    after = snapshot(peft_model)
    assert all(torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8)) for n in before)
    assert torch.equal(logits(peft_model), start)


@three_layouts
@every_method
def test_the_delta_is_what_merging_adds_also_while_it_is_merged(method: str, name: str) -> None:
    model, masks = sparse_model(name)
    peft_model = adapted(model, masks, method=method)
    before = snapshot(peft_model)
    peft_model.merge_adapter()
    merged = snapshot(peft_model)
    for n, layer in layers_of(peft_model).items():
        torch.testing.assert_close(before[n] + layer.get_delta_weight("default"), merged[n])
        assert not layer.get_delta_weight("default")[~masks[n]].any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@every_method
def test_safe_merge_refuses_a_broken_adapter_and_touches_no_weight(method: str, value: float) -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method=method)
    with torch.no_grad():  # in the last layer, when all the others could have been merged
        [p for n, p in peft_model.named_parameters() if "lora_A" in n][-1].fill_(value)
    before = snapshot(peft_model)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ValueError, match=r"adapter \['default'\] gives weights that are not finite"):
            merge(safe_merge=True)
        after = snapshot(peft_model)
        assert all(torch.equal(after[n], before[n]) for n in masks)
        assert all(not layer.merged for layer in layers_of(peft_model).values())
    peft_model.merge_adapter()  # without safe_merge the weights break, but no pruned one
    masks.verify(peft_model)


@every_method
def test_disabled_while_merged_is_the_pruned_model(method: str) -> None:
    model, masks = sparse_model(dtype=torch.bfloat16)
    before = logits(model)
    peft_model = adapted(model, masks, method=method)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


# -- particular masks and weights ------------------------------------------------------------------------------------


@three_layouts
@pytest.mark.parametrize(("method", "moves"), [("mask_lora", True), ("scale_lora", False), ("lora_prune", True)])
def test_a_kept_weight_that_is_zero(method: str, moves: bool, name: str) -> None:
    model, masks = sparse_model(name)
    weights, places = named_weights(model), {}
    with torch.no_grad():
        for key in masks:
            places[key] = tuple(masks[key].nonzero()[0].tolist())
            weights[key][places[key]] = 0
    peft_model = get_peft_model(model, CONFIGS[method](r=4, masks=masks))
    train(peft_model)  # a gradient has to reach the factors there too
    weights = named_weights(peft_model.merge_and_unload())
    assert {bool(weights[key][place] != 0) for key, place in places.items()} == {moves}


@every_method
def test_wholly_pruned_tensors_get_no_adapter_and_stay_zero(method: str) -> None:
    model, masks = sparse_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    emptied = MaskSet({**masks, name: torch.zeros_like(masks[name])})
    emptied.apply_(model)
    with pytest.warns(UserWarning, match=r"1 wholly pruned tensors .*layers.1.self_attn.k_proj"):
        peft_model = adapted(model, emptied, method=method)
    assert not any("layers.1.self_attn.k_proj.lora" in n for n, _ in peft_model.named_parameters())
    assert not named_weights(peft_model.merge_and_unload())[name].any()


@every_method
def test_an_explicit_wholly_pruned_target_is_inert_once_merged(method: str) -> None:
    model, masks = sparse_model()
    emptied = MaskSet({name: torch.zeros_like(masks[name]) for name in masks if "k_proj" in name})
    emptied.apply_(model)
    before = logits(model)
    peft_model = adapted(model, emptied, method=method, target_modules=["k_proj"])
    if method != "lora_prune":
        assert torch.equal(logits(peft_model), before)
    assert torch.equal(logits(peft_model.merge_and_unload()), before)
