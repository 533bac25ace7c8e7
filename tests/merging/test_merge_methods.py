"""Merge methods against their formulas written a second time, and the properties that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from merging import merge_formulas as formulas
from torch import Tensor

from sparse_ft.merging import chunks
from sparse_ft.merging.breadcrumbs import breadcrumbs
from sparse_ft.merging.dare import dare_linear, dare_ties, darex_q
from sparse_ft.merging.della import della, keep_probabilities
from sparse_ft.merging.linear import linear
from sparse_ft.merging.plan import Compatibility
from sparse_ft.merging.slerp import slerp
from sparse_ft.merging.task_arithmetic import task_arithmetic
from sparse_ft.merging.ties import ties

SHAPE = (37, 64)
WEIGHTS = {"equal": [1.0, 1.0, 1.0], "different": [0.75, 0.25, 1.125], "with_zero": [0.5, 0.0, 0.25]}  # exact in fp32
BOTH: tuple[Compatibility, ...] = ("paper", "mergekit")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several chunks per tensor, so that what spans chunks is tested."""
    monkeypatch.setattr(chunks, "CHUNK", 500)
    yield


def models(kind: str, count: int = 3, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator)
    noise = [torch.randn(shape, generator=generator) * 0.3 for _ in range(count)]
    if kind == "lattice":  # few different deltas: equal ones at thresholds, sums of exactly zero
        base = (base * 8).round() / 8
        return base, [base + (n * 8).round() / 8 for n in noise]
    return base, [base + n for n in noise]


def draws(count: int, density: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(SHAPE, generator=generator) < density for _ in range(count)]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def trimmed(deltas: list[Tensor], density: float, mergekit: bool) -> list[Tensor]:
    n = deltas[0].numel()
    count = max(1, int(density * n)) if mergekit else round(density * n)
    return [formulas.top(delta, count) for delta in deltas]


def taking_part(deltas: list[Tensor], weights: list[float]) -> tuple[list[Tensor], list[float]]:
    """A model of weight zero does not vote."""
    chosen = [k for k, weight in enumerate(weights) if weight]
    return [deltas[k] for k in chosen], [weights[k] for k in chosen]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_sums(weights: list[float], normalize: bool) -> None:
    base, tensors = models("random")
    close(
        task_arithmetic(base, tensors, weights, normalize=normalize, lam=1.3),
        formulas.weighted_sum(base, formulas.deltas_of(base, tensors), weights, normalize, 1.3),
    )
    total = sum(w * tensor.double() for w, tensor in zip(weights, tensors, strict=True))
    close(linear(tensors, weights, normalize=normalize), total / (sum(weights) if normalize else 1.0))


