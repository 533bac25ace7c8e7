"""Scales per layer from statistics of the deltas and the layers' inputs, without running a pruned model.

For one output neuron with c_j = delta_j x_j, S = sum c_j and Q = sum c_j^2, pruning at density d (drop rate p = 1 - d)
with the divisor q changes the output by H with E H = (1 - d/q) S and Var H = p d Q / q^2.

    published   q minimising | eta (1 - d/q) S + eta^2 phi(p) Q / (4 q^2) + ln(2 / gamma) |, by an ascending scan per
                row, averaged over the rows; x is the mean input, phi(p) = (1 - 2p) / ln((1 - p) / p), and
                gamma = 1 - probability
    eta form    q = eta phi(p) Q / (2 d |S|), which minimises |S| (1 - d/q) + eta phi(p) Q / (4 q^2)
    MSE form    q = d + p Q / S^2, which minimises E H^2; no eta, and the scale of delta and inputs cancels

eta is the one free number of the first two; `search_eta` finds it on an objective.

Example:
    >>> statistics = collect_statistics(probe, batches)
    >>> scales = analytic_scales(statistics, density=0.01, form="published", eta=0.4, names=probe.names)

Limits: never a default. All layers are treated alone, but shrinking every delta a little compounds through depth while
the noise averages out: the MSE form measured worse than plain DARE. Mean inputs are near zero after a layer norm.

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, section 4.1 and its appendix on the analytic solution;
phi: Kearns & Saul 1998. The closed forms follow from the equations above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_ft.deltas.checks import check_delta, check_scale
from sparse_ft.deltas.darex_moments import InputMoments, collect_moments
from sparse_ft.deltas.darex_objectives import Batch
from sparse_ft.deltas.probe import DeltaProbe
from sparse_ft.deltas.random_mask import check_density
from sparse_ft.models import matrix_view

Form = Literal["published", "closed_form_eta", "closed_form_mse"]
_SCAN_CHUNK = 64  # values of q scanned together: the table of a wide layer stays in the cache
FORMS: tuple[Form, ...] = ("published", "closed_form_eta", "closed_form_mse")


@dataclass(frozen=True)
class LayerStatistics:
    """What the analytic forms need of one layer.

    Attributes:
        sums: (out,) fp64, S of each row at the mean input.
        squares: (out,) fp64, Q of each row at the mean input.
        output_square: token mean of the sum over rows of S^2, which is ||delta x||^2.
        entry_square: token mean of the sum over rows of Q, which is sum_ij delta_ij^2 E[x_j^2].
    """

    sums: Tensor
    squares: Tensor
    output_square: float
    entry_square: float


def kearns_saul(drop_rate: float) -> float:
    """phi(p) = (1 - 2p) / ln((1 - p) / p), the variance proxy of a centred Bernoulli variable; 1/2 at p = 1/2.

    Args:
        drop_rate: p, 0..1.

    Raises:
        ValueError: a rate outside 0..1.

    Example:
        >>> kearns_saul(0.5)
        0.5
    """
    p = check_density(drop_rate)
    if p in (0.0, 1.0):
        return 0.0
    x = 1 - 2 * p
    return 0.5 if abs(x) < 1e-8 else x / (2 * math.atanh(x))


@torch.no_grad()
def row_statistics(delta: Tensor, mean_input: Tensor, *, bias_delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S and Q of every row at the mean input, in fp64.

    Args:
        delta: (out, in).
        mean_input: (in,), signed.
        bias_delta: (out,), the delta of the layer's bias: one more column, whose input is 1.

    Returns:
        sums (out,), squares (out,).

    Raises:
        ValueError: sizes that do not fit, or NaN or infinite deltas.

    Example:
        >>> row_statistics(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 1.0]))
        (tensor([5.], dtype=torch.float64), tensor([13.], dtype=torch.float64))
    """
    check_delta(delta)
    if delta.ndim != 2 or mean_input.shape != delta.shape[1:]:
        raise ValueError(
            f"The delta has shape {tuple(delta.shape)} and the mean input {tuple(mean_input.shape)}; they must be "
            "(out, in) and (in,)."
        )
    wide, mean = delta.double(), mean_input.to(delta.device).double()
    sums, squares = wide @ mean, wide.square() @ mean.square()
    if bias_delta is not None:
        sums, squares = sums + bias_delta.double(), squares + bias_delta.double().square()
    return sums, squares


