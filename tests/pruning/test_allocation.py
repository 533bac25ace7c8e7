"""Allocations: exact totals, the defining property of each rule, floors, and independence of order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.pruning.allocation import erk, global_magnitude, uniform
from sparse_ft.pruning.magnitude import magnitude_mask


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"d": (20, 30), "a": (7, 9), "c": (3, 4, 50), "b": (40, 40)}
    return {n: (randn(*s, seed=i) * 3.0**i).to(dtype) for i, (n, s) in enumerate(shapes.items())}


def smallest_of_all(weights: dict[str, torch.Tensor], count: int) -> dict[str, int]:
    """Sort everything together (by magnitude, then name, then position) and count the first `count` per tensor."""
    entries = [(float(v), n, i) for n, w in weights.items() for i, v in enumerate(w.abs().flatten())]
    removed = dict.fromkeys(weights, 0)
    for _, name, _ in sorted(entries)[:count]:
        removed[name] += 1
    return removed


def total(weights: dict[str, torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.999])
def test_uniform_rounds_each_tensor(sparsity):
    assert uniform({"a": 63, "b": 1600}, sparsity) == {"a": round(sparsity * 63), "b": round(sparsity * 1600)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.8, 0.999])
def test_global_counts_are_those_of_one_sort_over_everything(dtype, sparsity):
    weights = layers(dtype)
    removed = global_magnitude(weights, sparsity, min_keep=0)
    assert removed == smallest_of_all(weights, round(sparsity * total(weights)))


def test_global_threshold_separates_kept_from_removed_over_all_tensors():
    weights = layers()
    removed = global_magnitude(weights, 0.6, min_keep=0)
    masks = {name: magnitude_mask(weight, removed=removed[name]) for name, weight in weights.items()}
    largest_gone = max(float(weights[n][~m].abs().max()) for n, m in masks.items() if not m.all())
    smallest_kept = min(float(weights[n][m].abs().min()) for n, m in masks.items() if m.any())
    assert largest_gone <= smallest_kept


@settings(max_examples=15, deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([0.0, -0.0, 1e-45, 1.0, -1.0, 1.0000001, 2.0]), min_size=1), min_size=1),
    sparsity=st.floats(0, 0.999),
)
def test_global_counts_are_exact_with_ties_zeros_and_subnormals(values, sparsity):
    weights = {f"w{i}": torch.tensor(row) for i, row in enumerate(values)}
    removed = global_magnitude(weights, sparsity, min_keep=0)
    assert removed == smallest_of_all(weights, round(sparsity * total(weights)))


def test_order_of_the_tensors_does_not_matter():
    weights = {name: weight.round() for name, weight in layers().items()}  # ties across tensors
    backwards = dict(reversed(weights.items()))
    for min_keep in (0, 0.05):
        assert global_magnitude(backwards, 0.6, min_keep=min_keep) == global_magnitude(weights, 0.6, min_keep=min_keep)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert erk(dict(reversed(shapes.items())), 0.7) == erk(shapes, 0.7)


def test_reads_lazily_one_tensor_at_a_time():
    class Checkpoint(dict):
        reads = 0

        def __getitem__(self, name):
            Checkpoint.reads += 1
            return super().__getitem__(name).clone()

    lazy = Checkpoint(layers())
    assert global_magnitude(lazy, 0.5) == global_magnitude(layers(), 0.5)
    assert Checkpoint.reads == 3 * len(lazy)


def test_tensors_larger_than_a_chunk_are_counted_whole(monkeypatch):
    expected = global_magnitude(layers(), 0.5)
    monkeypatch.setattr("sparse_ft.pruning.allocation._CHUNK", 17)
    assert global_magnitude(layers(), 0.5) == expected


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("min_keep", [0.0005, 0.005, 0.01])
def test_floor_keeps_enough_everywhere_and_the_total_is_exact(sparsity, min_keep):
    weights = layers() | {"tiny": randn(2, 3) * 1e-3}
    everything = total(weights)
    floor = int(everything * min_keep)
    removed = global_magnitude(weights, sparsity, min_keep=min_keep)
    assert sum(removed.values()) == round(sparsity * everything)
    for name, weight in weights.items():
        assert weight.numel() - removed[name] >= min(weight.numel(), floor)
    if floor > 6:
        assert removed["tiny"] == 0


def test_where_the_floor_binds_the_others_scale_by_one_factor():
    weights = {"faint": randn(30, 30) * 1e-4, "a": randn(40, 40, seed=1), "b": randn(50, 30, seed=2) * 1.5}
    free = global_magnitude(weights, 0.6, min_keep=0)
    bound = global_magnitude(weights, 0.6, min_keep=0.05)
    floor = int(total(weights) * 0.05)
    assert free["faint"] == 900
    assert bound["faint"] == 900 - floor
    factor = (free["a"] + free["b"] + floor) / (free["a"] + free["b"])
    for name in ("a", "b"):
        assert abs(bound[name] - factor * free[name]) < 1


def test_tensors_the_threshold_spares_help_out_when_the_rest_is_at_its_floor():
    weights = {"faint": randn(20, 20) * 1e-6, "loud": randn(20, 20, seed=1) + 100, "louder": randn(20, 40) + 1000}
    floor = int(1600 * 0.1)
    removed = global_magnitude(weights, 0.25, min_keep=0.1)
    assert removed == {"faint": 400 - floor, "loud": 53, "louder": 107}  # the missing 160 in proportion to the sizes


def test_floors_that_leave_too_little_to_remove_are_an_error():
    weights = {f"w{i}": randn(10, 10, seed=i) for i in range(10)}
    assert sum(global_magnitude(weights, 0.5, min_keep=0.05).values()) == 500
    with pytest.raises(ValueError, match=r"removes 510 .*keeping 50 .*leaves 500"):
        global_magnitude(weights, 0.51, min_keep=0.05)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_erk_densities_are_capped_proportional_and_exact_in_total(sparsity):
    shapes = {"q": (64, 64), "k": (16, 64), "up": (256, 64), "down": (64, 256), "dot": (1, 64)}
    removed = erk(shapes, sparsity)
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(removed.values()) == round(sparsity * sum(counts.values()))
    assert all(0 <= removed[name] <= counts[name] for name in shapes)
    ratios = {
        name: (counts[name] - removed[name]) / sum(shapes[name]) for name in shapes if removed[name]
    }  # kept / (out + in): one epsilon for all tensors that are not dense
    dense_need = [counts[name] / sum(shapes[name]) for name in shapes if not removed[name]]
    for one in ratios.values():
        for other in ratios.values():
            assert abs(one - other) < 2 / min(sum(shape) for shape in shapes.values())
        assert all(need <= one + 0.05 for need in dense_need)


def test_erk_protects_small_projections():
    removed = erk({"q": (512, 512), "k": (64, 512)}, 0.6)
    assert removed["k"] / (64 * 512) < removed["q"] / (512 * 512)


def test_erk_counts_experts_as_separate_matrices():
    fused = erk({"experts": (4, 32, 64), "q": (64, 64)}, 0.7)
    separate = erk({f"e{i}": (32, 64) for i in range(4)} | {"q": (64, 64)}, 0.7)
    assert abs(fused["experts"] - sum(separate[f"e{i}"] for i in range(4))) <= 4


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_refuses_impossible_sparsity(sparsity):
    for allocate in (
        lambda: uniform({"a": 4}, sparsity),
        lambda: global_magnitude(layers(), sparsity),
        lambda: erk({"a": (2, 2)}, sparsity),
    ):
        with pytest.raises(ValueError, match="sparsity"):
            allocate()


def test_refuses_other_bad_input():
    with pytest.raises(ValueError, match="no tensor"):
        uniform({}, 0.5)
    with pytest.raises(ValueError, match="'norm'"):
        erk({"norm": (64,)}, 0.5)
    with pytest.raises(ValueError, match="min_keep"):
        global_magnitude(layers(), 0.5, min_keep=1.5)
    for value in (float("nan"), float("inf")):
        broken = layers()
        broken["b"][3, 3] = value
        with pytest.raises(ValueError, match="'b' contains NaN or infinite"):
            global_magnitude(broken, 0.5)
