"""MaskLoRA on whole models: what stays untouched, what merging gives, and PEFT's ways of switching adapters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapters.sparse_models import adapted, logits, perturb, snapshot, sparse_model, train
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import TINY, tiny_batch

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

EVERY_MODEL = pytest.mark.parametrize("name", list(TINY))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


# -- before merging --------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_step_zero_equals_the_pruned_model_bit_for_bit(name: str) -> None:
    model, masks = sparse_model(name)
    before = logits(model)
    assert torch.equal(logits(get_peft_model(model, MaskLoraConfig(r=4, masks=masks))), before)


@EVERY_MODEL
def test_only_factors_are_trained_and_all_else_stays_bit_identical(name: str) -> None:
    model, masks = sparse_model(name)
    before = snapshot(model)
    peft_model = get_peft_model(model, MaskLoraConfig(r=4, masks=masks))
    trainable = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n for n in trainable)
    sizes = [torch.Size(masks.shape(n)) for n in masks]
    expected = sum(4 * (s[0] + s[1]) if len(s) == 2 else 4 * s[0] * (s[1] + s[2]) for s in sizes)
    assert sum(p.numel() for p in trainable.values()) == expected
    start = logits(peft_model)
    train(peft_model)
    after = snapshot(peft_model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not torch.equal(logits(peft_model), start)


def test_masked_gradients_reach_the_factors_of_every_adapted_tensor() -> None:
    model, masks = sparse_model("mixtral")
    peft_model = adapted(model, masks)
    peft_model(**tiny_batch(model)).loss.backward()
    gradients = [p.grad for n, p in peft_model.named_parameters() if "lora_" in n]
    assert len(gradients) == 2 * len(masks)
    assert all(g is not None and g.any() for g in gradients)


def test_a_kept_weight_that_is_zero_moves() -> None:
    model, masks = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    row, column = (int(i) for i in masks[name].nonzero()[0])
    with torch.no_grad():
        named_weights(model)[name][row, column] = 0
    merged = adapted(model, masks).merge_and_unload()
    assert named_weights(merged)[name][row, column] != 0


def test_wholly_pruned_tensors_get_no_adapter_and_stay_zero() -> None:
    model, masks = sparse_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    emptied = MaskSet({**masks, name: torch.zeros_like(masks[name])})
    emptied.apply_(model)
    with pytest.warns(UserWarning, match=r"1 wholly pruned tensors .*layers.1.self_attn.k_proj"):
        peft_model = adapted(model, emptied)
    assert not any("layers.1.self_attn.k_proj.lora" in n for n, _ in peft_model.named_parameters())
    assert not named_weights(peft_model.merge_and_unload())[name].any()


def test_an_explicit_wholly_pruned_target_is_inert() -> None:
    model, masks = sparse_model()
    emptied = MaskSet({name: torch.zeros_like(masks[name]) for name in masks if "k_proj" in name})
    emptied.apply_(model)
    before = logits(model)
    peft_model = adapted(model, emptied, target_modules=["k_proj"])
    assert torch.equal(logits(peft_model), before)
    assert torch.equal(logits(peft_model.merge_and_unload()), before)


@EVERY_MODEL
def test_an_all_true_mask_is_ordinary_lora(name: str) -> None:
    model = TINY[name]()
    targets = find_targets(model)
    full = MaskSet({t.name: torch.ones(t.shape, dtype=torch.bool) for t in targets})
    ours = adapted(copy.deepcopy(model), full, lora_alpha=8)
    modules = [t.module for t in targets if t.kind != "experts"]
    stacks = [t.name for t in targets if t.kind == "experts"] or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that it sets fan_in_fan_out for Conv1D
        config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=stacks)
        theirs = get_peft_model(model, config).eval()
    perturb(theirs)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_scaling_is_two_by_default_and_rank_stabilised_on_request() -> None:
    def scalings(**options: object) -> set[float]:
        model, masks = sparse_model()
        peft_model = adapted(model, masks, **options)
        layers = [m for m in peft_model.modules() if isinstance(m, BaseTunerLayer)]
        return {layer.scaling["default"] for layer in layers}

    assert MaskLoraConfig().r == 16
    assert scalings(r=16) == scalings(r=4) == {2.0}
    assert scalings(r=16, lora_alpha=8) == {0.5}
    assert scalings(r=16, lora_alpha=8, use_rslora=True) == {2.0}
    assert scalings(r=4, rank_pattern={"k_proj": 8}, lora_alpha=8) == {2.0, 1.0}


def test_pruned_is_exactly_the_masked_modules() -> None:
    model, masks = sparse_model()
    some = MaskSet({name: masks[name] for name in masks if "mlp" in name or "layers.1.self_attn.q_proj" in name})
    config = MaskLoraConfig(r=4, masks=some, exclude_modules=["down_proj"])
    peft_model = get_peft_model(model, config)
    names = {n.split(".lora_A")[0] for n, _ in peft_model.named_parameters() if ".lora_A" in n}
    expected = {n for n in some if "down_proj" not in n}
    assert {f"{n.removeprefix('base_model.model.')}.weight" for n in names} == expected
    assert set(config.masks) == expected


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, masks = sparse_model("mixtral")
        peft_model = adapted(model, masks).train()
        if checkpointing:
            peft_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            peft_model.enable_input_require_grads()
        peft_model(**tiny_batch(model)).loss.backward()
        return [p.grad for p in peft_model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_biases_and_modules_to_save_are_trained_beside_the_factors() -> None:
    model, masks = sparse_model("opt")
    peft_model = get_peft_model(model, MaskLoraConfig(r=4, masks=masks, bias="lora_only", modules_to_save=["final_layer_norm"]))
    before = snapshot(peft_model)
    train(peft_model)
    after = snapshot(peft_model)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert any(n.endswith("q_proj.bias") for n in changed)
    assert any("final_layer_norm.modules_to_save.default.weight" in n for n in changed)
    assert not any(n.endswith("q_proj.weight") for n in changed)


# -- merging ---------------------------------------------------------------------------------------------------------


@EVERY_MODEL
def test_merged_equals_unmerged(name: str) -> None:
    model, masks = sparse_model(name)
    before = logits(model)
    peft_model = adapted(model, masks)
    unmerged = logits(peft_model)
    merged = peft_model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)
    assert (unmerged - before).abs().max() > 1e-3
    assert type(merged) is type(TINY[name]())


@EVERY_MODEL
@DTYPES
def test_merging_revives_nothing_in_any_precision(name: str, dtype: torch.dtype) -> None:
    model, masks = sparse_model(name, dtype=dtype)
    others = {n: w for n, w in snapshot(model).items() if n not in masks}
    merged = adapted(model, masks).merge_and_unload()
    masks.verify(merged)
    weights = named_weights(merged)
    assert all(torch.equal(weights[n], others[n]) for n in others)
    assert all(weights[n].dtype == dtype for n in masks)
    assert sum(zeros(weights[n]) for n in masks) >= sum(total - kept for kept, total in masks.counts().values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_merging_keeps_the_n_of_m_groups(name: str, pattern: str) -> None:
    model, masks = sparse_model(name, pattern=pattern, dtype=torch.bfloat16)
    merged = adapted(model, masks).merge_and_unload()
    kept, group = (int(part) for part in pattern.split(":"))
    for target in find_targets(merged):
        weight = named_weights(merged)[target.name].movedim(target.input_dim, -1)
        per_group = (weight != 0).reshape(*weight.shape[:-1], -1, group).sum(-1)
        assert int(per_group.max()) <= kept


@DTYPES
def test_merging_rounds_the_fp32_sum_once(dtype: torch.dtype) -> None:
    model, masks = sparse_model(dtype=dtype)
    name = "model.layers.0.mlp.up_proj"
    peft_model = adapted(model, masks)
    layer = peft_model.get_submodule(f"base_model.model.{name}")
    A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    exact = layer.weight.detach().double() + 2.0 * (B @ A) * masks[f"{name}.weight"]
    merged = named_weights(peft_model.merge_and_unload())[f"{name}.weight"]
    expected = exact.to(dtype)
    torch.testing.assert_close(merged.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=1e-7)
    if dtype != torch.float32:  # fp32 sums tell from fp64 sums only next to a tie
        assert float((merged == expected).float().mean()) > 0.99


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@DTYPES
def test_unmerging_restores_every_bit(name: str, dtype: torch.dtype) -> None:
    model, masks = sparse_model(name, dtype=dtype)
    peft_model = adapted(model, masks)
    before, start = snapshot(peft_model), logits(peft_model)
    peft_model.merge_adapter()
    masks.verify(peft_model)
    assert any(not torch.equal(w, before[n]) for n, w in snapshot(peft_model).items())
    peft_model.unmerge_adapter()
    after = snapshot(peft_model)
    assert all(torch.equal(after[n].view(torch.uint8), before[n].view(torch.uint8)) for n in before)
    assert torch.equal(logits(peft_model), start)


def test_disabled_while_merged_is_the_pruned_model() -> None:
    model, masks = sparse_model(dtype=torch.bfloat16)
    before = logits(model)
    peft_model = adapted(model, masks)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


def test_ordinary_lora_loses_the_sparsity() -> None:
    model, masks = sparse_model()
    modules = [name.removesuffix(".weight") for name in masks]
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=modules))
    perturb(peft_model)
    weights = named_weights(peft_model.merge_and_unload())
    assert sum(zeros(weights[n]) for n in masks) / sum(weights[n].numel() for n in masks) < 1e-3
    with pytest.raises(RuntimeError, match="pruned weights in 14 tensors are not zero"):
        masks.verify(weights)


def test_safe_merge_refuses_a_broken_adapter_and_leaves_the_weight() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks)
    with torch.no_grad():
        next(p for n, p in peft_model.named_parameters() if "lora_A" in n)[0, 0] = float("inf")
    before = snapshot(peft_model)
    with pytest.raises(ValueError, match="not finite"):
        peft_model.merge_adapter(safe_merge=True)
    after = snapshot(peft_model)
    assert all(torch.equal(after[n], before[n]) for n in masks)


# -- expressiveness --------------------------------------------------------------------------------------------------


def fit(rank: int, steps: int = 800) -> float:
    """Least squares of W + MaskLoRA to a random target on the mask; the mean squared error reached."""
    torch.manual_seed(0)
    from sparse_ft.adapters import mask_lora_linear

    mask = torch.rand(6, 8) > 0.4
    weight, wanted = torch.randn(6, 8) * mask, torch.randn(6, 8) * mask
    A, B = torch.randn(rank, 8).requires_grad_(), torch.zeros(6, rank).requires_grad_()
    optimizer = torch.optim.Adam([A, B], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        error = mask_lora_linear(torch.eye(8), weight, None, mask, A, B, 1.0) - (weight + wanted).T
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    return error.square().mean().item()


def test_full_rank_reaches_any_masked_update_and_rank_one_cannot() -> None:
    assert fit(6) < 1e-6
    assert fit(1) > 0.05


# -- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_active_adapters_add_up_each_under_its_own_mask(name: str) -> None:
    model, masks = sparse_model(name)
    wider = masks | MaskSet.from_scores({n: torch.rand(masks.shape(n)) for n in masks}, sparsity=0.5)
    wider = MaskSet(dict(wider), input_dims=masks.input_dims)
    peft_model = adapted(model, masks)
    peft_model.add_adapter("second", MaskLoraConfig(r=2, masks=wider))
    perturb(peft_model, adapter="second", seed=5)
    base = snapshot(peft_model)
    outputs = {}
    for active in (["default"], ["second"], ["default", "second"]):
        peft_model.base_model.set_adapter(active)
        outputs[tuple(active)] = logits(peft_model)
    peft_model.merge_adapter(adapter_names=["default"])
    peft_model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(logits(peft_model), outputs["default", "second"], rtol=1e-4, atol=1e-5)
    both = named_weights(peft_model)
    revived = {n: int((both[n][~masks[n]] != 0).sum()) for n in masks}
    assert any(revived.values())
    wider.verify(peft_model)
    peft_model.unmerge_adapter()
    assert all(torch.equal(w, base[n]) for n, w in snapshot(peft_model).items())
    peft_model.set_adapter("second")
    assert torch.equal(logits(peft_model), outputs[("second",)])
    assert not torch.equal(outputs[("second",)], outputs[("default",)])
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), outputs[("default",)])
    assert not any("second" in key for key in peft_model.state_dict())


def test_adapter_names_choose_per_sample() -> None:
    model, masks = sparse_model("gpt2")
    base = logits(model)
    peft_model = adapted(model, masks)
    peft_model.add_adapter("second", MaskLoraConfig(r=2, masks=masks))
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


def test_merge_and_unload_takes_adapter_names() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks)
    first = logits(peft_model)
    peft_model.add_adapter("second", MaskLoraConfig(r=2, masks=masks))
    perturb(peft_model, adapter="second", seed=5)
    merged = peft_model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(logits(merged), first, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


# -- elsewhere -------------------------------------------------------------------------------------------------------


def test_hooks_on_the_base_layer_still_run() -> None:
    model, masks = sparse_model("gpt2")
    peft_model = adapted(model, masks)
    fused = logits(peft_model)
    calls = []
    layer = peft_model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc")
    layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1) and None)
    torch.testing.assert_close(logits(peft_model), fused, rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_copies_and_casts_keep_the_masks() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks)
    twin = copy.deepcopy(peft_model).to(torch.bfloat16)
    assert all(m.keep.dtype == torch.int8 for m in twin.modules() if hasattr(m, "keep"))
    torch.testing.assert_close(logits(twin).float(), logits(peft_model), rtol=0.1, atol=0.1)
    masks.verify(twin.merge_and_unload())


def test_masks_move_with_the_model() -> None:
    model, masks = sparse_model()
    moved = adapted(model, masks).to("meta")
    keeps = [module.keep for module in moved.modules() if hasattr(module, "keep")]
    assert len(keeps) == len(masks) and all(keep.is_meta and keep.dtype == torch.int8 for keep in keeps)


def test_training_lowers_the_loss_and_merging_keeps_it() -> None:
    model, masks = sparse_model()
    peft_model = get_peft_model(model, MaskLoraConfig(r=8, masks=masks))
    start = float(peft_model(**tiny_batch(model)).loss)
    train(peft_model, steps=30)
    trained = float(peft_model(**tiny_batch(model)).loss)
    assert trained < start - 0.5
    merged = peft_model.merge_and_unload()
    assert float(merged(**tiny_batch(model)).loss) == pytest.approx(trained, abs=1e-4)
    masks.verify(merged)
