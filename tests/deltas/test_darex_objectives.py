"""Objectives of the scale search: what they measure, what they leave out, and that the search gains on them."""

from __future__ import annotations

import math

import pytest
import torch
from deltas.delta_models import batches, finetuned_model, linear_names, randn

from sparse_ft.deltas import (
    DeltaProbe,
    OutputChange,
    average_over_seeds,
    label_objective,
    output_change,
    output_objective,
    search_scale,
    top_logits_change,
)
from sparse_ft.models import named_weights


def test_pure_functions() -> None:
    one, other = randn(3, 4, 20), randn(3, 4, 20, seed=1)
    assert output_change(one, other) == pytest.approx((one - other).double().abs().mean().item())
    total = 0.0
    for reference, row in zip(one.reshape(-1, 20).tolist(), other.reshape(-1, 20).tolist(), strict=True):
        top = sorted(range(20), key=lambda index: -reference[index])[:5]
        total += sum((reference[index] - row[index]) ** 2 for index in top)
    assert top_logits_change(one, other) == pytest.approx(total / (12 * 5))
    assert top_logits_change(one, other, k=20) == pytest.approx((one - other).double().square().mean().item())
    with pytest.raises(ValueError, match="k is 21 but there are 20"):
        top_logits_change(one, other, k=21)
    with pytest.raises(ValueError, match="must agree"):
        output_change(one, other[:1])


def test_the_farthest_of_three_or_more_seeds_is_left_out() -> None:
    assert average_over_seeds([3.0]) == 3.0
    assert average_over_seeds([1.0, 3.0]) == 2.0
    assert average_over_seeds([1.0, 3.0, 100.0]) == 2.0
    assert average_over_seeds([-50.0, 1.0, 2.0, 3.0]) == 2.0
    assert average_over_seeds([1.0, 2.0, -math.inf]) == -math.inf
    with pytest.raises(ValueError, match="no scores"):
        average_over_seeds([])


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("architecture", ["llama", "bert", "t5", "gpt2"])
@torch.no_grad()
def test_the_change_is_that_of_the_models_outputs(architecture: str, kind: str) -> None:
    model, base = finetuned_model(architecture, size=0.05)
    samples = batches(2)
    if architecture == "t5":
        samples = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in samples]

    def outputs() -> list[torch.Tensor]:
        found = [model(**batch, output_hidden_states=True) for batch in samples]
        if kind == "logits":
            return [one.logits for one in found]
        return [(one.decoder_hidden_states if architecture == "t5" else one.hidden_states)[-1] for one in found]

    change = OutputChange(model, samples, kind=kind)  # type: ignore[arg-type]
    assert change.measure() == 0.0
    before = outputs()
    with DeltaProbe(model, base, density=0.1, names=linear_names(model)) as probe:
        probe.prune(0.1)
        pairs = list(zip(before, outputs(), strict=True))
        measure = output_change if kind == "hidden" else top_logits_change
        assert change.measure() == pytest.approx(sum(measure(*pair) for pair in pairs) / len(pairs), rel=1e-5)
        assert change.measure() > 0


def test_padding_and_labels_do_not_count() -> None:
    model, base = finetuned_model()
    ids = batches(1, batch=1, length=8)[0]["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((1, 5), 2)], 1),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 5]),
        "labels": torch.zeros(1, 13, dtype=torch.long),
    }
    with DeltaProbe(model, base, density=0.1, names=linear_names(model)) as probe:
        for kind in ("hidden", "logits"):
            plain = output_objective(probe, [ids], kind=kind)  # type: ignore[arg-type]
            with_padding = output_objective(probe, [padded], kind=kind)  # type: ignore[arg-type]
            assert plain(0.1) == pytest.approx(with_padding(0.1), rel=1e-4)


def test_the_search_is_never_below_dare_and_gains_at_a_low_density() -> None:
    model, base = finetuned_model(size=0.05)
    before = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    with DeltaProbe(model, base, density=0.01, names=linear_names(model)) as probe:
        objective = output_objective(probe, batches(2), seeds=(0, 1))
        found = search_scale(objective, density=0.01)
        assert found.score > found.scores[0.01] and found.scale > 0.01
        assert objective(found.scale) == pytest.approx(found.score)
    for name, tensor in named_weights(model).items():
        assert torch.equal(tensor, before[name])


def test_a_metric_sees_the_pruned_model_and_seeds_are_averaged() -> None:
    model, base = finetuned_model()
    name = linear_names(model)[0]
    with DeltaProbe(model, base, density=0.1, names=[name]) as probe:
        expected = []
        for seed in (5, 6):
            weight = base[name] + probe.kept_delta(name, seed=seed) / 0.25
            expected.append(float(weight.double().sum()))
        objective = label_objective(
            probe, lambda model: float(named_weights(model)[name].detach().double().sum()), seeds=(5, 6)
        )
        assert objective(0.25) == pytest.approx(sum(expected) / 2)
        assert objective({name: 0.25}) == objective(0.25)
        assert label_objective(probe, lambda model: math.nan)(0.25) == -math.inf


def test_search_masks_are_not_those_of_stored_deltas() -> None:
    model, base = finetuned_model()
    name = linear_names(model)[0]
    one, other = (DeltaProbe(model, base, density=0.5, names=[name], **role) for role in ({}, {"role": ""}))
    assert not torch.equal(one.kept_delta(name), other.kept_delta(name))


def test_refusals() -> None:
    model, base = finetuned_model()
    probe = DeltaProbe(model, base, density=0.1)
    with pytest.raises(ValueError, match="no samples"):
        output_objective(probe, [])
    with pytest.raises(ValueError, match="seeds is empty"):
        output_objective(probe, batches(1), seeds=())
    with pytest.raises(ValueError, match="seeds is empty"):
        label_objective(probe, lambda model: 0.0, seeds=())
    with pytest.raises(ValueError, match="kind is 'loss'"):
        output_objective(probe, batches(1), kind="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        output_objective(DeltaProbe(model.train(), base, density=0.1), batches(1))
    model.eval()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="before any pruning"):
        OutputChange(model, batches(1), kind="logits")
