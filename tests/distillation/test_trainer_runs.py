"""Whole runs with a teacher: what is run how often, what stays in memory, resuming, zeros, 16 bits."""

from __future__ import annotations

import copy
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.sparse_models import pruned, snapshot
from adapters.wide_models import WIDE
from distillation.runs import (
    CHECKPOINTING,
    Rows,
    Run,
    assert_bits,
    assert_same,
    gradients,
    lively,
    padding,
    terms,
    total,
    train,
    without_dropout,
)
from tiny_models import TINY, VOCABULARY
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from training.steps import pruned_are_positive_zero
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

from sparse_ft.adapters import merge_perp, prepare_perp
from sparse_ft.distillation import DistillationConfig
from sparse_ft.training import MaskCallback

ALL = DistillationConfig(ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0)
FIXED = DistillationConfig(kl_weight=0.5, squarehead_weight=0.3, energy="fixed", energy_samples=5)
LENGTHS = (5, 14, 4, 20, 9, 12, 6, 3)


def llama(layers: int, seed: int = 0, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return lively(LlamaForCausalLM(config))


# -- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_teacher_runs_once_per_micro_batch(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """In eval mode and without gradients, its head for one token of each row; never in evaluation."""
    student, teacher, calls, heads = lively(name), TINY[name](1).train(), Counter[str](), list[int]()

    def called(module: nn.Module, args: Any, output: Any) -> None:
        assert not torch.is_grad_enabled() and not any(m.training for m in module.modules())
        calls["teacher"] += 1

    teacher.register_forward_hook(called)
    teacher.lm_head.register_forward_hook(lambda module, args, output: heads.append(output.shape[1]))
    more: dict[str, Any] = {CHECKPOINTING: True} if checkpointing else {}
    run = train(
        student, tmp_path, ALL, teacher, data=Rows(LENGTHS), max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=1, **more,
        trainer={"eval_dataset": Rows(LENGTHS, seed=3)},
    )  # fmt: skip
    assert len(run.logged("eval_loss")) == 3
    assert calls["teacher"] == 3 * 2 and heads == [1] * 6
    plain = train(lively(name), tmp_path, ALL, lively_copy(teacher), data=Rows(LENGTHS), max_steps=3,
                  per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    for step, wanted in enumerate(plain.gradients):
        assert_same(run.gradients[step], wanted, 1e-6)


def lively_copy(teacher: PreTrainedModel) -> PreTrainedModel:
    found = copy.deepcopy(teacher)
    for module in found.modules():
        module._forward_hooks.clear()
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool, tmp_path: Path) -> None:
    """Compared layers are heard once, outside of what is computed again in backward."""
    more = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    runs = [train(lively("llama"), tmp_path, ALL, lively("llama", 1), **extra) for extra in ({}, more)]
    assert_same(runs[1].gradients[0], runs[0].gradients[0], 1e-6)
    assert runs[1].distill == runs[0].distill


@pytest.mark.parametrize("config", [ALL, FIXED], ids=["batch", "fixed"])
def test_one_layer_of_the_teacher_is_alive_at_a_time(config: DistillationConfig, tmp_path: Path) -> None:
    """Beside the output of a layer only the one before, which is its input."""
    student, teacher, states, most = llama(5), llama(5, 1), list[StorageWeakRef](), Counter[int]()

    def alive(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(StorageWeakRef(output.untyped_storage()))
        most[sum(not state.expired() for state in states)] += 1

    for block in teacher.model.layers:
        block.register_forward_hook(alive)
    train(student, tmp_path, config, teacher, data=Rows(LENGTHS), per_device_train_batch_size=2, max_steps=2)
    assert len(states) >= 10 and max(most) == 2
    assert all(state.expired() for state in states)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is as large as they are, neither forward nor backward; the head itself is a fourth of that."""
    size, batch, length = 1500, 8, 16
    monkeypatch.setattr("sparse_ft.distillation.kl.LOGITS_PER_CHUNK", 16 * size)
    found = []
    for extra in ({}, {"compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.float().mean()}):
        student, teacher = (llama(2, seed, vocabulary=size) for seed in (0, 1))
        with Largest() as largest:
            train(student, tmp_path, ALL, teacher, data=Rows((length,) * batch), per_device_train_batch_size=batch,
                  trainer=extra)  # fmt: skip
        found.append(largest.numel)
    assert found[1] >= batch * length * size == 4 * found[0]


def test_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    """Invariant 7: not trained, not optimized, not saved."""
    teacher = lively("llama", 1).train()
    before = snapshot(teacher)
    saved = dict(max_steps=3, optim="adamw_torch", save_strategy="steps", save_steps=3)
    run = train(lively("llama"), tmp_path / "taught", ALL, teacher, data=Rows(LENGTHS), **saved)
    assert_bits(snapshot(teacher), before)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules()) and run.trainer.model.training
    held = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert held and not held & {id(p) for p in teacher.parameters()}
    train(lively("llama"), tmp_path / "alone", None, data=Rows(LENGTHS), **saved)
    sizes = [
        {path.name: path.stat().st_size for path in (tmp_path / which / "checkpoint-3").iterdir()}
        for which in ("taught", "alone")
    ]
    assert sizes[0].keys() == sizes[1].keys()
    for name in ("model.safetensors", "optimizer.pt"):
        assert sizes[0][name] == sizes[1][name]


# -- resuming --------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("config", [ALL, FIXED], ids=["batch", "fixed"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resumed_is_straight(config: DistillationConfig, name: str, tmp_path: Path) -> None:
    """Bit for bit, with the student's dropout and a mask; the logs go on as well."""
    runs: dict[str, Run] = {}
    for directory, stop, resume in (("straight", 4, None), ("cut", 2, None), ("cut", 4, "cut/checkpoint-2")):
        student, masks = pruned(TINY[name]())
        runs[f"{directory} {resume}"] = train(
            student, tmp_path / directory, config, lively(name, 1), data=Rows(LENGTHS), max_steps=4,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="adamw_torch",
            lr_scheduler_type="linear", save_strategy="steps", save_steps=2,
            callbacks=[MaskCallback(masks), StopAt(stop)], resume=None if resume is None else str(tmp_path / resume),
        )  # fmt: skip
    straight, resumed = runs["straight None"], runs["cut cut/checkpoint-2"]
    assert_bits(snapshot(resumed.trainer.model), snapshot(straight.trainer.model))
    assert len(straight.distill) == 4 and straight.distill == resumed.distill


# -- zeros -----------------------------------------------------------------------------------------------------------

METHODS = ["mask_lora", "mask_lora+norms+head", "norms+biases", "scale_lora+head"]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_full_fine_tuning_keeps_every_zero(name: str, tmp_path: Path) -> None:
    """Invariant 10: after each step, bit for bit; the student comes nearer to its dense teacher."""
    teacher = lively(name)
    student, masks = pruned(lively(name))
    exact = list[bool]()

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            exact.append(pruned_are_positive_zero(student, masks))

    run = train(
        student, tmp_path, DistillationConfig(kl_weight=1.0, squarehead_weight=1.0), teacher, data=Rows(LENGTHS),
        max_steps=30, optim="adamw_torch", learning_rate=2e-3, weight_decay=0.1,
        callbacks=[MaskCallback(masks), Look()],
    )  # fmt: skip
    assert exact == [True] * 30
    masks.verify(student)
    assert run.distill[-1]["distill/squarehead"] < 0.9 * run.distill[0]["distill/squarehead"]


@pytest.mark.filterwarnings("ignore:.*has no biases")
@pytest.mark.parametrize("method", METHODS)
def test_perp_learns_from_a_teacher(method: str, tmp_path: Path) -> None:
    """The gradient of each part is the formula's, also through LoRA on the head; merged is unmerged, zeros stay."""
    name, rows = ("opt" if "biases" in method else "llama"), Rows(LENGTHS)
    teacher = lively(name)
    base, masks = pruned(lively(name))
    torch.manual_seed(0)
    student = without_dropout(prepare_perp(base, method, masks, r=4))
    with torch.no_grad():
        for key, parameter in student.named_parameters():
            if "lora_B" in key:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    loss = total(terms(student, teacher, padding()(list(rows)), ALL), ALL)  # type: ignore[call-overload]
    expected = gradients(student, loss)
    assert len(expected) > 2
    run = train(student, tmp_path, ALL, teacher, data=rows, per_device_train_batch_size=8, max_steps=2,
                callbacks=[MaskCallback(masks)])  # fmt: skip
    assert run.logged("loss")[0] == pytest.approx(loss.item(), rel=1e-5)
    assert_same(run.gradients[0], expected)
    batch = {key: value for key, value in padding()(list(rows)).items() if key != "labels"}  # type: ignore[call-overload]
    student.eval()
    with torch.no_grad():
        unmerged = student(**batch).logits
        merged = merge_perp(student)
        torch.testing.assert_close(merged(**batch).logits, unmerged, rtol=1e-4, atol=1e-4)
    masks.verify(merged)
    assert pruned_are_positive_zero(merged, masks)


# -- 16 bits and fewer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen", "t5"])
def test_bf16_autocast_is_fp32_up_to_its_rounding(name: str, tmp_path: Path) -> None:
    runs = [train(lively(name), tmp_path, ALL, lively(name, 1), bf16=bf16) for bf16 in (False, True)]
    fp32, bf16 = (run.distill[0] for run in runs)
    assert fp32.keys() == bf16.keys() and fp32 != bf16
    assert bf16 == pytest.approx(fp32, rel=0.03)
    assert_same(runs[1].gradients[0], runs[0].gradients[0], 0.15)
    assert all(gradient.dtype == torch.float32 for gradient in runs[1].gradients[0].values())


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16], ids=["fp32 student", "bf16 student"])
def test_teacher_in_bfloat16(student_dtype: torch.dtype, tmp_path: Path) -> None:
    """From a directory; close to the fp32 teacher's losses."""
    lively("llama", 1).save_pretrained(tmp_path / "teacher")
    found = []
    for dtype in ("float32", "bfloat16"):
        config = copy.copy(ALL)
        config.teacher, config.teacher_dtype = str(tmp_path / "teacher"), dtype
        run = train(lively("llama").to(student_dtype), tmp_path, config)
        teacher = run.trainer.distiller.model
        assert teacher.dtype == getattr(torch, dtype) and not any(p.requires_grad for p in teacher.parameters())
        found.append(run.distill[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_teacher(bits: str, tmp_path: Path) -> None:
    """Loaded in a few bits it is near the dense student it was, but not equal, and learnt from."""
    lively(WIDE["llama"]()).save_pretrained(tmp_path / "teacher")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "teacher")
    config = DistillationConfig(
        kl_weight=1.0, squarehead_weight=1.0, teacher=str(tmp_path / "teacher"), teacher_quantization=bits
    )
    run = train(dense, tmp_path, config, max_steps=3, data=Rows(LENGTHS))
    assert run.trainer.distiller.model.is_quantized
    assert 0 < run.distill[0]["distill/squarehead"] < (0.05 if bits == "8bit" else 0.5)
    assert 0 < run.distill[0]["distill/kl"] < 0.5
    assert all(torch.isfinite(g).all() for step in run.gradients for g in step.values())
