"""Analytic scales: statistics from hooks, the published scan written again as loops, closed forms against grids."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from deltas.delta_models import batches, bits, finetuned_model, linear_names, randn
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.deltas import (
    DeltaProbe,
    analytic_scales,
    closed_form_eta,
    closed_form_mse,
    collect_moments,
    collect_statistics,
    kearns_saul,
    layer_statistics,
    published_scale,
    row_statistics,
)
from sparse_ft.models import find_targets, matrix_view, named_weights


def test_the_variance_proxy() -> None:
    for p in (0.01, 0.3, 0.49, 0.6, 0.99, 0.999):
        assert kearns_saul(p) == pytest.approx((1 - 2 * p) / math.log((1 - p) / p), rel=1e-9)
        assert kearns_saul(p) == pytest.approx(kearns_saul(1 - p), rel=1e-9)
    assert kearns_saul(0.5) == 0.5 and kearns_saul(0.0) == kearns_saul(1.0) == 0.0
    assert kearns_saul(0.5 + 1e-9) == pytest.approx(0.5)
    p, t = 0.99, np.linspace(-30, 30, 301)
    generating = np.log((1 - p) * np.exp(-p * t) + p * np.exp((1 - p) * t))  # of a centred Bernoulli variable
    assert (generating <= kearns_saul(p) * t**2 / 4 + 1e-9).all(), "the bound it stands for"


def test_row_statistics_in_fp64_with_a_bias_as_one_more_column() -> None:
    delta, mean, bias = randn(5, 9) * 1e-25, randn(9, seed=1), randn(5, seed=2) * 1e-25
    sums, squares = row_statistics(delta, mean, bias_delta=bias)
    entries = np.concatenate([delta.double().numpy() * mean.double().numpy(), bias.double().numpy()[:, None]], 1)
    np.testing.assert_allclose(sums.numpy(), entries.sum(1), rtol=1e-9)
    np.testing.assert_allclose(squares.numpy(), (entries**2).sum(1), rtol=1e-9)  # 1e-50: no fp32 number
    with pytest.raises(ValueError, match="must be"):
        row_statistics(delta, mean[:3])


def scan(sums: list[float], squares: list[float], density: float, eta: float) -> float:
    """The published scan, one row and one q at a time."""
    p, gamma = 1 - density, 0.05
    phi = (1 - 2 * p) / math.log((1 - p) / p)
    best, chosen, stopped = [math.inf] * len(sums), [density] * len(sums), [False] * len(sums)
    q = density
    while q <= 0.998 + 1e-9:
        for row, (s, square) in enumerate(zip(sums, squares, strict=True)):
            residual = abs(eta * (1 - density / q) * s + eta**2 * phi * square / (4 * q * q) + math.log(2 / gamma))
            previous = best[row]
            if residual <= previous:
                best[row], chosen[row] = residual, q
            if residual >= previous:
                stopped[row] = True
        if sum(stopped) / len(stopped) >= 0.8:
            break
        q += 0.001
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("eta", [0.1, 0.4, 3.0])
def test_the_published_scan_written_again(density: float, eta: float) -> None:
    for size, seed in ((1.0, 0), (30.0, 1), (300.0, 2)):
        sums, squares = randn(11, seed=seed).double() * size, randn(11, seed=seed + 9).double().square() * size
        expected = scan(sums.tolist(), squares.tolist(), density, eta)
        assert published_scale(sums, squares, density=density, eta=eta) == pytest.approx(expected, abs=1e-9)


def test_rows_without_a_delta_say_nothing() -> None:
    sums, squares = randn(6).double() * 30, randn(6, seed=1).double().square() * 30
    padded = [torch.cat([t, torch.zeros(20, dtype=torch.float64)]) for t in (sums, squares)]
    assert published_scale(*padded, density=0.01, eta=0.4) == published_scale(sums, squares, density=0.01, eta=0.4)
    assert published_scale(torch.zeros(3), torch.zeros(3), density=0.01, eta=0.4) == 0.01
    flat = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1e-30, dtype=torch.float64)
    assert published_scale(*flat, density=0.01, eta=0.4) == pytest.approx(0.011)  # the first tie stops the scan


@given(st.floats(-5, 5).filter(lambda s: abs(s) > 1e-2), st.floats(0.01, 5), st.floats(0.01, 0.9), st.floats(0.1, 2))
def test_closed_forms_equal_a_fine_grid(total: float, square: float, density: float, eta: float) -> None:
    """The minimisers over u = 1/q; the objective is a parabola in u, so its grid minimum lies within a step."""
    p = 1 - density
    s, q2 = torch.tensor([total], dtype=torch.float64), torch.tensor([square], dtype=torch.float64)
    for found, curve in (
        (
            closed_form_mse(q2, s.square(), density=density),
            lambda u: (1 - density * u) ** 2 * total**2 + p * density * u**2 * square,
        ),
        (
            closed_form_eta(s, q2, density=density, eta=eta),
            lambda u: abs(total) * (1 - density * u) + eta * kearns_saul(p) * square * u**2 / 4,
        ),
    ):
        best = 1 / found.item()
        grid = np.linspace(0.2 * best, 3 * best, 20001)
        assert abs(grid[np.argmin(curve(grid))] - best) <= 2 * (grid[1] - grid[0])


def test_the_mse_form_minimises_the_measured_error() -> None:
    """Monte Carlo: E H² over masks at q* is smaller than at 0.7 q* and 1.4 q*, and as the formula says."""
    generator = torch.Generator().manual_seed(0)
    c, density = randn(400).double() * 0.3 + 0.05, 0.05
    s, square = float(c.sum()), float(c.square().sum())
    best = closed_form_mse(torch.tensor(square), torch.tensor(s**2), density=density).item()
    masks = (torch.rand(20_000, 400, generator=generator) < density).double()
    errors = {q: (s - masks @ c / q).square().mean().item() for q in (0.7 * best, best, 1.4 * best)}
    assert errors[best] == min(errors.values())
    for q, error in errors.items():
        formula = (1 - density / q) ** 2 * s**2 + (1 - density) * density * square / q**2
        assert error == pytest.approx(formula, rel=0.05)


@given(st.floats(1e-6, 1e6))
def test_the_mse_form_is_free_of_scale_and_the_eta_form_is_not(factor: float) -> None:
    s, square = randn(8).double(), randn(8, seed=1).double().square()
    one = closed_form_mse(square, s.square(), density=0.1)
    torch.testing.assert_close(closed_form_mse(square * factor**2, (s * factor).square(), density=0.1), one)
    if not 0.9 < factor < 1.1:
        eta = closed_form_eta(s, square, density=0.1, eta=0.4)
        assert not torch.allclose(closed_form_eta(s * factor, square * factor**2, density=0.1, eta=0.4), eta, rtol=0.05)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_statistics_from_hooks_are_those_of_the_inputs(architecture: str) -> None:
    """Inputs and outputs recorded on their own: x̄, E x², and delta x itself, row by row."""
    model, base = finetuned_model(architecture, size=0.05)
    samples = batches(3)
    recorded: dict[str, list[torch.Tensor]] = {}
    targets = find_targets(model)
    modules = dict(model.named_modules())
    hooks = [
        modules[t.module].register_forward_hook(
            lambda module, args, output, name=t.name: recorded.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for t in targets
    ]
    for batch in samples:
        model(**batch)
    for hook in hooks:
        hook.remove()
    probe = DeltaProbe(model, base, density=0.1)
    statistics = collect_statistics(probe, samples)
    moments = collect_moments(model, samples)
    assert set(statistics) == set(moments) == {t.name for t in targets}
    for target in targets:
        x = torch.cat(recorded[target.name]).double()
        delta = matrix_view(probe.deltas[target.name], target.input_dim).double()
        bias = probe.deltas.get(f"{target.module}.bias")
        c_mean, made, spread = delta * x.mean(0), x @ delta.T, (delta.square() * x.square().mean(0)).sum()
        if bias is not None:
            c_mean, made = torch.cat([c_mean, bias.double()[:, None]], 1), made + bias.double()
            spread = spread + bias.double().square().sum()
        found = statistics[target.name]
        torch.testing.assert_close(found.sums, c_mean.sum(1), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(found.squares, c_mean.square().sum(1), rtol=1e-5, atol=1e-12)
        assert found.output_square == pytest.approx(made.square().sum(1).mean().item(), rel=1e-4)
        assert found.entry_square == pytest.approx(spread.item(), rel=1e-4)
        torch.testing.assert_close(moments[target.name].norms(), x.square().sum(0).sqrt(), rtol=1e-5, atol=1e-9)
        assert moments[target.name].tokens == len(x) and math.isnan(moments[target.name].delta_output)


def test_moments_of_parts_are_joined_by_adding_and_padding_does_not_count() -> None:
    model, base = finetuned_model("gpt2")
    deltas = DeltaProbe(model, base, density=0.1).deltas
    samples = batches(3)
    whole = collect_moments(model, samples, deltas=deltas)
    first, rest = collect_moments(model, samples[:1], deltas=deltas), collect_moments(model, samples[1:], deltas=deltas)
    mask = {"attention_mask": torch.tensor([[1] * 12 + [0] * 4] * 2)}
    padded = [{"input_ids": torch.cat([b["input_ids"], torch.full((2, 4), 2)], 1), **mask} for b in samples]
    without = collect_moments(model, padded, deltas=deltas)
    for name, moments in whole.items():
        for other in (first[name].joined(rest[name]), without[name]):
            assert other.tokens == moments.tokens == 72
            torch.testing.assert_close(other.mean, moments.mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(other.second_moment, moments.second_moment, rtol=1e-4, atol=1e-8)
            assert other.mean_delta_output == pytest.approx(moments.mean_delta_output, rel=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("form", ["published", "closed_form_eta", "closed_form_mse"])
def test_scales_of_a_model(form: str) -> None:
    model, base = finetuned_model("gpt2", size=0.05)
    before = {name: bits(tensor).clone() for name, tensor in named_weights(model).items()}
    probe = DeltaProbe(model, base, density=0.02)
    statistics = collect_statistics(probe, batches(1))
    eta = None if form == "closed_form_mse" else 0.4
    scales = analytic_scales(statistics, density=0.02, form=form, eta=eta, names=probe.names)  # type: ignore[arg-type]
    assert set(scales) == set(probe.names)
    assert all(0.02 <= q <= 1 for q in scales.values())
    layers = [scales[name] for name in linear_names(model)]
    mean = sum(layers) / len(layers)
    for name, q in scales.items():
        if name.endswith("bias") and f"{name.removesuffix('bias')}weight" in linear_names(model):
            assert q == scales[f"{name.removesuffix('bias')}weight"]
        elif name not in linear_names(model):
            assert q == pytest.approx(mean)
    probe.prune(scales)
    probe.restore()
    assert all(torch.equal(bits(tensor), before[name]) for name, tensor in named_weights(model).items())
    if form == "closed_form_mse":
        name = linear_names(model)[0]
        s = statistics[name]
        assert scales[name] == pytest.approx(min(0.02 + 0.98 * s.entry_square / s.output_square, 1.0))


def test_layers_without_a_delta_take_the_density() -> None:
    model, base = finetuned_model("llama", size=0.0)
    statistics = collect_statistics(DeltaProbe(model, base, density=0.1), batches(1))
    for form, eta in (("published", 0.4), ("closed_form_eta", 0.4), ("closed_form_mse", None)):
        scales = analytic_scales(statistics, density=0.1, form=form, eta=eta)  # type: ignore[arg-type]
        assert set(scales.values()) == {0.1}


def test_refusals() -> None:
    model, base = finetuned_model()
    probe = DeltaProbe(model, base, density=0.1)
    with pytest.raises(ValueError, match="no samples"):
        collect_statistics(probe, [])
    statistics = collect_statistics(probe, batches(1))
    with pytest.raises(ValueError, match="form is 'best'"):
        analytic_scales(statistics, density=0.1, form="best")  # type: ignore[arg-type]
    for form, eta in (("published", None), ("closed_form_mse", 0.3)):
        with pytest.raises(ValueError, match="do not fit"):
            analytic_scales(statistics, density=0.1, form=form, eta=eta)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="density is 0"):
        analytic_scales(statistics, density=0.0, form="closed_form_mse")
    with pytest.raises(ValueError, match="no layer statistics"):
        analytic_scales({}, density=0.1, form="closed_form_mse")
    with pytest.raises(ValueError, match=r"high is 0\.05"):
        analytic_scales(statistics, density=0.1, form="closed_form_mse", high=0.05)
    with pytest.raises(ValueError, match="probability is 1"):
        published_scale(randn(2), randn(2).abs(), density=0.1, eta=0.3, probability=1.0)
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        collect_moments(model.train(), batches(1))
    moments = collect_moments(model.eval(), batches(1), deltas=probe.deltas)[linear_names(model)[0]]
    assert layer_statistics(probe.deltas[linear_names(model)[0]], moments).output_square > 0
