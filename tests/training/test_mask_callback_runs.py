"""What MaskCallback refuses, its hooks over several runs, and its checks, saves and logs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY
from training.steps import AtEachStep, RowMixer, copies, pruned_are_positive_zero
from transformers import PreTrainedModel, Trainer, TrainerCallback

from sparse_ft.masks import MaskSet, mask_
from sparse_ft.models import named_weights
from sparse_ft.training import MaskCallback
from sparse_ft.training.mask_callback import _bits_of_trainable, base_optimizer

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]

# -- masks, models, optimizer state ------------------------------------------------------------------------------------


def test_masks_are_taken_from_the_zeros(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    callback = MaskCallback()
    make_trainer(model, [callback]).train()
    assert callback.masks == masks
    masks.verify(model)


def test_a_dense_model_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="The model is dense"):
        make_trainer(TINY["llama"](), [MaskCallback()]).train()


def test_masks_of_another_shape_are_refused_before_the_first_step(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, _ = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    before = copies(model)
    wrong = MaskSet({name: torch.ones(8, 32, dtype=torch.bool)})
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(8, 32\) but the weight has \(48, 32\)"):
        make_trainer(model, [MaskCallback(wrong)]).train()
    with pytest.raises(ValueError, match=r"no tensor 'transformer\.h\.0"):
        make_trainer(model, [MaskCallback(sparse_model("gpt2")[1])]).train()
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items())


def test_a_weight_revived_before_training_is_refused(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = named_weights(model)[name].detach()
    weight[tuple((~masks[name]).nonzero()[0])] = 0.5
    with pytest.raises(RuntimeError, match=rf"1 pruned weights in 1 tensors .* 1 in '{name}'.*masks\.apply_\(model\)"):
        make_trainer(model, [MaskCallback(masks)]).train()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, RowMixer])
def test_left_over_moments_do_not_revive(
    kind: type[torch.optim.Optimizer], sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    """State of a run without masks, as a resumed or reused optimizer has it."""
    model, masks = sparse_model()
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.01, **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    masks.apply_(model)
    make_trainer(model, [MaskCallback(masks)], optimizers=(optimizer, None)).train()
    assert pruned_are_positive_zero(model, masks)


def test_non_finite_gradients_of_pruned_weights_are_nothing(
    sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    dead = torch.where(masks[name], 0.0, math.inf)
    handle = named_weights(model)[name].register_hook(lambda gradient: gradient + dead)
    make_trainer(model, [MaskCallback(masks)]).train()
    handle.remove()
    assert pruned_are_positive_zero(model, masks)
    assert all(bool(weight.isfinite().all()) for weight in copies(model).values())


def test_kept_weights_that_are_zero_train(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    """The mask is the truth, not the zeros: a kept weight that is zero by chance is no pruned weight."""
    model, masks = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    places = masks[name].nonzero()[:10]
    weight = named_weights(model)[name].detach()
    weight[places[:, 0], places[:, 1]] = 0.0
    trainer = make_trainer(model, [MaskCallback(masks)])
    trainer.train()
    assert bool((weight[places[:, 0], places[:, 1]] != 0).all())
    total = sum(total for _, total in masks.counts().values())
    assert masks.surprises(model) == {}
    first = trainer.state.log_history[0]
    assert first["sparsity/total"] == pytest.approx(masks.sparsity()) and first["sparsity/kept_zero"] == 0
    assert total > 0


# -- hooks -------------------------------------------------------------------------------------------------------------


def count_hooks(model: PreTrainedModel) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_one_callback_serves_two_runs(optim: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    trainer = make_trainer(model, [MaskCallback(masks)], optim=optim)
    for _ in range(2):
        trainer.train()
        assert count_hooks(model) == 0
        assert not base_optimizer(trainer.optimizer)._optimizer_step_post_hooks
        assert pruned_are_positive_zero(model, masks)


def test_one_hook_per_live_sparse_weight(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    frozen, dense = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    named_weights(model)[frozen].requires_grad_(False)
    masks = MaskSet({name: torch.ones_like(mask) if name == dense else mask for name, mask in masks.items()})
    counts: list[int] = []
    steps: list[int] = []
    trainer = make_trainer(model, [AtEachStep(lambda model: counts.append(count_hooks(model))), MaskCallback(masks)])
    watch = AtEachStep(lambda model: steps.append(len(base_optimizer(trainer.optimizer)._optimizer_step_post_hooks)))
    trainer.add_callback(watch)
    trainer.train()
    assert counts == [len(masks) - 2] * 6
    assert steps == [0] * 6, "AdamW needs no masking after the step"


def test_hooks_after_an_exception(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()

    def fail(model: PreTrainedModel) -> None:
        raise KeyboardInterrupt

    callback = MaskCallback(masks)
    breaker = AtEachStep(fail)
    trainer = make_trainer(model, [callback, breaker])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hooks = count_hooks(model)
    assert hooks == len(masks)
    trainer.remove_callback(breaker)
    trainer.train()
    assert count_hooks(model) == 0
    trainer.add_callback(breaker)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert count_hooks(model) == hooks
    trainer.remove_callback(callback)
    del callback
    assert count_hooks(model) == 0, "hooks must not outlive their callback"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_held_while_training_have_the_weights_width_on_the_cpu(dtype: torch.dtype) -> None:
    weight = torch.nn.Linear(32, 8, bias=False, dtype=dtype)
    model = torch.nn.Sequential(weight)
    mask = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)) < 0.5
    ((parameter, bits),) = _bits_of_trainable(MaskSet({"0.weight": mask}), model)
    assert parameter is weight.weight
    assert bits.element_size() == dtype.itemsize
    assert torch.equal(bits != 0, mask)
    for narrow in (torch.float32, torch.bfloat16):  # a gradient or moment of another width than the weight
        values = torch.full((8, 32), math.nan, dtype=narrow)
        mask_(values, bits)
        assert torch.equal(values.isnan(), mask) and bool((values[~mask] == 0).all())


def test_shared_weights_are_masked_once(make_trainer: MakeTrainer) -> None:
    model = TINY["llama"]()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    name = "model.layers.0.mlp.up_proj.weight"
    masks = MaskSet.from_scores({name: named_weights(model)[name].detach().abs()}, sparsity=0.5).apply_(model)
    counts: list[int] = []
    watch = AtEachStep(lambda model: counts.append(count_hooks(model)))
    make_trainer(model, [watch, MaskCallback(masks)]).train()
    assert counts == [1] * 6
    assert layers[1].mlp.up_proj.weight is layers[0].mlp.up_proj.weight
    masks.verify(model)


@pytest.mark.slow
def test_compiled_model(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    make_trainer(model, [MaskCallback(masks)], max_steps=2, torch_compile_backend="aot_eager").train()
    assert pruned_are_positive_zero(model, masks)


def test_a_model_the_user_compiled(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    compiled = torch.compile(model, backend="eager")
    trainer = make_trainer(model, [callback := MaskCallback(masks)])
    callback.on_train_begin(
        trainer.args, trainer.state, trainer.control, model=compiled, optimizer=torch.optim.AdamW(model.parameters())
    )
    assert count_hooks(model) == len(masks)
    callback.remove_hooks()


# -- checks, saves, logs -----------------------------------------------------------------------------------------------


class Vandal(TrainerCallback):
    """Writes into a pruned weight at one step, as a faulty callback would."""

    def __init__(self, masks: MaskSet, step: int) -> None:
        self.masks, self.step = masks, step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            name = next(iter(self.masks))
            named_weights(model)[name].detach()[tuple((~self.masks[name]).nonzero()[0])] = 1e-3


@pytest.mark.parametrize(
    ("step", "arguments", "when"),
    [
        (1, {}, "after step 1"),
        (5, {}, "end of training"),
        (3, {"save_strategy": "steps", "save_steps": 4}, "after step 4"),
        (3, {"eval_strategy": "steps", "eval_steps": 4}, "after step 4"),
        (3, {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, "after step 16"),
    ],
)
def test_a_revived_weight_is_found(
    step: int,
    arguments: dict[str, Any],
    when: str,
    sparse_model: SparseModel,
    make_trainer: MakeTrainer,
    tmp_path: Path,
) -> None:
    model, masks = sparse_model()
    trainer = make_trainer(model, [Vandal(masks, step), MaskCallback(masks)], **arguments)
    with pytest.raises(RuntimeError, match=f"1 pruned weights in 1 tensors are not zero.*{when}"):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*")), "a checkpoint with a revived weight must not be written"


def test_the_best_model_is_checked(sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    model, masks = sparse_model()
    arguments = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "load_best_model_at_end": True,
    }
    trainer = make_trainer(model, [MaskCallback(masks)], **arguments)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert MaskSet.load(best) == masks
    masks.verify(model)

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                dense = TINY["llama"]()
                for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
                    dense.save_pretrained(checkpoint)

    model, _ = sparse_model()
    arguments |= {"max_steps": 7}
    with pytest.raises(RuntimeError, match="at the end of training"):
        make_trainer(model, [MaskCallback(masks), Spoil()], **arguments).train()


class Reporter(TrainerCallback):
    """Stands for TensorBoard and its like: keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_sparsity_is_logged(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model(sparsity=0.7)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    share = pruned / sum(mask.numel() for mask in masks.values())
    reporter = Reporter()
    trainer = make_trainer(model, [MaskCallback(masks), reporter], eval_strategy="steps", eval_steps=3)
    trainer.train()
    for entries in (trainer.state.log_history, reporter.logs):
        assert len(entries) == 6 + 2 + 1
        assert all(entry["sparsity/total"] == pytest.approx(share, abs=1e-9) for entry in entries)
        assert all(entry["sparsity/kept_zero"] == 0 for entry in entries)
    trainer.evaluate()
    assert "sparsity/total" not in trainer.state.log_history[-1], "nothing is measured outside training"


# -- what shards the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["DeepSpeed", "FSDP", "Megatron-LM"])
def test_sharding_is_refused_before_the_first_step(
    strategy: str,
    sparse_model: SparseModel,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, masks = sparse_model()
    before = copies(model)
    trainer = make_trainer(model, [MaskCallback(masks)])
    variable = strategy.replace("Megatron-LM", "Megatron_LM").upper()
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")  # as `accelerate launch` does
    with pytest.raises(ValueError, match=f"run under {strategy}, which shards it; start with plain `python`"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items())
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_model_sharded_when_it_was_loaded_is_refused(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    model.model.norm.weight.placements = ("Shard(0)",)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is sharded among processes"):
        make_trainer(model, [MaskCallback(masks)]).train()
