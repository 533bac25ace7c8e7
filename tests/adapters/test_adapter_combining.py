"""`add_weighted_adapter` for masked adapters: the sum of deltas, written out here, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.sparse_models import CONFIGS, adapted, every_method, logits, perturb, snapshot, sparse_model
from peft import PeftModel
from torch import Tensor

from sparse_ft.adapters.combining import Factors, summed, truncated
from sparse_ft.adapters.masked_layer import MaskedLayer
from sparse_ft.masks import MaskSet

three_layouts = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
WEIGHTS = {"default": 0.7, "second": -1.5}


def two_adapters(method: str, name: str = "llama", **options: object) -> tuple[PeftModel, MaskSet]:
    model, masks = sparse_model(name)
    peft_model = adapted(model, masks, method=method, r=3)
    peft_model.add_adapter("second", CONFIGS[method](**{"r": 4, "masks": masks, **options}))
    perturb(peft_model, adapter="second", seed=5)
    return peft_model, masks


def combine(model: PeftModel, how: str, **options: object) -> None:
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "both", how, **options)


def layers_of(model: PeftModel) -> list[MaskedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]


def weighted_delta(layer: MaskedLayer) -> Tensor:
    return sum(w * layer.get_delta_weight(name) for name, w in WEIGHTS.items() if name in layer.lora_A)


def product(layer: MaskedLayer, adapter: str) -> Tensor:
    """c B A, not masked, expert by expert: (E, out, in)."""
    A, B, scaling = layer.factors(adapter)
    return scaling * torch.stack([b @ a for a, b in zip(A, B, strict=True)])


@three_layouts
@every_method
def test_cat_is_the_weighted_sum_exactly(method: str, name: str) -> None:
    options = {"rank_pattern": {"k_proj": 2, "experts.down_proj": 1}, "exclude_modules": ["o_proj"]}
    if method != "scale_lora":
        options |= {"use_rslora": True, "alpha_pattern": {"v_proj": 5}}
    model, masks = two_adapters(method, name, **options)
    before, alone = snapshot(model), logits(model)
    combine(model, "cat")
    assert torch.equal(logits(model), alone), "the new adapter is not active yet"
    for layer in layers_of(model):
        ranks = sum(layer.r[adapter] for adapter in WEIGHTS if adapter in layer.lora_A)
        assert layer.r["both"] == ranks + (method == "scale_lora")
        torch.testing.assert_close(layer.get_delta_weight("both"), weighted_delta(layer), rtol=1e-5, atol=1e-6)
    expected = {layer.lora_mask["both"].name: weighted_delta(layer) for layer in layers_of(model)}
    model.set_adapter("both")
    unmerged = logits(model)
    merged = model.merge_and_unload(adapter_names=["both"])
    for n, delta in expected.items():
        torch.testing.assert_close(snapshot(merged)[n], before[n] + delta, rtol=1e-5, atol=1e-6)
    if method != "lora_prune":
        torch.testing.assert_close(logits(merged), unmerged, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


@three_layouts
@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_svd_is_the_best_low_rank_of_the_unmasked_sum_then_masked(method: str, name: str) -> None:
    model, masks = two_adapters(method, name)
    combine(model, "svd", svd_rank=2)
    for layer in layers_of(model):
        total = sum(w * product(layer, adapter) for adapter, w in WEIGHTS.items()).double()
        U, S, V = torch.linalg.svd(total, full_matrices=False)
        best = (U[:, :, :2] * S[:, None, :2]) @ V[:, :2]
        torch.testing.assert_close(product(layer, "both").double(), best, rtol=1e-4, atol=1e-5)
        delta = layer.get_delta_weight("both")
        mask = masks[layer.lora_mask["both"].name]
        assert not delta[~mask].any() and delta[mask].any()
        assert layer.r["both"] == 2


@pytest.mark.parametrize("method", ["mask_lora", "lora_prune"])
def test_linear_adds_up_the_factors(method: str) -> None:
    model, masks = sparse_model("gpt2")
    model = adapted(model, masks, method=method, r=3)
    model.add_adapter("second", CONFIGS[method](r=3, masks=masks))
    perturb(model, adapter="second", seed=5)
    combine(model, "linear")
    for layer in layers_of(model):
        (A1, B1, c1), (A2, B2, c2) = layer.factors("default"), layer.factors("second")
        B = (0.7 * c1) ** 0.5 * B1 + (1.5 * c2) ** 0.5 * B2
        A = (0.7 * c1) ** 0.5 * A1 - (1.5 * c2) ** 0.5 * A2
        torch.testing.assert_close(product(layer, "both"), B @ A, rtol=1e-5, atol=1e-6)


def test_truncation_of_any_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    for out, inputs, r in ((3, 9, 5), (9, 3, 5), (4, 4, 2)):
        A, B = torch.randn(2, r, inputs, generator=generator), torch.randn(2, out, r, generator=generator)
        full = truncated([Factors(A, B, -2.0)], min(out, inputs, r))
        torch.testing.assert_close(full.B @ full.A, -2.0 * B @ A, rtol=1e-4, atol=1e-4)
        assert truncated([Factors(A, B)], 1).A.shape == (2, 1, inputs)
    torch.testing.assert_close(summed([Factors(A, B, -2.0)]).B @ summed([Factors(A, B, -2.0)]).A, -2.0 * B @ A)


@every_method
def test_a_combined_adapter_is_saved_and_loaded_like_any_other(method: str, tmp_path: Path) -> None:
    model, _ = two_adapters(method, "mixtral", dense_modules=["lm_head"], rank_pattern={"k_proj": 2})
    combine(model, "cat")
    model.set_adapter("both")
    wanted = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(sparse_model("mixtral")[0], tmp_path / "both")
    assert torch.equal(logits(loaded), wanted)


@every_method
def test_dense_modules_are_combined_too(method: str) -> None:
    model, _ = two_adapters(method, dense_modules=["lm_head"])
    combine(model, "cat")
    head = model.get_submodule("base_model.model.lm_head")
    torch.testing.assert_close(head.get_delta_weight("both"), -1.5 * head.get_delta_weight("second"))


@every_method
def test_it_can_be_trained_after_switching_to_it(method: str) -> None:
    model, _ = two_adapters(method)
    combine(model, "cat")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both." in n)
    model.set_adapter("both")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".both.weight" in n)


def refused(model: PeftModel, match: str, *arguments: object, **options: object) -> None:
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=match) as caught:
        model.add_weighted_adapter(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and message[-1] in ".?"
    assert set(model.state_dict()) == before
    assert set(model.peft_config) == set(WEIGHTS)


@every_method
def test_what_does_not_go_together(method: str) -> None:
    model, _ = two_adapters(method)
    both = ["default", "second"]
    refused(model, "one weight for each", both, [1.0], "both", "cat")
    refused(model, "each adapter once", ["default", "default"], [1.0, 1.0], "both", "cat")
    refused(model, r"No adapters \['absent'\]", ["default", "absent"], [1.0, 1.0], "both", "cat")
    refused(model, "No adapters", [], [], "both", "cat")
    refused(model, "There is an adapter 'second' already", both, [1.0, 1.0], "second", "cat")
    for how in ("ties", "dare_linear", "magnitude_prune_svd", "nonsense"):
        refused(model, f"does not support combination_type='{how}', only .*cat", both, [1.0, 1.0], "both", how)
    unequal = "only cat" if method == "scale_lora" else r"'linear' needs equal ranks, got \[3, 4\]"
    refused(model, unequal, both, [1.0, 1.0], "both", "linear")
    if method == "scale_lora":
        refused(model, "only cat", both, [1.0, 1.0], "both")
    model.merge_adapter(adapter_names=["second"])
    refused(model, "is merged into", both, [1.0, 1.0], "both", "cat")


@every_method
def test_other_masks(method: str) -> None:
    model, masks = sparse_model()
    wider = masks | MaskSet.from_scores({n: torch.rand(masks.shape(n)) for n in masks}, sparsity=0.5)
    model = adapted(model, masks, method=method)
    model.add_adapter("second", CONFIGS[method](r=2, masks=wider))
    refused(model, "have different masks on 'model.layers.0.*'", list(WEIGHTS), [1.0, 1.0], "both", "cat")


def test_a_rank_that_a_module_cannot_have() -> None:
    model, masks = sparse_model()
    model = adapted(model, masks, r=16)
    model.add_adapter("second", CONFIGS["mask_lora"](r=2, masks=masks))
    refused(model, r"r=18 is more than the rank 16 that '.*k_proj'", list(WEIGHTS), [1.0, 1.0], "both", "cat")


def test_modules_to_save_cannot_be_combined() -> None:
    model, masks = sparse_model()
    model = adapted(model, masks, modules_to_save=["norm"])
    model.add_adapter("second", CONFIGS["mask_lora"](r=2, masks=masks))
    refused(model, "modules_to_save cannot be combined", list(WEIGHTS), [1.0, 1.0], "both", "cat")