@torch.no_grad()
def layer_statistics(delta: Tensor, moments: InputMoments, *, bias_delta: Tensor | None = None) -> LayerStatistics:
    """Statistics of one layer from its delta and the moments of its inputs.

    Args:
        delta: (out, in).
        moments: of the layer's inputs, with the delta output.
        bias_delta: (out,), the delta of the layer's bias.

    Raises:
        ValueError: as `row_statistics`.

    Example:
        >>> layer_statistics(delta, collect_moments(model, batches, deltas={name: delta})[name])
    """
    sums, squares = row_statistics(delta, moments.mean, bias_delta=bias_delta)
    second = moments.second_moment.to(delta.device)
    entries = float((delta.double().square() @ second).sum())
    if bias_delta is not None:
        entries += float(bias_delta.double().square().sum())
    return LayerStatistics(sums, squares, moments.mean_delta_output, entries)


def collect_statistics(probe: DeltaProbe, batches: Iterable[Batch]) -> dict[str, LayerStatistics]:
    """Run the fine-tuned model over batches and compute the statistics of every linear layer the probe prunes.

    Args:
        probe: holds the fine-tuned model, in eval mode, and the deltas; the model is restored first.
        batches: forward arguments or token ids (B, T). In the paper: 50 windows of 128 tokens of WikiText-2.

    Raises:
        ValueError: as `collect_moments`.

    Example:
        >>> statistics = collect_statistics(probe, batches)
    """
    probe.restore()
    deltas = probe.deltas
    found = {}
    for name, moments in collect_moments(probe.model, batches, deltas=deltas).items():
        bias = f"{name.rpartition('.')[0]}.bias"
        bias_delta = deltas[bias] if bias in deltas else None
        found[name] = layer_statistics(matrix_view(deltas[name], moments.input_dim), moments, bias_delta=bias_delta)
    return found


@torch.no_grad()
def published_scale(
    sums: Tensor,
    squares: Tensor,
    *,
    density: float,
    eta: float,
    probability: float = 0.95,
    stop_share: float = 0.8,
    spacing: float = 1e-3,
    high: float = 0.998,
) -> float:
    """The scale of one layer by the published scan: per row the q with the smallest residual, averaged over rows.

    All rows step through q = density + i * spacing together. A row takes each q whose residual is no larger than its
    smallest so far, and counts as stopped once a residual was not smaller; the scan ends when `stop_share` have.
    Rows without any delta say nothing about q and are left out. The sign of S is kept, as published: a row with S < 0
    may find the q where the residual crosses zero instead of a minimum.

    Args:
        sums: (out,) S per row, see `row_statistics`.
        squares: (out,) Q per row.
        density: share kept, above 0: the first q.
        eta: positive.
        probability: that the bound holds; gamma = 1 - probability, in (0, 1).
        stop_share: share of rows that end the scan.
        spacing: of the q.
        high: last q.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> published_scale(sums, squares, density=0.01, eta=0.4)

    Source: arXiv 2410.09344, appendix, analytic solution.
    """
    density = _positive_density(density)
    check_scale(eta)
    if not 0 < probability < 1 or not 0 < stop_share <= 1 or not spacing > 0:
        raise ValueError(
            f"probability is {probability}, stop_share {stop_share} and spacing {spacing}; they must lie in (0, 1), "
            "(0, 1] and above 0."
        )
    alive = squares > 0
    sums, squares = sums[alive].double(), squares[alive].double()
    if not len(sums):
        return density
    noise = eta**2 * kearns_saul(1 - density) * squares / 4
    offset = math.log(2 / (1 - probability))
    best = torch.full_like(sums, math.inf)
    scales = torch.full_like(sums, density)
    stopped = torch.zeros_like(sums, dtype=torch.bool)
    steps = torch.arange(max(int((high - density) / spacing + 1e-6), 0) + 1, device=sums.device)
    for part in steps.split(_SCAN_CHUNK):
        q = density + part.double() * spacing
        residual = (eta * (1 - density / q) * sums[:, None] + noise[:, None] / q**2 + offset).abs()
        smallest = torch.cat([best[:, None], residual], 1).cummin(1).values  # column j: before the j-th q
        stops = ((residual >= smallest[:, :-1]).cumsum(1) > 0) | stopped[:, None]
        enough = (stops.double().mean(0) >= stop_share).nonzero()
        count = int(enough[0]) + 1 if len(enough) else len(part)
        better = residual[:, :count] <= smallest[:, :count]
        last = (better * torch.arange(1, count + 1, device=sums.device)).amax(1)  # 0: none
        scales = torch.where(last > 0, q[(last - 1).clamp(min=0)], scales)
        best, stopped = smallest[:, count], stops[:, count - 1]
        if len(enough):
            break
    return float(scales.mean())


