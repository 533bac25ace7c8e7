"""Learned scales: at least the density, never worse than DARE on their samples, and the model is left alone."""

from __future__ import annotations

import pytest
import torch
from deltas.delta_models import batches, bits, finetuned_model, linear_names

from sparse_ft.deltas import DeltaProbe, OutputChange, learn_scales
from sparse_ft.models import named_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_gain_on_dare_and_the_model_is_unchanged(dtype: torch.dtype) -> None:
    model, base = finetuned_model(size=0.05, dtype=dtype)
    samples = batches(2)
    before = {name: bits(tensor).clone() for name, tensor in named_weights(model).items()}
    probe = DeltaProbe(model, base, density=0.02, names=linear_names(model))
    probe.prune(0.02)  # whatever the weights are at the start, the fine-tuned ones are the reference
    learned = learn_scales(probe, samples, max_steps=20)
    for name, tensor in named_weights(model).items():
        assert torch.equal(bits(tensor), before[name]) and tensor.grad is None
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert set(learned.scales) == set(probe.names)
    assert all(q >= 0.02 for q in learned.scales.values())
    assert learned.loss < learned.dare_loss and learned.steps <= 20
    change = OutputChange(model, samples, kind="logits")
    probe.prune(0.02)
    assert change.measure() == pytest.approx(learned.dare_loss, rel=1e-3 if dtype == torch.float32 else 0.05)
    probe.prune(learned.scales)
    assert change.measure() == pytest.approx(learned.loss, rel=1e-3 if dtype == torch.float32 else 0.05)


def test_one_step_is_adamw_on_the_derivative_of_the_loss() -> None:
    """AdamW's first step moves by the learning rate against the gradient's sign: here taken from a difference."""
    model, base = finetuned_model(size=0.05)
    name, rate, start = linear_names(model)[0], 1e-2, 0.05
    samples = batches(1)
    probe = DeltaProbe(model, base, density=0.1, names=[name])
    change = OutputChange(model, samples, kind="logits")
    losses = {}
    for a in (0.0, start - 0.01, start + 0.01, start - rate, start + rate):
        probe.prune(0.1 + a)
        losses[a] = change.measure()
    downhill = start + rate if losses[start + 0.01] < losses[start - 0.01] else start - rate
    learned = learn_scales(probe, samples, max_steps=1, start=start, learning_rate=rate)
    moved = downhill - rate * 0.01 * start  # the decay of AdamW
    if losses[downhill] < losses[0.0]:
        assert learned.scales[name] == pytest.approx(0.1 + moved, rel=1e-3)
    else:
        assert learned.scales[name] == 0.1
    assert learned.loss == pytest.approx(min(losses[0.0], losses[downhill]), rel=1e-2)


def test_no_gain_gives_dare_and_patience_ends_it() -> None:
    """Density 1: DARE changes nothing, so no scale can be better."""
    model, base = finetuned_model(size=0.05)
    probe = DeltaProbe(model, base, density=1.0, names=linear_names(model))
    learned = learn_scales(probe, batches(2), start=0.3, patience=2, max_steps=100)
    assert set(learned.scales.values()) == {1.0}
    assert learned.loss == learned.dare_loss == pytest.approx(0, abs=1e-9)
    assert learned.steps == 3 * 2


def test_tied_weights_and_padding() -> None:
    model, base = finetuned_model("qwen", size=0.05)
    probe = DeltaProbe(model, base, density=0.1)
    ids = batches(1, batch=1, length=8)[0]["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.full((1, 5), 2)], 1),
        "attention_mask": torch.tensor([[1] * 8 + [0] * 5]),
        "labels": torch.zeros(1, 13, dtype=torch.long),
    }
    one, other = (learn_scales(probe, [batch], max_steps=3) for batch in (ids, padded))
    assert one.dare_loss == pytest.approx(other.dare_loss, rel=1e-3)
    change = OutputChange(model, [ids], kind="logits")
    probe.prune(0.1)
    assert change.measure() == pytest.approx(one.dare_loss, rel=1e-3)  # the head is pruned with the embedding


def test_refusals() -> None:
    model, base = finetuned_model()
    probe = DeltaProbe(model, base, density=0.1)
    with pytest.raises(ValueError, match="no samples"):
        learn_scales(probe, [])
    with pytest.raises(ValueError, match="max_steps is 0"):
        learn_scales(probe, batches(1), max_steps=0)
    with pytest.raises(ValueError, match="scale is 0"):
        learn_scales(DeltaProbe(model, base, density=0.0), batches(1))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        learn_scales(DeltaProbe(model.train(), base, density=0.1), batches(1))
