"""Pruning further under an older mask: subsets with exact counts, or a refusal before anything is touched."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import Tensor

from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import find_targets, load_model, matrix_view, named_weights
from sparse_ft.pruning import factorize, magnitude_mask, prune, prune_checkpoint, random_mask, sparsegpt, wanda_mask
from sparse_ft.pruning.sparsegpt import InverseFactor

METHODS = ("magnitude", "random", "wanda", "sparsegpt")
STEPS: dict[str, list[dict[str, Any]]] = {
    "unstructured": [{"sparsity": 0.3}, {"sparsity": 0.5}, {"sparsity": 0.71}],
    "n:m": [{"pattern": "3:4"}, {"pattern": "2:4"}, {"pattern": "1:4"}],
    "n:m, then unstructured": [{"pattern": "2:4"}, {"sparsity": 0.8}],
}


def batches_for(model: Any) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in tiny_batch(model, batch=4, length=16, seed=i).items() if k != "labels"} for i in range(2)]


def matrices(masks: MaskSet, name: str, stacked: bool) -> list[Tensor]:
    view = matrix_view(masks[name], masks.input_dims[name])
    return list(view) if stacked else [view]


def expected_counts(mask: Tensor, step: dict[str, Any], method: str) -> bool:
    """Whether a matrix (o, d) keeps what the method promises, computed here a second time."""
    rows, width = mask.shape
    if "pattern" in step:
        n, m = map(int, step["pattern"].split(":"))
        return bool((mask.view(rows, width // m, m).sum(-1) == n).all())
    if method == "wanda":
        return bool(((~mask).sum(-1) == math.floor(round(width * step["sparsity"], 6))).all())
    return int((~mask).sum()) == round(step["sparsity"] * rows * width)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", STEPS)
def test_each_mask_is_inside_the_one_before_with_exact_counts(schedule: str, method: str, name: str) -> None:
    model = TINY[name]().eval()
    batches = batches_for(model) if method in ("wanda", "sparsegpt") else None
    older: MaskSet | None = None
    for seed, step in enumerate(STEPS[schedule]):
        masks = prune(model, **step, method=method, calibration=batches, inside=older, seed=seed, progress=False)
        masks.verify(model)
        for target in find_targets(model):
            for mask in matrices(masks, target.name, target.kind == "experts"):
                assert expected_counts(mask, step, method), target.name
        if older is not None:
            assert masks <= older and masks != older
        # some kept weights are zero by chance, as after training in bf16: they must not be mistaken for pruned ones
        with torch.no_grad():
            for key, weight in named_weights(model).items():
                if key in masks:
                    places = masks[key].nonzero()[::7]
                    weight[tuple(places.T)] = 0.0
        older = masks


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_without_the_older_mask_pruned_weights_come_back(method: str) -> None:
    """What `inside` is for: zeros tie with zeros, and random scores know none."""
    model = TINY["llama"]()
    older = prune(model, sparsity=0.5, method=method, progress=False)
    with torch.no_grad():
        for key, weight in named_weights(model).items():
            if key in older:
                weight[tuple(older[key].nonzero()[: older[key].sum() // 2].T)] = 0.0
    assert not prune(model, sparsity=0.6, method=method, seed=1, progress=False) <= older


def test_the_same_sparsity_again_changes_nothing() -> None:
    model = TINY["llama"]().eval()
    batches = batches_for(model)
    older = prune(model, sparsity=0.5, method="magnitude", progress=False)
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    assert prune(model, sparsity=0.5, method="magnitude", inside=older, progress=False) == older
    assert prune(model, sparsity=0.5, method="random", inside=older, progress=False) == older
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())
    assert prune(model, sparsity=0.5, method="sparsegpt", inside=older, calibration=batches, progress=False) == older


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_goes_further_as_the_loaded_model_does(method: str, name: str, tmp_path: Path) -> None:
    model = TINY[name]().eval()
    older = prune(model, pattern="2:4", progress=False)
    model.save_pretrained(tmp_path / "source")
    options = dict(sparsity=0.7, method=method, calibration=batches_for(model), inside=older, seed=3, progress=False)
    masks = prune_checkpoint(tmp_path / "source", tmp_path / "out", **options)
    assert masks <= older and masks == prune(model, **options)
    shutil.copy(tmp_path / "source" / "config.json", tmp_path / "out")
    masks.verify(load_model(tmp_path / "out"))


def test_a_checkpoint_whose_removed_weights_are_alive_or_of_another_shape_is_left_alone(tmp_path: Path) -> None:
    model = TINY["llama"]()
    model.save_pretrained(tmp_path / "source")
    older = prune(model, pattern="2:4", progress=False)
    other = MaskSet({n: m[..., ::2].contiguous() for n, m in older.items()})
    for inside, message in ((older, "are not zero though"), (other, "of two models")):
        with pytest.raises(ValueError, match=message):
            prune_checkpoint(tmp_path / "source", tmp_path / "out", sparsity=0.7, inside=inside, progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("allocation", ["erk", "global"])
def test_allocations_go_further_too(allocation: str) -> None:
    model, older = TINY["llama"](), None
    for sparsity in (0.4, 0.6, 0.8):
        masks = prune(model, sparsity=sparsity, allocation=allocation, inside=older, progress=False)
        total = sum(total for _, total in masks.counts().values())
        assert sum(total - kept for kept, total in masks.counts().values()) == round(sparsity * total)
        assert older is None or masks <= older
        older = masks


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "less than before": ({"sparsity": 0.5}, {"sparsity": 0.4}, r"lost 512 weights .* removes only 410 of it"),
    "unstructured, then 2:4": (
        {"sparsity": 0.5},
        {"pattern": "2:4"},
        r"\d+ groups of 4 inputs in which .* fewer than 2 weights, so pattern '2:4' cannot be reached exactly",
    ),
    "1:4, then 2:4": ({"pattern": "1:4"}, {"pattern": "2:4"}, r"has 256 groups of 4 inputs"),
    "uneven rows, then wanda": (
        {"sparsity": 0.5},
        {"sparsity": 0.55, "method": "wanda"},
        r"Row \d+ of '.*' has lost \d+ weights .* remove 17 of each row; .*'magnitude'",
    ),
    "excluded now": (
        {"sparsity": 0.5},
        {"sparsity": 0.6, "exclude": ["up_proj"]},
        "was pruned .* but is not pruned now",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_touched(case: str) -> None:
    first, second, message = REFUSED[case]
    model = TINY["llama"]().eval()
    older = prune(model, **first, progress=False)
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    with pytest.raises(ValueError, match=message):
        prune(model, **second, inside=older, calibration=batches_for(model), progress=False)
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_living_weights_and_strange_masks_are_refused() -> None:
    model = TINY["llama"]()
    older = prune(TINY["llama"](), sparsity=0.5, progress=False)
    with pytest.raises(ValueError, match=r"are not zero though .* inside\.apply_\(model\) first"):
        prune(model, sparsity=0.6, inside=older, progress=False)
    prune(model, sparsity=0.6, inside=older.apply_(model), progress=False)
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"has shape \(48, 32\) but the mask to stay inside has \(8, 8\)"):
        prune(model, sparsity=0.7, inside=MaskSet({name: torch.ones(8, 8, dtype=torch.bool)}), progress=False)


# -- one matrix --------------------------------------------------------------------------------------------------------


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A weight (24, 16), inputs (200, 16), and an older mask that emptied the last columns."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 16, generator=generator)
    inputs = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    older = torch.rand(24, 16, generator=generator) < 0.8
    older[:, 12:] = False
    return weight * older, inputs, older


@pytest.mark.parametrize("block_size", [4, 5, 16])
@pytest.mark.parametrize("sparsity", [0.45, 0.6, 0.9])
def test_an_uneven_older_mask_shifts_sparsegpts_share(
    sparsity: float, block_size: int, problem: tuple[Tensor, Tensor, Tensor]
) -> None:
    weight, inputs, older = problem
    result = sparsegpt(weight, inputs.T @ inputs, sparsity=sparsity, block_size=block_size, inside=older)
    assert int((~result.mask).sum()) == round(sparsity * weight.numel())
    assert not bool((result.mask & ~older).any())
    assert bool((result.weight[~result.mask] == 0).all())


def textbook(weight: Tensor, factor: InverseFactor, n: int, m: int, older: Tensor) -> tuple[Tensor, Tensor]:
    """SparseGPT for n:m one column at a time in fp64; a group's candidates are those the older mask keeps."""
    current, upper = weight.double().clone(), factor.upper.double()
    mask = older.clone()
    for j in range(weight.shape[1]):
        if j % m == 0:
            for row in range(weight.shape[0]):
                scores = [(float((current[row, k] / upper[k, k]).abs()), k) for k in range(j, j + m) if older[row, k]]
                kept = {k for _, k in sorted(scores)[-n:]}
                mask[row, j : j + m] = torch.tensor([k in kept for k in range(j, j + m)])
        error = torch.where(mask[:, j], 0.0, current[:, j]) / upper[j, j]
        current[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return current * mask, mask


def test_sparsegpt_inside_is_the_textbook_with_fewer_candidates(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _, inputs, _ = problem
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 16, generator=generator)
    older = magnitude_mask(torch.randn(24, 16, generator=generator), pattern="3:4")
    factor = factorize(inputs.T @ inputs)
    expected, mask = textbook(weight * older, factor, 2, 4, older)
    result = sparsegpt(weight * older, factor, pattern="2:4", inside=older)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "width", "m"), [(6, 14, 4), (6, 12, 4)])