@pytest.mark.parametrize("kind", ["random", "lattice"])
@pytest.mark.parametrize("compatibility", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_ties(weights: list[float], normalize: bool, compatibility: Compatibility, kind: str) -> None:
    base, tensors = models(kind)
    found = ties(base, tensors, weights, [0.3] * 3, normalize=normalize, lam=0.9, compatibility=compatibility)
    deltas = trimmed(formulas.deltas_of(base, tensors), 0.3, compatibility == "mergekit")
    expected = formulas.elected(base, *taking_part(deltas, weights), normalize, 0.9, compatibility == "mergekit")
    close(found, expected)


@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_a_sum_of_zero_takes_the_sign_that_prevails(flip: float) -> None:
    """The papers' rule needs the whole tensor, and both outcomes must be right."""
    shape = (2000,)
    base, one, two = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    one[:1000], two[:1000] = 1.0, -1.0  # undecided
    one[1000:1400], one[1400:1500] = flip, -flip
    found = ties(base, [one, two], [1, 1], [1, 1])
    assert torch.equal(found[:1000], torch.full((1000,), flip))
    by_mergekit = ties(base, [one, two], [1, 1], [1, 1], compatibility="mergekit")
    assert torch.equal(by_mergekit[:1000], torch.ones(1000))


def test_negative_weights() -> None:
    base, tensors = models("random")
    weights = [1.0, -0.4, 0.8]
    for compatibility in BOTH:
        mergekit = compatibility == "mergekit"
        found = ties(base, tensors, weights, [0.5] * 3, normalize=False, compatibility=compatibility)
        deltas = trimmed(formulas.deltas_of(base, tensors), 0.5, mergekit)
        close(found, formulas.elected(base, deltas, weights, False, 1.0, mergekit))


@pytest.mark.parametrize("compatibility", BOTH)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("elect", [True, False])
def test_dare(elect: bool, rescale: bool, compatibility: Compatibility) -> None:
    base, tensors = models("random")
    weights, densities, masks = WEIGHTS["different"], [0.4, 1.0, 0.4], draws(3, 0.4)
    method = dare_ties if elect else dare_linear
    found = method(
        base, tensors, weights, densities, masks, rescale=rescale, normalize=True, lam=1.1, compatibility=compatibility
    )
    deltas = []
    for delta, density, mask in zip(formulas.deltas_of(base, tensors), densities, masks, strict=True):
        kept = delta * mask if density < 1 else delta
        factor = 1 / density if compatibility == "paper" else formulas.l1_factor(delta, kept)
        deltas.append(kept * factor if rescale else kept)
    if elect:
        close(found, formulas.elected(base, deltas, weights, True, 1.1, compatibility == "mergekit"))
    else:
        close(found, formulas.weighted_sum(base, deltas, weights, True, 1.1))


def test_darex_q_divides_by_q_and_is_dare_at_the_density() -> None:
    base, tensors = models("random")
    weights, masks, scales = WEIGHTS["different"], draws(3, 0.4), [0.5, 0.7, 0.9]
    kept = [d * m / q for d, m, q in zip(formulas.deltas_of(base, tensors), masks, scales, strict=True)]
    found = darex_q(base, tensors, weights, [0.4] * 3, masks, scales)
    close(found, formulas.weighted_sum(base, kept, weights, False, 1.0))
    assert torch.equal(
        darex_q(base, tensors, weights, [0.4] * 3, masks, [0.4] * 3),
        dare_linear(base, tensors, weights, [0.4] * 3, masks),
    )
    with pytest.raises(ValueError, match="q > 0"):
        darex_q(base, tensors, weights, [0.4] * 3, masks, [0.4, 0.0, 0.4])


@pytest.mark.parametrize("compatibility", BOTH)
@pytest.mark.parametrize("elect", [True, False])
def test_della(elect: bool, compatibility: Compatibility) -> None:
    base, tensors = models("lattice")
    weights, generator = WEIGHTS["different"], torch.Generator().manual_seed(2)
    uniforms = [torch.rand(SHAPE, generator=generator) for _ in range(3)]
    found = della(
        base,
        tensors,
        weights,
        [0.5] * 3,
        [0.2] * 3,
        uniforms,
        elect=elect,
        normalize=elect,
        compatibility=compatibility,
    )
    deltas = []
    for delta, uniform in zip(formulas.deltas_of(base, tensors), uniforms, strict=True):
        pi = formulas.probabilities(delta, 0.5, 0.2)
        kept = delta * (uniform < pi)
        deltas.append(kept / pi if compatibility == "paper" else kept * formulas.l1_factor(delta, kept))
    if elect:
        close(found, formulas.elected(base, deltas, weights, True, 1.0, compatibility == "mergekit"))
    else:
        close(found, formulas.weighted_sum(base, deltas, weights, False, 1.0))


def test_della_probabilities() -> None:
    delta = models("lattice")[1][0]
    pi = keep_probabilities(delta, 0.6, 0.3)
    torch.testing.assert_close(pi, formulas.probabilities(delta, 0.6, 0.3))
    torch.testing.assert_close(pi.mean(-1), torch.full((SHAPE[0],), 0.6, dtype=torch.float64))
    order = torch.argsort(delta.abs(), dim=-1, stable=True)
    assert bool((pi.gather(-1, order).diff(dim=-1) > 0).all()), "a larger entry is kept more often"
    assert float(keep_probabilities(torch.ones(5, 1), 0.5, 0.2).sum()) == 2.5
    with pytest.raises(ValueError, match="lower epsilon"):
        keep_probabilities(delta, 0.1, 0.15)


@pytest.mark.parametrize("kind", ["random", "lattice"])
@pytest.mark.parametrize("elect", [True, False])
@pytest.mark.parametrize(("density", "gamma"), [(0.6, 0.01), (0.9, 0.3), (0.5, 0.0)])
def test_breadcrumbs(density: float, gamma: float, elect: bool, kind: str) -> None:
    base, tensors = models(kind)
    weights = WEIGHTS["different"]
    found = breadcrumbs(base, tensors, weights, [density] * 3, [gamma] * 3, elect=elect)
    deltas = [formulas.middle(delta, density, gamma) for delta in formulas.deltas_of(base, tensors)]
    if elect:
        close(found, formulas.elected(base, deltas, weights, False, 1.0, False))
    else:
        close(found, formulas.weighted_sum(base, deltas, weights, False, 1.0))


def test_breadcrumbs_and_ties_keep_exact_counts() -> None:
    base, tensors = models("lattice", 1)
    tensors = [tensors[0] + 1e-3]  # no delta is zero
    n = base.numel()
    for density in (0.0, 0.001, 0.37, 0.5, 0.999):
        middle = breadcrumbs(base * 0, [tensors[0] - base], [1], [density], [0.01])
        assert int((middle != 0).sum()) == int(density * n)
        largest = ties(base * 0, [tensors[0] - base], [1], [density])
        assert int((largest != 0).sum()) == round(density * n)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp(t: float) -> None:
    base, (other,) = models("random", 1)
    other = torch.randn_like(other)
    found = slerp(base, other, t)
    close(found, formulas.arc(base, other, t))
    if t in (0.0, 1.0):
        assert torch.equal(found, other if t else base)
    close(slerp(base, base * 1.5, t), formulas.arc(base, base * 1.5, t))
    length = slerp(base / base.norm(), other / other.norm(), t).norm()
    assert math.isclose(float(length), 1.0, rel_tol=1e-5)
    close(slerp(base, base * 0, t), formulas.arc(base, base * 0, t))


def all_ones(count: int) -> list[Tensor]:
    return [torch.ones(SHAPE, dtype=torch.bool)] * count


DELTA_METHODS: dict[str, Any] = {
    "task_arithmetic": lambda b, t, w, **k: task_arithmetic(b, t, w, **k),
    "ties": lambda b, t, w, **k: ties(b, t, w, [1.0] * len(t), **k),
    "dare_linear": lambda b, t, w, **k: dare_linear(b, t, w, [1.0] * len(t), all_ones(len(t)), **k),
    "dare_ties": lambda b, t, w, **k: dare_ties(b, t, w, [1.0] * len(t), all_ones(len(t)), **k),
    "breadcrumbs": lambda b, t, w, **k: breadcrumbs(b, t, w, [1.0] * len(t), [0.01] * len(t), **k),
    "breadcrumbs_ties": lambda b, t, w, **k: breadcrumbs(b, t, w, [1.0] * len(t), [0.01] * len(t), elect=True, **k),
    "della": lambda b, t, w, **k: della(b, t, w, [1.0] * len(t), [0.1] * len(t), [b * 0] * len(t), **k),
    "della_linear": partial(
        lambda b, t, w, **k: della(b, t, w, [1.0] * len(t), [0.1] * len(t), [b * 0] * len(t), elect=False, **k)
    ),
}


@pytest.mark.parametrize("name", DELTA_METHODS)
def test_what_holds_for_every_delta_method(name: str) -> None:
    method = DELTA_METHODS[name]
    base, tensors = models("random")
    base, tensors = base.bfloat16(), [tensor.bfloat16() for tensor in tensors]
    assert torch.equal(method(base, tensors[:1], [1.0]).bfloat16(), tensors[0]), "one model alone is itself"
    assert torch.equal(method(base, tensors, [0.0] * 3), base.float()), "no weight, no change"
    once, twice = (method(base, tensors, [0.5, 0.3, 0.9], lam=lam) - base.float() for lam in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-6)
    forward = method(base, tensors, [0.5, 0.3, 0.9])
    backward = method(base, tensors[::-1], [0.9, 0.3, 0.5])
    torch.testing.assert_close(forward, backward, rtol=1e-5, atol=1e-6)


def test_ties_of_agreeing_deltas_is_their_weighted_mean_and_entries_have_the_elected_sign() -> None:
    base, tensors = models("random")
    up = [base + (tensor - base).abs() for tensor in tensors]
    weights = WEIGHTS["different"]
    for compatibility in BOTH:
        mean = sum(w * (x - base).double() for w, x in zip(weights, up, strict=True)) / sum(weights)
        close(ties(base, up, weights, [1.0] * 3, compatibility=compatibility), base.double() + mean)
        merged = ties(base * 0, [t - base for t in tensors], weights, [0.4] * 3, compatibility=compatibility)
        deltas = trimmed([(t - base).double() for t in tensors], 0.4, compatibility == "mergekit")
        factor = weights if compatibility == "mergekit" else [1.0] * 3
        votes = sum(w * d for w, d in zip(factor, deltas, strict=True))
        assert bool(((merged.sign() == votes.sign()) | (merged == 0)).all())


def test_linear_is_idempotent_and_refuses_a_sum_of_zero() -> None:
    tensor = models("random")[0]
    torch.testing.assert_close(linear([tensor] * 3, [0.2, 0.5, 0.9]), tensor)
    with pytest.raises(ValueError, match="sum to 0"):
        linear([tensor, tensor], [1.0, -1.0])


def test_l1_rescale_keeps_the_norm_and_the_papers_is_unbiased() -> None:
    base, tensors = models("random", 1)
    zero, delta = base * 0, tensors[0] - base
    kept = dare_linear(zero, [delta], [1], [0.3], draws(1, 0.3), compatibility="mergekit")
    torch.testing.assert_close(kept.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=0)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(SHAPE)
    for _ in range(200):
        total += dare_linear(zero, [delta], [1], [0.5], [torch.rand(SHAPE, generator=generator) < 0.5])
    error = (total / 200 - delta) / delta.abs()
    assert abs(float(error.mean())) < 0.01
    assert float(error.std()) == pytest.approx(1 / math.sqrt(200), rel=0.1)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 1), (), (0, 4)], ids=str)
