"""Structural pruning: masks that are constant along their structure, exact counts, and the same neurons everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from deltas.delta_models import finetuned_model, randn
from tiny_models import TINY
from torch import nn

from sparse_ft.deltas import (
    DeltaProbe,
    NeuronGroup,
    drop_neurons,
    neuron_groups,
    random_keep,
    structural_delta,
    structural_keep,
)


@pytest.mark.parametrize(("axis", "dim"), [("row", 0), ("column", 1), (0, 0), (-1, 1)])
@pytest.mark.parametrize("exact", [True, False])
def test_the_mask_is_constant_along_the_structure(axis: str | int, dim: int, exact: bool) -> None:
    delta = randn(40, 40) + 10
    pruned = structural_delta(delta, density=0.3, seed=2, name="w", axis=axis, exact=exact)  # type: ignore[arg-type]
    alive = (pruned != 0).transpose(0, dim)
    keep = alive[:, 0]
    assert torch.equal(alive, keep[:, None].expand(40, 40))
    assert torch.equal(keep, structural_keep(40, density=0.3, seed=2, name="w", exact=exact))
    torch.testing.assert_close(pruned.transpose(0, dim)[keep] * 0.3, delta.transpose(0, dim)[keep])
    if exact:
        assert int(keep.sum()) == 12


def test_each_structure_is_kept_on_its_own_unless_a_count_is_asked_for() -> None:
    for seed in range(5):
        keep = structural_keep(1000, density=0.37, seed=seed, name="w")
        assert torch.equal(keep, torch.from_numpy(random_keep(1000, 0.37, seed=seed, name="w")))
        for density in (0.0, 0.0006, 0.37, 1.0):
            assert int(structural_keep(1000, density=density, seed=seed, name="w", exact=True).sum()) == round(
                density * 1000
            )


def test_a_count_without_replacement_is_uniform_and_keyed() -> None:
    seeds, count = 400, 50
    kept = sum(structural_keep(count, density=0.2, seed=s, name="w", exact=True).double() for s in range(seeds))
    deviation = math.sqrt(seeds * 0.2 * 0.8)
    assert float((kept - seeds * 0.2).abs().max()) < 5 * deviation
    one = structural_keep(count, density=0.2, seed=0, name="w", exact=True)
    assert torch.equal(one, structural_keep(count, density=0.2, seed=0, name="w", exact=True))
    for other in (dict(seed=1, name="w"), dict(seed=0, name="v"), dict(seed=0, name="w", role="r")):
        assert not torch.equal(one, structural_keep(count, density=0.2, exact=True, **other))  # type: ignore[arg-type]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("axis", ["row", "column"])
def test_the_mean_over_seeds_is_the_delta(axis: str, exact: bool) -> None:
    seeds, delta = 256, randn(50, 50) + 1
    mean = (
        sum(
            structural_delta(delta, density=0.2, seed=s, name="w", axis=axis, exact=exact).double()  # type: ignore[arg-type]
            for s in range(seeds)
        )
        / seeds
    )
    ratio = (mean / delta.double()).mean(1 if axis == "row" else 0)  # one number per structure
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(0.8 / 0.2 / seeds)


def test_scale_and_ends() -> None:
    delta = randn(10, 6)
    assert torch.equal(structural_delta(delta, density=1.0, name="w"), delta)
    assert not structural_delta(delta, density=0.0, name="w", scale=0.5).any()
    keep = structural_keep(10, density=0.5, seed=0, name="w")
    assert torch.equal(structural_delta(delta, density=0.5, name="w", scale=1.0)[keep], delta[keep])
    assert torch.equal(structural_delta(delta[:, 0], density=0.5, keep=keep, scale=1.0)[keep], delta[keep, 0])


EXPECTED = {
    "llama": ("model.layers.0.mlp", {"mlp.gate_proj.weight", "mlp.up_proj.weight"}, {"mlp.down_proj.weight"}),
    "gpt2": ("transformer.h.0.mlp", {"mlp.c_fc.weight", "mlp.c_fc.bias"}, {"mlp.c_proj.weight"}),
    "opt": ("model.decoder.layers.0", {"fc1.weight", "fc1.bias"}, {"fc2.weight"}),
    "neox": (
        "gpt_neox.layers.0.mlp",
        {"mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias"},
        {"mlp.dense_4h_to_h.weight"},
    ),
    "bert": (
        "bert.encoder.layer.0",
        {"intermediate.dense.weight", "intermediate.dense.bias"},
        {"output.dense.weight"},
    ),
}


@pytest.mark.parametrize("architecture", list(EXPECTED))
def test_neurons_are_found_by_structure(architecture: str) -> None:
    groups = neuron_groups(TINY[architecture]())
    assert len(groups) == 2
    name, outputs, inputs = EXPECTED[architecture]
    assert groups[0].name == name and groups[0].size == 48
    block = name.removesuffix(".mlp")
    assert {key.removeprefix(f"{block}.") for key in groups[0].outputs} == outputs
    assert {key.removeprefix(f"{block}.") for key in groups[0].inputs} == inputs


def test_attention_with_narrow_keys_is_no_group_of_neurons() -> None:
    """Queries of 64 features made from 32 and read by one projection look like neurons; their keys say otherwise."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, size) for size in (64, 32, 32))
            self.o = nn.Linear(64, 32)

    assert neuron_groups(nn.Sequential(nn.ModuleList([Block(), Block()]))) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert"])
@torch.no_grad()
def test_a_group_has_one_mask_in_all_its_tensors(architecture: str) -> None:
    model, base = finetuned_model(architecture)
    group = neuron_groups(model)[0]
    with DeltaProbe(model, base, density=0.5, names=[*group.outputs, *group.inputs]) as probe:
        pruned = drop_neurons(probe.deltas, group, density=0.5, seed=4, exact=True)
        keep = structural_keep(48, density=0.5, seed=4, name=group.name, exact=True)
        assert set(pruned) == {*group.outputs, *group.inputs} and int(keep.sum()) == 24
        for name, axis in {**group.outputs, **group.inputs}.items():
            moved = pruned[name].movedim(axis, 0)
            assert not moved[~keep].any()
            torch.testing.assert_close(moved[keep] * 0.5, probe.deltas[name].movedim(axis, 0)[keep])


def test_refusals() -> None:
    group = NeuronGroup("mlp", 4, {"up": 0}, {"down": 1})
    with pytest.raises(ValueError, match="'down' of the group 'mlp' is not among the 1 deltas"):
        drop_neurons({"up": randn(4, 3)}, group, density=0.5)
    with pytest.raises(ValueError, match=r"'down' has shape \(3, 5\) but 'mlp' has 4 neurons on its axis 1"):
        drop_neurons({"up": randn(4, 3), "down": randn(3, 5)}, group, density=0.5)
    with pytest.raises(ValueError, match="axis is 'head'"):
        structural_delta(randn(4, 3), density=0.5, name="w", axis="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis is 'column'"):
        structural_delta(randn(4), density=0.5, name="w", axis="column")
    with pytest.raises(ValueError, match="of the 4 slices"):
        structural_delta(randn(4, 3), density=0.5, keep=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs name"):
        structural_delta(randn(4, 3), density=0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        structural_delta(torch.full((2, 2), float("nan")), density=0.5, name="w")
