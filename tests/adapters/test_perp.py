"""PERP in training: exactly the declared parameters move, zeros stay, and everything travels with the adapter."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.sparse_models import FAMILIES, logits, snapshot, sparse_model
from adapters.test_perp_groups import UNTIED, declared
from peft import PeftModel
from tiny_models import CAUSAL, VOCABULARY, tiny_batch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sparse_ft.adapters import MaskLoraConfig, group_parameters, merge_perp, parse_method, prepare_perp, trainable_share
from sparse_ft.masks import MaskSet
from sparse_ft.training import MaskCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*(has no biases|share their weight)")

ALONE = ["biases", "norms", "embeddings", "biases+norms", "norms+embeddings"]
JOINED = ["mask_lora+norms", "scale_lora+biases", "lora_prune+biases+norms", "mask_lora+biases+norms"]
WITH_HEAD = ["head", "head+norms", "mask_lora+head", "scale_lora+head+norms+embeddings", "lora_prune+embeddings"]
CASES = [
    (family, method)
    for family in FAMILIES
    for method in ALONE + JOINED + (WITH_HEAD if family in UNTIED else [])
    if (family in ("gpt2", "opt", "bert") or method != "biases")
]


def steps(model: nn.Module, *, count: int = 2, dtype: torch.dtype = torch.float32) -> None:
    """AdamW steps with weight decay, under autocast where the model is in 16 bits."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for step in range(count):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = model(**tiny_batch(model, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, dtype and signs of zeros included."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_exactly_the_declared_parameters_are_trained(family: str, method: str, dtype: torch.dtype) -> None:
    model, masks = sparse_model(family, dtype=dtype)
    before, parts = snapshot(model), parse_method(method)
    groups = set().union(*(declared(model, family, group) for group in parts.groups if group != "head"))
    adapted = set(masks) if parts.adapter else set()
    adapted |= {"lm_head.weight"} if "head" in parts.groups else set()
    prepared = prepare_perp(model, method, masks, r=4, task_type=None)
    factors = {f"{name.removesuffix('.weight')}.lora_{side}" for name in adapted for side in "AB"}
    names = trainable_share(prepared).names
    assert {name for name in names if ".lora_" not in name} == groups
    of_matrices = {name.removesuffix(".default.weight") for name in names if ".lora_" in name and "experts" not in name}
    assert of_matrices == {name for name in factors if "experts" not in name}
    assert {p.dtype for p in prepared.parameters() if p.requires_grad} == {torch.float32}
    steps(prepared, dtype=dtype)
    merged = merge_perp(prepared)
    after = snapshot(merged)
    assert list(after) == list(before)
    changed = {name for name in after if not same(after[name], before[name])}
    assert changed == groups | adapted
    assert all(after[name].dtype == dtype for name in after)
    masks.verify(merged)
    if set(parts.groups) <= {"biases", "norms"} and not parts.adapter:
        assert all(same(after[name], before[name]) for name in after if after[name].ndim > 1)


@pytest.mark.parametrize("method", ["mask_lora+norms", "mask_lora+biases+norms", "scale_lora+biases", "head+norms"])
@pytest.mark.parametrize("family", [*FAMILIES, "neox"])
def test_saved_and_loaded_is_trained(family: str, method: str, tmp_path: Path) -> None:
    if "head" in method and family not in UNTIED:
        pytest.skip("the head is tied")
    model, masks = sparse_model(family)
    prepared = prepare_perp(model, method, masks, r=4, task_type="CAUSAL_LM" if family in CAUSAL else None)
    steps(prepared)
    expected, trained = logits(prepared), snapshot(prepared)
    prepared.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse_model(family)[0], tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    again = PeftModel.from_pretrained(sparse_model(family)[0], tmp_path, is_trainable=True)
    assert trainable_share(again) == trainable_share(prepared)
    one, other = merge_perp(prepared), merge_perp(loaded)
    torch.testing.assert_close(logits(one), expected, rtol=1e-4, atol=1e-5)
    merged, from_file = snapshot(one), snapshot(other)
    assert all(same(merged[name], from_file[name]) for name in merged)
    for group in set(parse_method(method).groups) - {"head"}:
        for name in group_parameters(one, group):
            stem, _, leaf = name.rpartition(".")
            found = [value for key, value in trained.items() if key in (name, f"{stem}.modules_to_save.default.{leaf}")]
            assert any(same(merged[name], value) for value in found), f"{name} is not what was trained"


def test_the_head_is_saved_as_factors(tmp_path: Path) -> None:
    model, masks = sparse_model("llama")
    prepared = prepare_perp(model, "mask_lora+head", masks, r=4)
    prepared.save_pretrained(tmp_path, save_embedding_layers=False)
    full = sum(tensor.numel() for tensor in snapshot(model).values())
    share = trainable_share(prepared)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * share.trainable + 20_000 < 4 * full


def test_norms_of_several_adapters() -> None:
    """Each adapter has its own norms; switching changes all of it, and the one that is active is merged."""
    model, masks = sparse_model("llama")
    prepared = prepare_perp(model, "mask_lora+norms", masks, r=4)
    steps(prepared)
    first = logits(prepared)
    norms = [name.rpartition(".")[0] for name in declared(sparse_model("llama")[0], "llama", "norms")]
    prepared.add_adapter("second", MaskLoraConfig(r=2, masks=masks, modules_to_save=norms))
    prepared.set_adapter("second")
    steps(prepared, count=3)
    second = logits(prepared)
    assert not torch.equal(first, second)
    prepared.set_adapter("default")
    assert torch.equal(logits(prepared), first)
    prepared.set_adapter("second")
    merged = merge_perp(prepared)
    torch.testing.assert_close(logits(merged), second, rtol=1e-4, atol=1e-5)
    masks.verify(merged)


