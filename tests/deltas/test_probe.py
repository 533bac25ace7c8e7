"""The probe: the live model at any scale, and the fine-tuned one back bit for bit."""

from __future__ import annotations

import pytest
import torch
from deltas.delta_models import batches, bits, finetuned_model, linear_names
from tiny_models import TINY

from sparse_ft.deltas import DeltaProbe, add_delta, dare, magnitude_delta
from sparse_ft.models import named_weights

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.02, 0.3])
def test_weights_are_base_plus_dare_and_come_back(dtype: torch.dtype, density: float) -> None:
    model, base = finetuned_model(dtype=dtype)
    live = named_weights(model)
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    base["lm_head.weight"][0, :9] = -0.0
    copies = {name: tensor.clone() for name, tensor in base.items()}
    with DeltaProbe(model, base, density=density, role="r") as probe:
        for scale, seed in ((density, 0), (0.5, 0), (density, 1), (0.5, 0)):
            probe.prune(scale, seed=seed)
            for name, tensor in live.items():
                delta = before[name].float() - base[name].float()
                pruned = dare(delta, density=density, seed=seed, name=name, role="r", scale=scale)
                assert torch.equal(bits(tensor), bits(add_delta(base[name], pruned))), name
    for name, tensor in live.items():
        assert torch.equal(bits(tensor), bits(before[name]))
    assert all(torch.equal(bits(base[name]), bits(copies[name])) for name in base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_density_1_is_the_fine_tuned_model_and_density_0_the_base(dtype: torch.dtype) -> None:
    model, base = finetuned_model(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-9)  # so far below the base that base + (finetuned - base) rounds to other values
    before = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    for density, expected in ((1.0, before), (0.0, base)):
        probe = DeltaProbe(model, base, density=density)
        probe.prune(1.0)
        for name, tensor in named_weights(model).items():
            assert torch.equal(bits(tensor), bits(expected[name])), name
        probe.restore()


def test_one_scale_per_tensor_and_any_other_pruning() -> None:
    model, base = finetuned_model()
    names = linear_names(model)[:3]
    before = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    probe = DeltaProbe(model, base, density=0.2, names=names)
    probe.prune({names[0]: 0.2, names[1]: 0.4, names[2]: 1.0}, seed=3)
    for name, scale in zip(names, (0.2, 0.4, 1.0), strict=True):
        expected = base[name] + probe.kept_delta(name, seed=3) / scale
        torch.testing.assert_close(named_weights(model)[name], expected)
    probe.transform(lambda name, delta: magnitude_delta(delta, density=0.1))
    for name in names:
        expected = base[name] + magnitude_delta(before[name] - base[name], density=0.1)
        torch.testing.assert_close(named_weights(model)[name], expected)
    probe.prune(0.2, seed=3)  # after something else the base is set again
    torch.testing.assert_close(
        named_weights(model)[names[0]].detach(), base[names[0]] + probe.kept_delta(names[0], seed=3) / 0.2
    )
    for name, tensor in named_weights(model).items():
        assert name in names or torch.equal(tensor, before[name])


@pytest.mark.parametrize("architecture", ["qwen", "bert", "t5", "opt"])
def test_tied_weights_stay_tied_and_are_pruned_once(architecture: str) -> None:
    model, base = finetuned_model(architecture)
    pointers = {name: tensor.data_ptr() for name, tensor in model.named_parameters(remove_duplicate=False)}
    shared = len(pointers) - len(named_weights(model))
    assert shared >= 1
    with DeltaProbe(model, base, density=0.1) as probe:
        probe.prune(0.1)
        assert len(probe.names) == len(named_weights(model))
        now = {name: tensor.data_ptr() for name, tensor in model.named_parameters(remove_duplicate=False)}
        assert now == pointers
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert torch.equal(embedding, head)


def test_a_tied_weight_may_have_any_of_its_names_in_the_base() -> None:
    model, base = finetuned_model("qwen")
    del base["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" in DeltaProbe(model, base, density=0.1).names


def test_heads_and_resized_vocabularies_stay_fine_tuned() -> None:
    model, base = finetuned_model()
    del base["lm_head.weight"]
    base["model.embed_tokens.weight"] = base["model.embed_tokens.weight"][:90]
    head, embedding = model.lm_head.weight.detach().clone(), model.model.embed_tokens.weight.detach().clone()
    probe = DeltaProbe(model, base, density=0.1)
    probe.prune(0.1)
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, embedding)


def test_an_error_inside_restores_the_model() -> None:
    model, base = finetuned_model()
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stop"), DeltaProbe(model, base, density=0.1) as probe:
        probe.prune(0.1)
        assert not torch.equal(model.lm_head.weight, before)
        raise RuntimeError("stop")
    assert torch.equal(model.lm_head.weight, before)


def test_autocast_never_sees_the_weights_of_before() -> None:
    """Weights that need gradients are cast once per region of autocast, so a change in place would go unseen."""
    model, base = finetuned_model(size=0.05)
    assert all(parameter.requires_grad for parameter in model.parameters())
    ids = batches(1)[0]["input_ids"]
    found = {}
    for cached in (True, False):
        probe = DeltaProbe(model, base, density=0.3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            outputs = [model(ids).logits]
            probe.prune(0.3, seed=0)
            outputs.append(model(ids).logits)
            probe.prune(0.9, seed=0)
            outputs.append(model(ids).logits)
            probe.transform(lambda name, delta: delta * 0)
            outputs.append(model(ids).logits)
            probe.restore()
            outputs.append(model(ids).logits)
        found[cached] = outputs
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    assert torch.equal(found[True][0], found[True][-1])
    assert len({tuple(output.flatten().tolist()) for output in found[True]}) == 4


def test_a_model_on_its_way_through_many_masks_holds_few() -> None:
    model, base = finetuned_model()
    probe = DeltaProbe(model, base, density=0.1)
    for seed in range(5):
        probe.prune(0.1, seed=seed)
    assert len(probe._masks) <= 2
    first = batches(1)[0]
    probe.prune(0.1, seed=0)
    with torch.no_grad():
        one = model(**first).logits
        probe.prune(0.1, seed=4)
        probe.prune(0.1, seed=0)
        assert torch.equal(model(**first).logits, one)


def test_refusals() -> None:
    model, base = finetuned_model()
    with pytest.raises(ValueError, match="shares its memory"):
        DeltaProbe(model, dict(model.named_parameters()), density=0.1)
    with pytest.raises(ValueError, match="None of the model's"):
        DeltaProbe(model, {}, density=0.1)
    with pytest.raises(ValueError, match="'nonsense' is not in the model"):
        DeltaProbe(model, base, density=0.1, names=["nonsense"])
    with pytest.raises(ValueError, match="names is empty"):
        DeltaProbe(model, base, density=0.1, names=[])
    with pytest.raises(ValueError, match="is this the base"):
        DeltaProbe(model, TINY["gpt2"]().state_dict() | {"lm_head.weight": torch.zeros(96, 31)}, density=0.1)
    probe = DeltaProbe(model, base, density=0.1)
    with pytest.raises(ValueError, match="differ in 'extra'"):
        probe.prune(dict.fromkeys(probe.names, 0.1) | {"extra": 0.1})
    with pytest.raises(ValueError, match="scale is 0"):
        probe.prune(0.0)
    broken = {name: tensor.clone() for name, tensor in base.items()}
    broken["lm_head.weight"][3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"'lm_head.weight' contains NaN"):
        DeltaProbe(model, broken, density=0.1)
