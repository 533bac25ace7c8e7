"""Optimizers that mix elements, hold moments in 8 bits, decay hard or are averaged: zeros exact after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training.steps import AtEachStep, copies, pruned_are_positive_zero
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainerCallback

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights
from sparse_ft.training import MaskCallback

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
MakeTrainer = Callable[..., Trainer]

#: bitsandbytes holds the moments of smaller tensors in 32 bits
SMALLEST_IN_8_BITS = 4096


def wide_sparse_model() -> tuple[PreTrainedModel, MaskSet]:
    """A Llama whose masked weights are large enough for 8-bit moments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = named_weights(model)
    scores = {target.name: weights[target.name].detach().abs() for target in find_targets(model)}
    masks = MaskSet.from_scores(scores, sparsity=0.6).apply_(model)
    assert all(total >= SMALLEST_IN_8_BITS for _, total in masks.counts().values())
    return model, masks


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition: every entry of the result depends on every entry of the matrix."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


class ExactMuon(torch.optim.Optimizer):
    """Muon with an exact decomposition: momentum, then its nearest orthogonal matrix; vectors by their sign."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float = 0.02, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalized(average) if parameter.ndim == 2 else average.sign()
                parameter.add_(update, alpha=-group["lr"])


class AllMatricesByMuon(torch.optim.Optimizer):
    """torch's Muon takes matrices only; AdamW takes the rest, as its authors advise. One optimizer for the Trainer."""

    def __init__(self, model: PreTrainedModel) -> None:
        parameters = list(model.parameters())
        super().__init__(parameters, {"lr": 0.02})
        matrices = [p for p in parameters if p.ndim == 2]
        self.parts = [
            torch.optim.Muon(matrices, lr=0.02, weight_decay=0.5),
            torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=0.01),
        ]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


OPTIMIZERS: dict[str, Callable[[PreTrainedModel], torch.optim.Optimizer]] = {
    "exact Muon": lambda model: ExactMuon(model.parameters()),
    "torch's Muon": AllMatricesByMuon,
    "AdamW, strong decay": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=10.0),
    "Adam, decay in the gradient": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=10.0),
    "SGD, Nesterov": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.3, momentum=0.95, nesterov=True, weight_decay=0.1
    ),
    "SGD, damped": lambda model: torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, dampening=0.5),
    "Adam, amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True),
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True, weight_decay=1.0),
    "AdamW, one by one": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adafactor": {"optim": "adafactor"},
    "adafactor, relative step": {
        "optim": "adafactor",
        "optim_args": "scale_parameter=True,relative_step=True,warmup_init=False,lr=None",
    },
    "adafactor, momentum": {"optim": "adafactor", "optim_args": "beta1=0.9"},
}
EIGHT_BIT = ("adamw_bnb_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")


def assert_zero_at_each_step(
    model: PreTrainedModel, masks: MaskSet, make: MakeTrainer, optimizers: Any = (None, None), **arguments: Any
) -> Trainer:
    before, exact = copies(model), []
    watch = AtEachStep(lambda model: exact.append(pruned_are_positive_zero(model, masks)))
    trainer = make(model, [watch, MaskCallback(masks)], optimizers=optimizers, **arguments)
    trainer.train()
    assert exact == [True] * 6
    moved = sum(int((weight != before[name]).sum()) for name, weight in copies(model).items() if name in masks)
    assert moved > 0.9 * sum(kept for kept, _ in masks.counts().values()), "the live weights did not train"
    return trainer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_are_exact_after_each_step(name: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    assert_zero_at_each_step(model, masks, make_trainer, (OPTIMIZERS[name](model), None))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_zeros_are_exact_with_adafactor(name: str, sparse_model: SparseModel, make_trainer: MakeTrainer) -> None:
    model, masks = sparse_model()
    assert_zero_at_each_step(model, masks, make_trainer, **ARGUMENTS[name])


@pytest.mark.parametrize("kind", [ExactMuon, torch.optim.Muon])
def test_muon_alone_revives_pruned_weights(kind: Any, sparse_model: SparseModel) -> None:
    """What the masking after the step is for: the gradient is masked and the update is dense all the same."""
    model, masks = sparse_model()
    name = "model.layers.0.mlp.up_proj.weight"
    weight = named_weights(model)[name]
    weight.grad = torch.randn_like(weight) * masks[name]
    kind([weight], lr=0.02).step()
    assert int((weight.detach()[~masks[name]] != 0).sum()) > 0.9 * int((~masks[name]).sum())


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_zeros_are_exact_with_moments_in_8_bits(optim: str, make_trainer: MakeTrainer) -> None:
    pytest.importorskip("bitsandbytes")
    model, masks = wide_sparse_model()
    trainer = assert_zero_at_each_step(model, masks, make_trainer, optim=optim)
    weight = named_weights(model)[next(iter(masks))]
    state = trainer.optimizer.optimizer.state[weight]
    assert any(getattr(value, "dtype", None) == torch.uint8 for value in state.values()), (
        "the moments are not in 8 bits"
    )


# -- averages of the weights -------------------------------------------------------------------------------------------


class Averaging(TrainerCallback):
    """What a user of `torch.optim.swa_utils` writes."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.averaged = AveragedModel(model, **options)

    def on_step_end(self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        self.averaged.update_parameters(model)


@pytest.mark.parametrize(
    "options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.7)}], ids=["equal weights", "exponential"]
)
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_an_average_of_the_weights_is_masked(
    options: dict[str, Any], optim: str, sparse_model: SparseModel, make_trainer: MakeTrainer
) -> None:
    model, masks = sparse_model()
    averaging, exact = Averaging(model, **options), []
    watch = AtEachStep(lambda model: exact.append(pruned_are_positive_zero(averaging.averaged.module, masks)))
    make_trainer(model, [averaging, watch, MaskCallback(masks)], optim=optim).train()
    assert exact == [True] * 6
    name = next(iter(masks))
    average, last = (named_weights(m)[name].detach() for m in (averaging.averaged.module, model))
    assert not torch.equal(average, last), "nothing was averaged"
    masks.verify(averaging.averaged)  # the wrapper's names are the model's


def test_the_average_that_trl_saves_is_masked(
    sparse_model: SparseModel, make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    from trl import BEMACallback

    model, masks = sparse_model()
    make_trainer(model, [BEMACallback(update_freq=1), MaskCallback(masks)], optim="adafactor").train()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "run" / "bema")
    masks.verify(saved)
    name = next(iter(masks))
    assert not torch.equal(named_weights(saved)[name], named_weights(model)[name])