def test_a_tail_of_inputs_stays_as_it_was(rows: int, width: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    older = magnitude_mask(weight, pattern="3:4")
    older[:, width // m * m :] = torch.rand(rows, width % m, generator=generator) < 0.5
    moment = torch.rand(width, generator=generator) + 0.1
    for mask in (
        magnitude_mask(weight, pattern="2:4", inside=older),
        wanda_mask(weight, moment, pattern="2:4", inside=older),
        random_mask((rows, width), "w", 0, pattern="2:4", inside=older),
        sparsegpt(weight * older, torch.diag(moment), pattern="2:4", inside=older).mask,
    ):
        assert not bool((mask & ~older).any()) and Pattern.parse("2:4").violations(mask) == 0
        assert torch.equal(mask[:, width // m * m :], older[:, width // m * m :])
        assert bool((mask[:, : width // m * m].reshape(rows, -1, m).sum(-1) == 2).all())


def test_a_method_by_itself_refuses_what_cannot_be() -> None:
    older = torch.ones(4, 8, dtype=torch.bool)
    older[0] = False
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    calls = [
        lambda: magnitude_mask(weight, sparsity=0.1, inside=older),
        lambda: magnitude_mask(weight, pattern="2:4", inside=older),
        lambda: random_mask((4, 8), "w", 0, removed=3, inside=older),
        lambda: wanda_mask(weight, torch.ones(8), sparsity=0.5, inside=older),
        lambda: sparsegpt(weight, torch.eye(8), sparsity=0.1, inside=older),
        lambda: sparsegpt(weight, torch.eye(8), pattern="2:4", inside=older),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="mask to stay inside"):
            call()


def test_ties_never_bring_a_removed_weight_back() -> None:
    """All scores equal: with every older mask and every count, only what it kept is kept."""
    weight = torch.zeros(3, 4)
    for bits in itertools.product([False, True], repeat=6):
        older = torch.tensor([*bits, *bits]).view(3, 4)
        gone = int((~older).sum())
        for removed in range(gone, 13):
            mask = magnitude_mask(weight, removed=removed, inside=older)
            assert int((~mask).sum()) == removed and not bool((mask & ~older).any())
