"""Masked adapters on 4-bit and 8-bit linears: forward, gradients, zeros, memory, and what bitsandbytes does behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install sparse-ft[quant]")

from adapters.quantised_models import (  # noqa: E402
    KINDS,
    Stored,
    adapt,
    dense_weight,
    effective,
    factors,
    randomise,
    store,
)
from adapters.sparse_models import CONFIGS, FAMILIES, layers_of, logits, sparse_model, train  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from tiny_models import tiny_batch  # noqa: E402
from transformers import PreTrainedModel, Trainer, TrainingArguments  # noqa: E402

from sparse_ft.adapters import MaskLoraConfig, prepare_perp  # noqa: E402
from sparse_ft.adapters.quantised import is_quantised  # noqa: E402
from sparse_ft.masks import MaskSet  # noqa: E402

METHODS = pytest.mark.parametrize("method", list(CONFIGS))
EVERY_KIND = pytest.mark.parametrize("kind", list(KINDS))
FOUR_EIGHT = ["nf4-double", "int8"]
TWO_KINDS = pytest.mark.parametrize("kind", FOUR_EIGHT)
repacks = pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks on AVX512-BF16 only")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tmp_path_factory.mktemp("llama"))


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_quantised(module)}


def untied(model: PreTrainedModel) -> PreTrainedModel:
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def packed_bytes(model: nn.Module) -> list[Tensor]:
    return [layer.weight.data.clone() for layer in quantised_layers(model).values()]


# -- what is computed ------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    "name, kind",
    [("llama", kind) for kind in KINDS] + [(name, "nf4-double") for name in FAMILIES[1:]] + [("gpt2", "int8")],
)
def test_forward_and_gradients_are_those_of_the_formula_on_the_dequantised_weight(
    tmp_path: Path, method: str, name: str, kind: str
) -> None:
    stored = store(tmp_path, name)
    model = stored.adapted(method, kind).train()  # in eval mode LoRA-Prune on 8 bits quantises the activations
    plain = stored.dequantised(model.base_model.model, torch.float32).train()
    pairs = {key: [f.detach().clone().requires_grad_() for f in factors(model, key)] for key in stored.masks}
    weights = {
        key: effective(method, plain.get_parameter(key).detach(), stored.masks[key], A, B, transposed=name == "gpt2")
        for key, (A, B) in pairs.items()
    }
    torch.manual_seed(0)
    ours = model(**tiny_batch(model))
    torch.manual_seed(0)
    expected = functional_call(plain, weights, kwargs=tiny_batch(plain))
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    expected.loss.backward()
    for key, pair in pairs.items():
        for factor, reference in zip(factors(model, key), pair, strict=True):
            torch.testing.assert_close(factor.grad, reference.grad, rtol=1e-3, atol=1e-6)


@METHODS
@TWO_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_is_bit_for_bit_that_on_a_plain_model_with_the_dequantised_weights(
    tmp_path: Path, method: str, kind: str, dtype: torch.dtype
) -> None:
    stored = store(tmp_path, dtype=dtype)
    model = stored.adapted(method, kind, dtype).train()
    twin = adapt(stored.dequantised(model.base_model.model, dtype), method, stored.masks).train()
    ours, expected = model(**tiny_batch(model)), twin(**tiny_batch(twin))
    # LoRA-Prune goes through bitsandbytes, and ScaleLoRA takes the 8-bit weight in float32 before it rounds the product
    rounded = method == "lora_prune" or (method, kind, dtype) == ("scale_lora", "int8", torch.bfloat16)
    exact: dict[str, float] = dict(rtol=0.05, atol=0.02) if rounded else dict(rtol=0, atol=0)
    torch.testing.assert_close(ours.logits, expected.logits, **exact)
    ours.loss.backward()
    expected.loss.backward()
    for key in stored.masks:
        for factor, reference in zip(factors(model, key), factors(twin, key), strict=True):
            torch.testing.assert_close(factor.grad, reference.grad, **exact)


@pytest.mark.parametrize(
    "name, kind", [("llama", kind) for kind in KINDS] + [(name, kind) for name in FAMILIES[1:] for kind in FOUR_EIGHT]
)
def test_step_zero_is_the_quantised_model(tmp_path: Path, name: str, kind: str) -> None:
    """Bit for bit, but that D of 8 bits is scaled in another order than bitsandbytes does it."""
    stored = store(tmp_path, name)
    model = stored.quantised(kind).requires_grad_(False).train()  # in eval mode 8 bits quantise the activations
    torch.manual_seed(0)
    before = model(**tiny_batch(model)).logits
    for method in CONFIGS:
        peft_model = get_peft_model(model, CONFIGS[method](r=4, masks=stored.masks)).train()
        torch.manual_seed(0)
        found = peft_model(**tiny_batch(model)).logits
        assert len(layers_of(peft_model)) == len(stored.masks)
        if kind == "int8" and method != "lora_prune":
            torch.testing.assert_close(found, before, rtol=1e-5, atol=5e-6)
        else:
            assert torch.equal(found, before), method
        model = peft_model.unload()


@TWO_KINDS
def test_lora_prune_computes_what_peft_computes(llama: Stored, kind: str) -> None:
    ours = llama.adapted("lora_prune", kind)
    names = sorted({name.removesuffix(".weight") for name in llama.masks})
    theirs = get_peft_model(llama.quantised(kind), LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for layer in quantised_layers(theirs).values():
        layer.support_avx512bf16_for_cpu = False
    randomise(theirs, "lora_prune")
    for mode in (True, False):
        torch.testing.assert_close(logits(ours.train(mode)), logits(theirs.train(mode)))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_4bit_layers_compute_in_their_dtype_and_answer_in_the_inputs(
    llama: Stored, compute: torch.dtype, method: str
) -> None:
    model = llama.adapted(method, "nf4", compute)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, dtype=torch.float32)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
    name = "model.layers.0.mlp.up_proj.weight"
    dense = dense_weight(layer.get_base_layer(), compute)
    reference = x.to(compute) @ effective(method, dense, llama.masks[name], *factors(model, name)).to(compute).t()
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, reference.float(), rtol=2e-2 if compute == torch.bfloat16 else 1e-5, atol=1e-2)
    assert torch.equal(plain, plain.to(compute).float())


@TWO_KINDS
def test_mixtral_has_quantised_attention_beside_floating_point_experts(tmp_path: Path, kind: str) -> None:
    stored = store(tmp_path, "mixtral")
    model = stored.adapted("mask_lora", kind).train()
    twin = adapt(stored.dequantised(model.base_model.model, torch.float32), "mask_lora", stored.masks).train()
    assert torch.equal(model(**tiny_batch(model)).logits, twin(**tiny_batch(twin)).logits)
    assert 0 < len(quantised_layers(model)) < len(stored.masks)


# -- zeros and masks -------------------------------------------------------------------------------------------------


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_survive_quantisation_and_new_ones_are_kept_weights(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    stored = store(tmp_path, dtype=dtype, pattern="2:4")  # which keeps some small weights
    model = stored.adapted("mask_lora", kind)
    new = 0
    for name in stored.masks:
        dense = dense_weight(model.base_model.model.get_submodule(name.removesuffix(".weight")).get_base_layer(), dtype)
        assert not dense[~stored.masks[name]].any()
        new += int((dense[stored.masks[name]] == 0).sum())
    assert new > 0 or not kind.startswith("nf4")


@TWO_KINDS
def test_masks_of_other_weights_are_refused(llama: Stored, kind: str) -> None:
    others = MaskSet({name: ~llama.masks[name] for name in llama.masks})
    model = llama.quantised(kind)
    with pytest.raises(RuntimeError, match=r"^\d+ pruned weights in 14 tensors of the quantised model are not zero.*"):
        get_peft_model(model, MaskLoraConfig(r=4, masks=others))
    transposed = MaskSet({name: llama.masks[name].t().contiguous() for name in llama.masks})
    with pytest.raises(ValueError, match=r"has shape \(64, 32\) but the weight has \(32, 64\)"):
        get_peft_model(model, MaskLoraConfig(r=4, masks=transposed))
    assert not any("lora" in name for name, _ in model.named_modules())


# -- memory ----------------------------------------------------------------------------------------------------------


@METHODS
@TWO_KINDS
def test_no_dense_weight_is_kept_for_backward(llama: Stored, method: str, kind: str) -> None:
    model = llama.adapted(method, kind).train()
    shapes = {llama.masks.shape(name) for name in llama.masks}
    shapes |= {shape[::-1] for shape in shapes}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    batch = {key: value[:, :7] for key, value in tiny_batch(model).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    dense = [t for t in saved if t.is_floating_point() and tuple(t.shape[-2:]) in shapes]
    assert saved and not dense
    loss.backward()


# -- adapters as PEFT handles them -----------------------------------------------------------------------------------


@METHODS
@TWO_KINDS
def test_several_adapters_are_switched_and_switched_off(llama: Stored, method: str, kind: str) -> None:
    base = llama.quantised(kind).eval()
    for layer in quantised_layers(base).values():
        layer.support_avx512bf16_for_cpu = False
    plain = logits(base)
    model = adapt(base, method, llama.masks)
    first = logits(model)
    model.add_adapter("other", CONFIGS[method](r=2, masks=llama.masks))
    randomise(model, method, adapter="other", seed=2)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(logits(model), first)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(model.unload()), plain)


@METHODS
@TWO_KINDS
def test_a_saved_adapter_loads_on_the_quantised_and_on_the_plain_base(
    tmp_path: Path, llama: Stored, method: str, kind: str
) -> None:
    model = llama.adapted(method, kind)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama.quantised(kind), tmp_path)
    assert torch.equal(logits(again), logits(model))
    plain = PeftModel.from_pretrained(llama.plain(), tmp_path)
    twin = adapt(llama.plain(), method, llama.masks)
    assert torch.equal(logits(plain), logits(twin))


def test_a_quantised_base_of_other_weights_is_refused(tmp_path: Path, llama: Stored) -> None:
    llama.adapted("mask_lora", "nf4").save_pretrained(tmp_path / "adapter")
    model = llama.plain()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on base weights"):
        PeftModel.from_pretrained(llama._replace(path=tmp_path / "other").quantised("nf4"), tmp_path / "adapter")


@METHODS
def test_merging_into_the_quantised_model_is_refused(llama: Stored, method: str) -> None:
    base = llama.quantised("nf4", skip=["q_proj"])  # a layer that could be merged comes first
    model = adapt(base, method, llama.masks, dense_modules=["lm_head"])
    before, layer = logits(model), model.base_model.model.model.layers[0].mlp.up_proj
    for merge in (model.merge_and_unload, model.merge_adapter, layer.merge):
        for options in ({}, {"safe_merge": True}):
            with pytest.raises(ValueError, match=r"on a quantised model.*merge_into_base"):
                merge(**options)
    assert torch.equal(logits(model), before)
    assert not any(getattr(module, "merged", False) for module in model.modules())


def test_adapters_on_a_quantised_base_combine(llama: Stored) -> None:
    model = llama.adapted("mask_lora", "nf4")
    model.add_adapter("other", MaskLoraConfig(r=2, masks=llama.masks))
    randomise(model, "mask_lora", adapter="other", seed=2)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)


# -- training --------------------------------------------------------------------------------------------------------


@METHODS
@TWO_KINDS
def test_checkpointed_and_plain_training_give_the_same_gradients(llama: Stored, method: str, kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        prepared = prepare_model_for_kbit_training(llama.quantised(kind), use_gradient_checkpointing=checkpointing)
        model = adapt(prepared, method, llama.masks).train()
        model(**tiny_batch(model)).loss.backward()
        gradients.append([f.grad for key in llama.masks for f in factors(model, key)])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any() and torch.equal(plain, checkpointed)


@METHODS
@pytest.mark.parametrize("kind, bf16", [("nf4-double", True), ("int8", False)])
def test_trainer_moves_the_factors_and_nothing_else(
    tmp_path: Path, llama: Stored, method: str, kind: str, bf16: bool
) -> None:
    model = llama.adapted(method, kind, torch.bfloat16 if bf16 else torch.float32)
    packed, before = packed_bytes(model), {n: p.clone() for n, p in model.named_parameters()}
    batch = tiny_batch(model)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(2)] * 4
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, bf16=bf16,
        save_steps=2, report_to="none", disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    losses = trainer.train().training_loss
    assert losses == pytest.approx(losses) and trainer.evaluate(rows)["eval_loss"] < 5
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad} and len(moved) == 2 * len(llama.masks)
    assert all(torch.equal(a, b) for a, b in zip(packed, packed_bytes(model), strict=True))
    assert (tmp_path / "checkpoint-2" / "sparse_masks.safetensors").is_file()


def test_biases_that_bitsandbytes_would_round_are_not_trained(tmp_path: Path) -> None:
    stored = store(tmp_path, "opt")
    for method, bias, options in (("lora_prune", "lora_only", {}), ("mask_lora", "all", {"exclude_modules": ["fc1"]})):
        with pytest.raises(ValueError, match=r"round the trained bias of '.*' to 16 bits.*compute_dtype"):
            stored.adapted(method, "nf4", torch.bfloat16, bias=bias, **options)
        stored.adapted(method, "nf4", torch.float32, bias=bias, **options)
    for method, kind in (("biases", "nf4"), ("biases+head", "int8"), ("lora_prune+biases", "int8")):
        with pytest.raises(ValueError, match=r"round the trained bias of '.*' to 16 bits"):
            prepare_perp(untied(stored.quantised(kind, torch.bfloat16)), method, stored.masks, r=4)
    model = stored.adapted("mask_lora", "nf4", torch.bfloat16, bias="all")
    train(model)
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("bias")} == {torch.float32}


# -- the repacking of bitsandbytes -----------------------------------------------------------------------------------


@repacks
@METHODS
def test_evaluation_does_not_repack_the_weights(llama: Stored, method: str) -> None:
    model = llama.adapted(method, "nf4-double", torch.bfloat16, exclude_modules=["o_proj"])
    packed, trained = packed_bytes(model), model.train()(**tiny_batch(model)).logits
    logits(model.eval())
    with model.disable_adapter():
        logits(model)
    assert all(torch.equal(a, b) for a, b in zip(packed, packed_bytes(model), strict=True))
    assert torch.equal(model.train()(**tiny_batch(model)).logits, trained)


@repacks
def test_a_model_that_was_repacked_is_refused(llama: Stored) -> None:
    model = llama.quantised("nf4", torch.bfloat16).eval()
    packed = packed_bytes(model)
    logits(model)
    assert not all(torch.equal(a, b) for a, b in zip(packed, packed_bytes(model), strict=True)), "no trap any more"
    with pytest.raises(RuntimeError, match=r"^bitsandbytes has repacked 'model.layers.0.self_attn.q_proj.weight'"):
        get_peft_model(model, MaskLoraConfig(r=4, masks=llama.masks))


def test_rows_of_broken_blocks_are_refused_where_bitsandbytes_reads_them_wrongly(tmp_path: Path) -> None:
    model, masks = sparse_model("llama")  # with 32 inputs to each linear
    model.save_pretrained(tmp_path)
    stored = Stored(tmp_path, masks, {})
    layer = stored.quantised("nf4").model.layers[0].mlp.up_proj
    read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if torch.equal(read, dense_weight(layer, torch.float32)):
        stored.adapted("mask_lora", "nf4")
        return
    with pytest.raises(RuntimeError, match=r"reads '.*' wrongly on the CPU, since its 32 inputs are no multiple"):
        stored.adapted("mask_lora", "nf4")