# -- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["norms", "mask_lora+embeddings", "mask_lora+norms"])
def test_half_precision_needs_autocast(method: str) -> None:
    model, masks = sparse_model("llama", dtype=torch.bfloat16)
    prepared = prepare_perp(model, method, masks, r=4)
    with pytest.raises(RuntimeError, match=r"in a bfloat16 model, which runs under autocast only; train with bf16"):
        prepared(**tiny_batch(prepared))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prepared(**tiny_batch(prepared)).loss.backward()
    merged = merge_perp(prepared)
    assert torch.isfinite(logits(merged)).all(), "the merged model runs without autocast"
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_adapters_without_groups_need_no_autocast() -> None:
    model, masks = sparse_model("llama", dtype=torch.bfloat16)
    prepare_perp(model, "mask_lora+head", masks, r=4)(**tiny_batch(model)).loss.backward()


def test_small_steps_are_not_lost_in_half_precision() -> None:
    """Steps of 1e-4 on weights of 1 add up in fp32; in bf16 each would be rounded away."""
    model, masks = sparse_model("llama", dtype=torch.bfloat16)
    prepared = prepare_perp(model, "norms", masks)
    optimizer = torch.optim.AdamW([p for p in prepared.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)
    for _ in range(60):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            prepared(**tiny_batch(prepared)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (merge_perp(prepared).model.norm.weight != 1).any()


def test_loaded_in_half_precision_merges_to_the_same(tmp_path: Path) -> None:
    model, masks = sparse_model("opt", dtype=torch.bfloat16)
    prepared = prepare_perp(model, "mask_lora+biases+norms", masks, r=4)
    steps(prepared, dtype=torch.bfloat16)
    prepared.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(sparse_model("opt", dtype=torch.bfloat16)[0], tmp_path)
    one, other = snapshot(merge_perp(prepared)), snapshot(merge_perp(loaded))
    assert list(one) == list(other)
    assert all(same(one[name], other[name]) for name in one)


def test_a_copy_of_a_prepared_model_trains_like_it() -> None:
    model, masks = sparse_model("llama", dtype=torch.bfloat16)
    prepared = prepare_perp(model, "mask_lora+norms", masks, r=4)
    twin = copy.deepcopy(prepared)
    for one in (prepared, twin):
        steps(one, dtype=torch.bfloat16)
    one, other = snapshot(merge_perp(prepared)), snapshot(merge_perp(twin))
    assert all(same(one[name], other[name]) for name in one)


# -- Trainer ---------------------------------------------------------------------------------------------------------


def trainer(model: nn.Module, masks: MaskSet, directory: Path, **more: Any) -> Trainer:
    """A Trainer on the CPU with checkpoints every two steps."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (16, 12), generator=generator)
    arguments = TrainingArguments(
        str(directory), use_cpu=True, max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        weight_decay=0.1, seed=0, report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=[MaskCallback(masks)])


RUNS = [
    ("llama", "norms", torch.float32),
    ("opt", "biases", torch.bfloat16),
    ("llama", "mask_lora+norms", torch.float32),
    ("opt", "mask_lora+biases+norms", torch.bfloat16),
    ("llama", "head+norms", torch.float32),
    ("bert", "biases+norms", torch.float32),
    ("t5", "norms", torch.float32),
    ("bert", "scale_lora+biases+norms", torch.float32),
    ("t5", "mask_lora+norms", torch.float32),
    ("mixtral", "scale_lora+norms+head", torch.bfloat16),
]


@pytest.mark.parametrize(("family", "method", "dtype"), RUNS)
def test_resumed_is_straight(family: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def run(directory: Path, resume: str | None) -> dict[str, Tensor]:
        model, masks = sparse_model(family, dtype=dtype)
        torch.manual_seed(5)
        prepared = prepare_perp(model, method, masks, r=4, task_type="CAUSAL_LM" if family in CAUSAL else None)
        one = trainer(prepared, masks, directory, bf16=dtype == torch.bfloat16)
        one.train(resume_from_checkpoint=resume)
        merged = merge_perp(one.model)
        masks.verify(merged)
        return snapshot(merged)

    straight = run(tmp_path / "straight", None)
    resumed = run(tmp_path / "resumed", str(tmp_path / "straight" / "checkpoint-2"))
    assert list(straight) == list(resumed)
    assert all(same(straight[name], resumed[name]) for name in straight)
    unchanged = snapshot(sparse_model(family, dtype=dtype)[0])
    assert any(not same(straight[name], unchanged[name]) for name in straight)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["biases", "norms", "embeddings", "head", "mask_lora+norms"])
def test_activation_checkpointing_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, masks = sparse_model("opt" if method == "biases" else "llama")
        model.enable_input_require_grads()
        torch.manual_seed(5)
        prepared = prepare_perp(model, method, masks, r=4).train()
        for module in prepared.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared(**tiny_batch(model)).loss.backward()
        trained = {name: p.grad for name, p in prepared.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in trained.values())
        gradients.append(trained)
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=1e-5, atol=1e-7)
