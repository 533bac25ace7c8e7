"""Real `Trainer` runs on tiny models: pruned weights stay exactly zero and live weights train as if alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import TINY
from training.steps import AtEachStep, RowMixer, copies, pruned_are_positive_zero
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sparse_ft.masks import MaskSet, keep_bits, mask_
from sparse_ft.models import named_weights
from sparse_ft.training import MaskCallback
from sparse_ft.training.mask_callback import ELEMENTWISE_OPTIMIZERS, base_optimizer, keeps_zeros

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]

# -- the masking itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("transposed", [False, True])
def test_mask_clears_pruned_and_keeps_every_bit_of_the_rest(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(33, 17, generator=generator)
    values[0, :6] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-40, -1e-8])
    values[1, :6] = values[0, :6]
    mask = torch.rand(33, 17, generator=generator) < 0.5
    mask[0, :6], mask[1, :6] = True, False
    tensor = values.to(dtype)
    expected = [
        bits if keep else 0
        for bits, keep in zip(tensor.view(integer_of(dtype)).flatten().tolist(), mask.flatten().tolist(), strict=True)
    ]
    if transposed:
        tensor, mask = tensor.T.contiguous().T, mask.T.contiguous().T
    mask_(tensor, keep_bits(mask))
    assert tensor.contiguous().view(integer_of(dtype)).flatten().tolist() == expected


def integer_of(dtype: torch.dtype) -> torch.dtype:
    return {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[dtype.itemsize]


# -- zeros stay --------------------------------------------------------------------------------------------------------

# transformers for Python 3.10 has the older name only
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "accumulation": {"gradient_accumulation_steps": 4},
    "clipping": {"max_grad_norm": 1e-3},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16 autocast": {"bf16": True},
    "activation checkpointing": {CHECKPOINTING: True},
    "checkpointing, reentrant": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    "sgd with momentum": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optim": "rmsprop"},
    "fused adamw": {"optim": "adamw_torch_fused"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "epsilon zero": {"adam_epsilon": 0.0},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_zeros_survive_every_step(case: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    if case == "epsilon zero":  # Adam divides 0 by 0 for tokens that do not occur
        model.get_input_embeddings().requires_grad_(False)
    before, exact = copies(model), []
    watch = AtEachStep(lambda model: exact.append(pruned_are_positive_zero(model, masks)))
    make_trainer(model, [watch, MaskCallback(masks)], **ARGUMENTS[case]).train()
    assert exact == [True] * 6
    moved = sum(int((weight != before[name]).sum()) for name, weight in copies(model).items() if name in masks)
    kept = sum(kept for kept, _ in masks.counts().values())
    if case != "epsilon zero":
        assert moved > 0.9 * kept, "the live weights did not train"


@pytest.mark.parametrize("name", sorted(TINY))
def test_zeros_survive_in_every_architecture(name: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model(name)
    make_trainer(model, [MaskCallback(masks)], max_steps=3).train()
    assert pruned_are_positive_zero(model, masks)


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_zeros_survive_with_bf16_parameters(optim: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    make_trainer(model.to(torch.bfloat16), [MaskCallback(masks)], optim=optim).train()
    assert next(model.parameters()).dtype == torch.bfloat16
    assert pruned_are_positive_zero(model, masks)


@pytest.mark.parametrize("arguments", [{}, {"optim": "adafactor"}, {"bf16": True}])
def test_without_the_callback_the_zeros_are_lost(
    arguments: dict[str, Any], sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    make_trainer(model, max_steps=2, **arguments).train()
    pruned = sum(total - kept for kept, total in masks.counts().values())
    assert sum(masks.revived(model).values()) > 0.9 * pruned


def test_an_optimizer_that_mixes_elements(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    optimizer = RowMixer(model.parameters())
    make_trainer(model, [MaskCallback(masks)], optimizers=(optimizer, None)).train()
    assert pruned_are_positive_zero(model, masks)


def test_masking_the_gradient_alone_would_not_do_for_it(sparse_model: SparseModel) -> None:
    model, masks = sparse_model()
    weight = named_weights(model)["model.layers.0.mlp.up_proj.weight"]
    weight.grad = torch.randn_like(weight) * masks["model.layers.0.mlp.up_proj.weight"]
    RowMixer([weight]).step()
    assert masks.revived(model)


@pytest.mark.parametrize("kind", sorted(ELEMENTWISE_OPTIMIZERS, key=lambda kind: kind.__name__))
def test_listed_optimizers_keep_zeros_with_masked_gradients_only(kind: type[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(20, 30, generator=generator) < 0.4
    weight = torch.nn.Parameter(torch.randn(20, 30, generator=generator) * mask)
    options: dict[str, Any] = {"lr": 0.1}
    if kind is not torch.optim.Rprop:
        options["weight_decay"] = 0.1
    if kind in (torch.optim.SGD, torch.optim.RMSprop):
        options["momentum"] = 0.9
    optimizer = kind([weight], **options)
    assert keeps_zeros(optimizer)
    for _ in range(20):
        weight.grad = torch.randn(20, 30, generator=generator) * mask
        optimizer.step()
        assert bool((weight.detach()[~mask] == 0).all())
    assert bool((weight.detach()[mask] != 0).all())


def test_which_optimizers_are_masked_after_the_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))

    class MyAdam(torch.optim.AdamW):
        pass

    assert keeps_zeros(torch.optim.AdamW([weight]))
    assert not keeps_zeros(MyAdam([weight])), "a subclass may do anything"
    assert not keeps_zeros(torch.optim.AdamW([weight], eps=0.0))
    half = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    assert not keeps_zeros(torch.optim.AdamW([half], eps=1e-8)), "1e-8 is 0 in float16"
    assert not keeps_zeros(RowMixer([weight]))
    with pytest.raises(ValueError, match=r"torch\.optim\.Optimizer, got int"):
        base_optimizer(3)


# -- live weights train as if alone ------------------------------------------------------------------------------------


def reference_run(model: PreTrainedModel, masks: MaskSet, batches: list[Any], *, clip: float) -> list[float]:
    """Textbook loop: sum the gradient of the mean loss, multiply by the mask, clip by hand, AdamW by hand."""
    weights = {name: weight for name, weight in named_weights(model).items() if weight.requires_grad}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for step, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        gradients = {n: g * masks[n] if n in masks else g for n, g in gradients.items()}
        norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in gradients.values()))
        norms.append(norm)
        scale = min(1.0, clip / (norm + 1e-6))
        for name, weight in weights.items():
            gradient = gradients[name] * scale
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            decay = 0.1 if weight.ndim > 1 else 0.0
            with torch.no_grad():
                weight.copy_(weight - 1e-2 * decay * weight - 1e-2 * update)
    return norms


class Recorder:
    """What the Trainer gave the model, in its order."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def hook(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.batches.append(dict(kwargs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_live_weights_follow_an_independent_loop(
    name: str, sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model(name)
    for dropout in [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]:
        dropout.p = 0.0
    recorder = Recorder()
    handle = model.register_forward_pre_hook(recorder.hook, with_kwargs=True)
    trainer = make_trainer(model, [MaskCallback(masks)], max_grad_norm=0.5, adam_epsilon=1e-8)
    trainer.train()
    handle.remove()
    reference, _ = sparse_model(name)
    reference.eval()
    norms = reference_run(reference, masks, recorder.batches, clip=0.5)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=2e-3), "the norm that clips must be the live gradients' own"
    expected = named_weights(reference)
    differences = torch.cat([(w.detach() - expected[n]).abs().flatten() for n, w in named_weights(model).items()])
    # Adam divides a gradient by its own size: where gradients are rounding errors, single weights may part.
    assert float(differences.detach().quantile(0.999)) < 1e-4
    assert float(differences.detach().mean()) < 1e-5


def test_the_clipped_norm_is_the_live_gradients(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    """At the very moment of the step: norm(live) == max_grad_norm and nothing is left at pruned places."""
    model, masks = sparse_model(sparsity=0.9)
    seen: list[tuple[float, float]] = []

    def look(model: PreTrainedModel) -> None:
        weights = named_weights(model)
        every = math.sqrt(sum(float(w.grad.double().pow(2).sum()) for w in weights.values()))  # type: ignore[union-attr]
        dead = sum(float(weights[n].grad[~mask].abs().sum()) for n, mask in masks.items())  # type: ignore[index]
        seen.append((every, dead))

    watch = AtEachStep(look, event="on_pre_optimizer_step")
    make_trainer(model, [watch, MaskCallback(masks)], max_grad_norm=1e-3).train()
    assert [norm for norm, _ in seen] == pytest.approx([1e-3] * 6, rel=1e-3)
    assert [dead for _, dead in seen] == [0.0] * 6


def test_four_micro_batches_are_one_batch(sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    results = []
    for arguments in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ):
        model, masks = sparse_model()
        make_trainer(model, [MaskCallback(masks)], rows=48, optim="sgd", learning_rate=0.5, **arguments).train()
        results.append(copies(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-4, atol=1e-6)