def test_odd_tensors_give_numbers(shape: tuple[int, ...]) -> None:
    base = torch.full(shape, 0.5)
    for tensors in ([base.clone(), base.clone()], [base + 1, base - 1]):
        for density in (0.0, 1e-9, 0.5, 1.0):
            keep, uniform = [torch.zeros(shape, dtype=torch.bool)] * 2, [base * 0] * 2
            two, window = [density] * 2, [1e-10] * 2
            for compatibility in BOTH:
                results = [
                    ties(base, tensors, [1, 1], two, compatibility=compatibility),
                    ties(base, tensors, [1, 1], two, compatibility=compatibility, rescale=True),
                    dare_linear(base, tensors, [1, 1], two, keep, compatibility=compatibility),
                    dare_ties(base, tensors, [1, 1], two, keep, compatibility=compatibility),
                    breadcrumbs(base, tensors, [1, 1], two, [0.01] * 2, compatibility=compatibility),
                    della(base, tensors, [1, 1], two, window, uniform, compatibility=compatibility),
                    slerp(base, tensors[0], 0.5),
                ]
                for result in results:
                    assert result.shape == torch.Size(shape)
                    assert bool(result.isfinite().all())


def test_zeros_that_all_models_share_stay_zero() -> None:
    base, tensors = models("random")
    mask = draws(1, 0.5)[0]
    base, *tensors = (torch.where(mask, tensor, 0.0) for tensor in (base, *tensors))
    results = [
        linear(tensors, [1, 1, 1]), ties(base, tensors, [1, 1, 1], [0.5] * 3),
        dare_ties(base, tensors, [1, 1, 1], [0.4] * 3, draws(3, 0.4)), slerp(base, tensors[0], 0.4),
        breadcrumbs(base, tensors, [1, 1, 1], [0.9] * 3, [0.01] * 3),
    ]  # fmt: skip
    for result in results:
        assert bool((result[~mask] == 0).all())
        assert not bool(result[~mask].signbit().any()), "a pruned weight is +0"


def test_nan_is_refused() -> None:
    base, tensors = models("random")
    tensors[1][3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        task_arithmetic(base, tensors, [1, 1, 1])
    huge = [torch.full((9000,), 3e38), torch.full((9000,), 3e38)]
    assert bool(linear(huge, [0.5, 0.5]).isfinite().all()), "a sum over the tensor may overflow"
