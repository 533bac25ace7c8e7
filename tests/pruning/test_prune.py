"""`prune` on whole models: exact counts, what is touched and what is not, and every refusal before any work."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, matrix_view
from sparse_ft.pruning import METHODS, prune

CASES = [(name, method) for name in TINY for method in METHODS]


def batches(model: Any, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny_batch(model, batch=4, seed=seed) for seed in range(count)]


def copy_of_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def rows(mask: Tensor, input_dim: int) -> Tensor:
    return matrix_view(mask, input_dim).reshape(-1, mask.shape[input_dim])


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_zeros_counts_and_untouched_tensors(name: str, method: str, pattern: str) -> None:
    model = TINY[name]()
    before, targets = copy_of_tensors(model), find_targets(model)
    sparsity = 0.37 if pattern == "unstructured" else None
    masks = prune(model, pattern=pattern, sparsity=sparsity, method=method, calibration=batches(model), progress=False)

    assert list(masks) == [target.name for target in targets]
    after = dict(model.named_parameters())
    for target in targets:
        mask, weight, dense = masks[target.name], after[target.name].detach(), before[target.name]
        assert torch.equal(weight != 0, mask & (weight != 0)), "a pruned weight is not zero"
        assert not bool((weight[~mask] != 0).any()) and not bool(torch.signbit(weight[~mask]).any())
        d, total = target.in_features, mask.numel()
        experts = target.shape[0] if target.kind == "experts" else 1
        if pattern == "2:4":
            groups = matrix_view(mask, target.input_dim).reshape(-1, d // 4, 4).sum(-1)
            assert bool((groups == 2).all())
        elif method == "wanda":
            assert bool((rows(mask, target.input_dim).sum(1) == d - int(d * 0.37)).all())
        else:
            assert int((~mask).sum()) == experts * round(0.37 * total / experts)
        if method != "sparsegpt":
            assert same_bits(weight[mask], dense[mask]), "a kept weight changed"
    pruned = {target.name for target in targets}
    for key, tensor in model.state_dict().items():
        if key not in pruned:
            assert same_bits(tensor, before[key]), f"{key} is no target but changed"
    masks.verify(model)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_sparsity_zero_is_the_identity(name: str, method: str) -> None:
    model = TINY[name]()
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        masks = prune(model, sparsity=0.0, method=method, calibration=batches(model), progress=False)
        assert same_bits(model(**batch).logits, expected)
    assert masks.sparsity() == 0.0


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_magnitude_removes_the_smallest_of_each_matrix(name: str) -> None:
    model = TINY[name]()
    before = copy_of_tensors(model)
    masks = prune(model, sparsity=0.5, progress=False)
    for target in find_targets(model):
        dense, mask = before[target.name], masks[target.name]
        pairs = zip(dense, mask, strict=True) if target.kind == "experts" else [(dense, mask)]
        for weight, keep in pairs:
            assert float(weight[~keep].abs().max()) <= float(weight[keep].abs().min())


def test_global_magnitude_has_one_threshold_and_the_exact_total() -> None:
    model = TINY["mixtral"]()
    before = copy_of_tensors(model)
    masks = prune(model, sparsity=0.6, allocation="global", min_keep=0.0, progress=False)
    kept = torch.cat([before[name][mask].abs() for name, mask in masks.items()])
    gone = torch.cat([before[name][~mask].abs() for name, mask in masks.items()])
    assert len(gone) == round(0.6 * (len(gone) + len(kept)))
    assert float(gone.max()) <= float(kept.min())


@pytest.mark.parametrize("method", ["magnitude", "random", "wanda", "sparsegpt"])
def test_erk_spares_small_tensors_and_keeps_the_total(method: str) -> None:
    model = TINY["llama"]()
    masks = prune(model, sparsity=0.6, method=method, allocation="erk", calibration=batches(model), progress=False)
    k_proj = masks.sparsity("model.layers.0.self_attn.k_proj.weight")
    up_proj = masks.sparsity("model.layers.0.mlp.up_proj.weight")
    assert k_proj < up_proj
    # Wanda rounds the number removed down in each row
    assert masks.sparsity() == pytest.approx(0.6, abs=0.03 if method == "wanda" else 1e-4)


def test_random_is_keyed_by_seed_and_name() -> None:
    first = prune(TINY["llama"](), sparsity=0.5, method="random", seed=3, progress=False)
    again = prune(TINY["llama"](1), sparsity=0.5, method="random", seed=3, exclude=["q_proj"], progress=False)
    other = prune(TINY["llama"](), sparsity=0.5, method="random", seed=4, progress=False)
    assert all(torch.equal(first[name], again[name]) for name in again)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)]
    assert not torch.equal(first[names[0]], first[names[1]])


def test_random_experts_differ() -> None:
    mask = prune(TINY["mixtral"](), sparsity=0.5, method="random", progress=False)[
        "model.layers.0.mlp.experts.down_proj"
    ]
    assert not torch.equal(mask[0], mask[1])


def test_exclude_leaves_tensors_dense() -> None:
    model = TINY["llama"]()
    before = copy_of_tensors(model)
    masks = prune(model, pattern="2:4", exclude=["down_proj", "layers.1.*"], progress=False)
    assert masks and all("layers.0" in name and "down_proj" not in name for name in masks)
    left = "model.layers.1.self_attn.q_proj.weight"
    assert same_bits(model.state_dict()[left], before[left])


def test_n_equal_m_prunes_nothing() -> None:
    model = TINY["llama"]()
    before = copy_of_tensors(model)
    masks = prune(model, pattern="4:4", method="sparsegpt", calibration=batches(model), progress=False)
    assert masks.sparsity() == 0 and all(same_bits(t, before[k]) for k, t in model.state_dict().items())


def odd_model() -> nn.Module:
    """A Llama with d = 32 and an intermediate size of 36, which 8 does not divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=36, num_hidden_layers=1, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def test_indivisible_inputs_are_refused_with_the_ways_out() -> None:
    model = odd_model()
    before = copy_of_tensors(model)
    with pytest.raises(ValueError, match=r"down_proj\.weight' has 36 inputs.*2:8.*--exclude\).*down_proj.*dense_tail"):
        prune(model, pattern="2:8", progress=False)
    assert all(same_bits(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_indivisible_tail_stays_dense(method: str) -> None:
    model = odd_model()
    masks = prune(
        model, pattern="2:8", method=method, indivisible="dense_tail", calibration=batches(model), progress=False
    )
    mask = masks["model.layers.0.mlp.down_proj.weight"]
    assert bool(mask[:, 32:].all())
    assert bool((mask[:, :32].reshape(32, 4, 8).sum(-1) == 2).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(3, 5), (1, 3), (5, 7)])
def test_any_n_of_m(method: str, n: int, m: int) -> None:
    model = TINY["llama"]()
    masks = prune(
        model, pattern=f"{n}:{m}", method=method, indivisible="dense_tail", calibration=batches(model), progress=False
    )
    for mask in masks.values():
        whole = mask.shape[1] // m * m
        assert bool(mask[:, whole:].all()) and bool((mask[:, :whole].reshape(-1, m).sum(-1) == n).all())


def test_indivisible_can_be_skipped() -> None:
    model = odd_model()
    with pytest.warns(UserWarning, match="down_proj"):
        masks = prune(model, pattern="2:8", indivisible="skip", progress=False)
    assert "model.layers.0.mlp.down_proj.weight" not in masks and len(masks) == 6


def poison(model: nn.Module, name: str, value: float) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = value
    return model


LATE = "model.layers.1.mlp.up_proj.weight"
BAD = {
    "unknown method": (dict(method="wnda", sparsity=0.5), "Unknown method 'wnda'. Did you mean 'wanda'"),
    "unknown allocation": (dict(allocation="globl", sparsity=0.5), "Did you mean 'global'"),
    "unknown indivisible": (dict(indivisible="skp", sparsity=0.5), "Did you mean 'skip'"),
    "unknown pattern": (dict(pattern="two of four"), "two of four"),
    "n > m": (dict(pattern="5:4"), "5:4"),
    "no sparsity": (dict(), "sparsity"),
    "sparsity 1": (dict(sparsity=1.0), r"1\.0"),
    "negative sparsity": (dict(sparsity=-0.1), "-0.1"),
    "sparsity is text": (dict(sparsity="half"), "half"),
    "sparsity NaN": (dict(sparsity=float("nan")), "nan"),
    "sparsity against n:m": (dict(pattern="2:4", sparsity=0.7), r"0\.7"),
    "global Wanda": (dict(method="wanda", sparsity=0.5, allocation="global"), "wanda.*global.*uniform"),
    "n:m with ERK": (dict(pattern="2:4", allocation="erk"), "2:4.*erk"),
    "pattern is a number": (dict(pattern=0.5), r"Unknown pattern '0\.5'"),
    "sparsity is text, n:m": (dict(pattern="2:4", sparsity="half"), "half"),
    "block size": (dict(pattern="2:4", method="sparsegpt", block_size=0), "block_size is 0"),
    "damping": (dict(sparsity=0.5, damping=-1.0), r"damping is -1\.0"),
    "huge damping": (dict(sparsity=0.5, damping=2000.0), r"damping is 2000\.0 but must lie in \[0, 1000\]"),
    "damping is text": (dict(sparsity=0.5, damping="much"), "damping is 'much'"),
    "min_keep": (dict(sparsity=0.5, min_keep=1.5), r"min_keep is 1\.5"),
    "infeasible floor": (dict(sparsity=0.99, allocation="global", min_keep=0.05), "min_keep"),
    "unmatched exclude": (dict(sparsity=0.5, exclude=["qproj"]), "qproj"),
    "no calibration": (dict(sparsity=0.5, method="wanda"), "wanda.*needs calibration"),
    "text as calibration": (dict(sparsity=0.5, method="wanda", calibration="wikitext"), "wikitext"),
    "empty calibration": (dict(sparsity=0.5, method="sparsegpt", calibration=[]), "no tokens"),
    "foreign token": (dict(sparsity=0.5, method="wanda", calibration=[torch.tensor([[1, 500]])]), "500.*96"),
    "negative token": (dict(sparsity=0.5, method="wanda", calibration=[torch.tensor([[-100, 5]])]), "-100"),
    "float tokens": (dict(sparsity=0.5, method="wanda", calibration=[torch.rand(2, 8)]), "float32"),
    "too long": (
        dict(sparsity=0.5, method="wanda", calibration=[torch.ones(1, 65, dtype=torch.long)]), "65.*64 positions",
    ),
    "lists of tokens": (dict(sparsity=0.5, method="wanda", calibration=[{"input_ids": [[1, 2]]}]), "return_tensors"),
    "strange batch": (dict(sparsity=0.5, method="wanda", calibration=[3]), "batch is int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_one_sentence_and_nothing_is_touched(case: str) -> None:
    arguments, message = BAD[case]
    model = TINY["llama"]()
    before = copy_of_tensors(model)
    with pytest.raises(ValueError, match=message) as caught:
        prune(model, progress=False, **arguments)
    assert "\n" not in str(caught.value)
    assert all(same_bits(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_weights_are_named(method: str, value: float) -> None:
    model = poison(TINY["llama"](), LATE, value)
    with pytest.raises(ValueError, match=LATE):
        prune(model, sparsity=0.5, method=method, calibration=batches(model), progress=False)
    assert bool((model.get_parameter("model.layers.0.self_attn.q_proj.weight") != 0).all())


def test_a_name_in_place_of_a_model_points_to_prune_checkpoint() -> None:
    with pytest.raises(ValueError, match=r"loaded model, got str 'dense'; .* sparse_ft\.prune_checkpoint\("):
        prune("dense", sparsity=0.5)  # type: ignore[arg-type]


def test_meta_and_quantised_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="meta device"):
        prune(TINY["llama"]().to("meta"), sparsity=0.5, progress=False)
    model = TINY["llama"]()
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"q_proj\.weight' holds torch\.uint8 \(512, 1\).*quantised"):
        prune(model, sparsity=0.5, progress=False)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no prunable weight"):
        prune(nn.Sequential(nn.Linear(8, 8)), sparsity=0.5, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_keep_dtype_and_exact_zeros(dtype: torch.dtype) -> None:
    model = TINY["llama"]().to(dtype)
    masks = prune(model, pattern="2:4", method="sparsegpt", calibration=batches(model), progress=False)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    masks.verify(model)


def test_without_update_sparsegpt_keeps_weights_and_its_own_mask() -> None:
    updated, masked = TINY["llama"](), TINY["llama"]()
    before = copy_of_tensors(masked)
    arguments: dict[str, Any] = dict(sparsity=0.6, method="sparsegpt", calibration=batches(masked), progress=False)
    first = prune(updated, **arguments)
    second = prune(masked, update_weights=False, **arguments)
    for name, mask in second.items():
        assert same_bits(masked.get_parameter(name).detach()[mask], before[name][mask])
    name = "model.layers.0.self_attn.q_proj.weight"  # its inputs are the same in both runs
    assert torch.equal(first[name], second[name])
    assert not torch.equal(updated.get_parameter(name), masked.get_parameter(name))


def test_pruning_twice_only_removes() -> None:
    model = TINY["llama"]()
    first = prune(model, sparsity=0.3, progress=False)
    second = prune(model, sparsity=0.6, progress=False)
    assert second <= first and not first <= second


def test_masks_survive_a_round_trip_and_the_model_is_unwrapped(tmp_path: Any) -> None:
    model = TINY["gpt2"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = prune(model, pattern="2:4", progress=False)
    masks.save(tmp_path)
    assert MaskSet.load(tmp_path) == masks
    assert masks == MaskSet.from_zeros(model, pattern="2:4")
