"""Prune-retrain cycles: masks that only shrink, plain models in between, fresh adapters, and a table of the cycles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from training.steps import copies, pruned_are_positive_zero
from transformers import PreTrainedModel, Trainer

import sparse_ft
from sparse_ft.adapters import merge_perp, prepare_perp
from sparse_ft.evaluation import PerplexityResult, perplexity
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights
from sparse_ft.pruning import prune, prune_retrain
from sparse_ft.training import MaskCallback

MakeTrainer = Callable[..., Trainer]


def batches_for(model: Any) -> Iterator[dict[str, Tensor]]:
    """A generator: what a second pass over it would find is nothing."""
    for seed in range(2):
        yield {k: v for k, v in tiny_batch(model, batch=4, length=16, seed=seed).items() if k != "labels"}


class Retraining:
    """Retrains with the Trainer, as `method` of PERP or in full, and remembers what it was given."""

    def __init__(self, method: str, make_trainer: MakeTrainer, **arguments: Any) -> None:
        self.method, self.make_trainer, self.arguments = method, make_trainer, arguments
        self.masks: list[MaskSet] = []
        self.cycles: list[int] = []
        self.trained: list[set[str]] = []
        self.adapters: list[Tensor] = []

    def __call__(self, model: PreTrainedModel, masks: MaskSet, cycle: int) -> nn.Module | None:
        self.masks.append(masks)
        self.cycles.append(cycle)
        before = copies(model)
        assert pruned_are_positive_zero(model, masks)
        adapted = model if self.method == "full" else prepare_perp(model, self.method, masks, r=4)
        self.adapters += [p.detach().clone() for name, p in adapted.named_parameters() if "lora_B" in name][:1]
        trainer = self.make_trainer(adapted, [MaskCallback(masks)], max_steps=3, **self.arguments)
        trainer.train()
        plain = adapted if self.method == "full" else merge_perp(adapted)
        self.trained.append({name for name, weight in copies(plain).items() if not torch.equal(weight, before[name])})
        return None if self.method == "full" else plain


@pytest.mark.parametrize("how", ["full", "mask_lora", "scale_lora", "mask_lora+norms", "norms"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masks_shrink_and_zeros_stay_through_all_cycles(name: str, how: str, make_trainer: MakeTrainer) -> None:
    model = TINY[name]()
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    retrain = Retraining(how, make_trainer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*second time.*")  # PEFT, when an old adapter is still there
        result = prune_retrain(model, sparsities=[0.3, 0.5, 0.7], retrain=retrain, progress=False)
    assert retrain.cycles == [1, 2, 3]
    first, second, third = retrain.masks
    assert second <= first and third <= second and len({first, second, third}) == 3
    assert result.masks == third and pruned_are_positive_zero(result.model, third)
    for sparsity, masks in zip((0.3, 0.5, 0.7), retrain.masks, strict=True):
        for kept, total in masks.counts().values():
            assert kept == total - round(sparsity * total)
    assert {key: p.requires_grad for key, p in result.model.named_parameters()} == flags
    starts = [B.unique().tolist() for B in retrain.adapters]  # ScaleLoRA starts at 1/sqrt(r), the others at 0
    assert all(start == [0.5 if how == "scale_lora" else 0.0] for start in starts), "each cycle has a fresh adapter"
    if how != "norms":
        assert all(set(retrain.masks[0]) <= trained for trained in retrain.trained), "each cycle trains the weights"
    assert [(c.cycle, c.removed) for c in result.cycles] == [
        (i + 1, sum(round(s * t) - round(r * t) for _, t in first.counts().values()))
        for i, (r, s) in enumerate([(0.0, 0.3), (0.3, 0.5), (0.5, 0.7)])
    ]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "random"])
def test_calibrated_methods_and_patterns(method: str, make_trainer: MakeTrainer) -> None:
    model = TINY["llama"]()
    retrain = Retraining("mask_lora", make_trainer)
    calibration = None if method == "random" else batches_for(model)
    result = sparse_ft.prune_retrain(
        model, patterns=["3:4", "2:4", "1:4"], method=method, calibration=calibration, retrain=retrain, progress=False
    )
    assert [c.pattern for c in result.cycles] == ["3:4", "2:4", "1:4"]
    assert [c.sparsity for c in result.cycles] == pytest.approx([0.25, 0.5, 0.75])
    assert retrain.masks[2] <= retrain.masks[1] <= retrain.masks[0]
    for mask in result.masks.values():
        assert bool((mask.view(mask.shape[0], -1, 4).sum(-1) == 1).all())


def test_the_table_says_what_was_measured(make_trainer: MakeTrainer) -> None:
    model = TINY["llama"]()
    batch = tiny_batch(model, batch=4, length=12, seed=3)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(**batch).loss)

    result = prune_retrain(
        model, sparsities=[0.5, 0.9], retrain=Retraining("full", make_trainer), measure=loss, progress=False
    )
    assert result.cycles[-1].retrained == pytest.approx(loss(result.model))
    again = TINY["llama"]()
    prune(again, sparsity=0.5, progress=False)
    assert result.cycles[0].pruned == pytest.approx(loss(again))
    head, *lines = result.table().splitlines()
    assert head.split() == ["cycle", "pattern", "sparsity", "removed", "pruned", "retrained", "s"]
    assert len(lines) == 2 and "90.00%" in lines[1] and f"{result.cycles[1].retrained:.4g}" in lines[1]


def test_a_perplexity_can_be_measured_and_what_is_no_number_is_refused_at_once() -> None:
    ids = tiny_batch(TINY["llama"](), batch=1, length=48)["input_ids"].view(-1)

    def measure(model: nn.Module) -> PerplexityResult:
        return perplexity(model, ids, sequence_length=16, progress=False)

    def untouched(model: nn.Module, masks: MaskSet, cycle: int) -> None:
        pass

    result = prune_retrain(TINY["llama"](), sparsities=[0.5], retrain=untouched, measure=measure, progress=False)
    assert result.cycles[0].retrained == measure(result.model).perplexity and result.table()
    with pytest.raises(TypeError):
        prune_retrain(TINY["llama"](), sparsities=[0.5], retrain=None, measure=lambda model: {}, progress=False)


def test_a_sparse_model_is_pruned_further(make_trainer: MakeTrainer) -> None:
    model = TINY["llama"]()
    older = prune(model, sparsity=0.4, progress=False)
    result = prune_retrain(
        model, sparsities=[0.6], inside=older, retrain=Retraining("full", make_trainer), progress=False
    )
    assert result.masks <= older and result.cycles[0].removed < sum(t for _, t in older.counts().values()) * 0.21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either sparsities or patterns"),
        ({"sparsities": [], "patterns": None}, "and at least one"),
        ({"sparsities": [0.5], "patterns": ["2:4"]}, "either sparsities or patterns"),
        ({"sparsities": [0.5, 0.5]}, r"0\.5 \(unstructured\) follows 0\.5"),
        ({"sparsities": [0.5, 0.3]}, r"0\.3 \(unstructured\) follows 0\.5"),
        ({"sparsities": [0.5, 1.0]}, r"1\.0"),
        ({"patterns": ["2:4", "4:8"]}, r"0\.5 \(4:8\) follows 0\.5"),
        ({"patterns": ["2:4", "unstructured"]}, "sparsity"),
        ({"sparsities": [0.0]}, "follows 0"),
        ({"sparsities": [0.5], "method": "magnitud"}, "Did you mean 'magnitude'"),
        ({"sparsities": [0.5], "method": "wanda"}, "calibration"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_any_work(arguments: dict[str, Any], message: str) -> None:
    model = TINY["llama"]()
    before = copies(model)
    with pytest.raises(ValueError, match=message):
        prune_retrain(model, retrain=lambda *_: pytest.fail("nothing may be trained"), **arguments)
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items())


def test_a_retraining_that_revives_or_leaves_an_adapter_is_found() -> None:
    def revive(model: nn.Module, masks: MaskSet, cycle: int) -> None:
        for weight in named_weights(model).values():
            weight.detach().add_(1e-3)

    def forget_to_merge(model: nn.Module, masks: MaskSet, cycle: int) -> None:
        prepare_perp(model, "mask_lora", masks, r=2)

    with pytest.raises(RuntimeError, match="are not zero"):
        prune_retrain(TINY["llama"](), sparsities=[0.5], retrain=revive, progress=False)
    with pytest.raises(RuntimeError, match=r"cycle 1 .*'model\.layers\.0.*let `retrain` return the plain model"):
        prune_retrain(TINY["llama"](), sparsities=[0.5], retrain=forget_to_merge, progress=False)


def test_an_unmerged_peft_model_is_merged() -> None:
    def unmerged(model: nn.Module, masks: MaskSet, cycle: int) -> nn.Module:
        adapted = prepare_perp(model, "mask_lora", masks, r=2)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.ones_(parameter.data)
        return adapted

    model = TINY["llama"]()
    dense = copies(model)
    result = prune_retrain(model, sparsities=[0.4, 0.6], retrain=unmerged, progress=False)
    assert [t.name for t in find_targets(result.model)] == list(result.masks)
    for name, mask in result.masks.items():
        weight = named_weights(result.model)[name].detach()
        assert bool((weight[mask] != dense[name][mask]).all()) and bool((weight[~mask] == 0).all())