def closed_form_eta(sums: Tensor, squares: Tensor, *, density: float, eta: float) -> Tensor:
    """q = eta phi(p) Q / (2 d |S|) of every row, unclipped: the minimiser of |S| (1 - d/q) + eta phi(p) Q / (4 q^2).

    Args:
        sums: S, any shape.
        squares: Q, same shape.
        density: share kept, above 0.
        eta: positive.

    Returns:
        fp64 of the same shape; infinite where S is 0 and Q is not, NaN where both are.

    Raises:
        ValueError: density 0 or outside 0..1, or eta not positive.

    Example:
        >>> closed_form_eta(torch.tensor(1.0), torch.tensor(1.0), density=0.5, eta=0.5)
        tensor(0.2500, dtype=torch.float64)
    """
    density = _positive_density(density)
    return check_scale(eta) * kearns_saul(1 - density) * squares.double() / (2 * density * sums.double().abs())


def closed_form_mse(squares: Tensor, squared_sums: Tensor, *, density: float) -> Tensor:
    """q = d + p Q / S^2, unclipped: the minimiser of E H^2 = (1 - d/q)^2 S^2 + p d Q / q^2.

    Args:
        squares: Q per row; for a whole layer their sum over rows. Averaged over tokens either way.
        squared_sums: S^2, likewise: average S^2, not S.
        density: share kept, above 0.

    Returns:
        fp64 of the same shape; infinite where S is 0 and Q is not, NaN where both are.

    Raises:
        ValueError: density 0 or outside 0..1.

    Example:
        >>> closed_form_mse(torch.tensor(1.0), torch.tensor(2.0), density=0.5)
        tensor(0.7500, dtype=torch.float64)
    """
    density = _positive_density(density)
    return density + (1 - density) * squares.double() / squared_sums.double()


def analytic_scales(
    statistics: Mapping[str, LayerStatistics],
    *,
    density: float,
    form: Form = "published",
    eta: float | None = None,
    names: Iterable[str] = (),
    high: float = 1.0,
) -> dict[str, float]:
    """One scale per tensor by an analytic form, clipped to [density, high].

    Args:
        statistics: of the linear layers, by weight name.
        density: share kept, above 0.
        form: "published", "closed_form_eta" (both need eta; the mean over the rows that have a delta) or
            "closed_form_mse" (one q per layer).
        eta: positive; only for the first two.
        names: all tensors that are pruned. One without statistics takes its weight's scale if it is a layer's bias,
            else the mean over all layers.
        high: largest scale.

    Raises:
        ValueError: no layer, another form, eta missing or given in vain, density 0, or high below density.

    Example:
        >>> analytic_scales(statistics, density=0.01, form="closed_form_mse", names=probe.names)
    """
    density = _positive_density(density)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; choose one of {', '.join(FORMS)}.")
    if (eta is None) != (form == "closed_form_mse"):
        raise ValueError(f"form '{form}' and eta={eta} do not fit: the MSE form takes no eta, the others need one.")
    if not statistics:
        raise ValueError("There are no layer statistics; collect them with `collect_statistics` on at least one batch.")
    if not density <= high:
        raise ValueError(f"high is {high:g} but the density is {density:g}; the scale lies between the two.")
    scales = {name: _layer_scale(layer, density, form, eta, high) for name, layer in statistics.items()}
    mean = sum(scales.values()) / len(scales)
    for name in names:
        if name not in scales:
            module, _, leaf = name.rpartition(".")
            scales[name] = scales.get(f"{module}.weight", mean) if leaf == "bias" else mean
    return scales


def _layer_scale(layer: LayerStatistics, density: float, form: Form, eta: float | None, high: float) -> float:
    if form == "published":
        scale = published_scale(layer.sums, layer.squares, density=density, eta=eta or 0.0)
        return min(max(scale, density), high)
    if form == "closed_form_eta":
        alive = layer.squares > 0
        rows = closed_form_eta(layer.sums[alive], layer.squares[alive], density=density, eta=eta or 0.0)
    else:
        entries, square = torch.tensor([[layer.entry_square], [layer.output_square]], dtype=torch.float64)
        rows = closed_form_mse(entries, square, density=density)[entries > 0]
    return float(rows.clamp(density, high).mean()) if len(rows) else density


def _positive_density(density: float) -> float:
    density = check_density(density)
    if density == 0.0:
        raise ValueError("density is 0: nothing is kept, so there is no scale; use a density above 0.")
    return density
