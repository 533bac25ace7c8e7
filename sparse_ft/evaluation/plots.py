"""PNG and SVG plots for the docs: perplexity against sparsity, one curve per method.

    rows = [{"method": "wanda", "sparsity": 0.5, "perplexity": pruned.perplexity}, ...]
    plot_curves(rows, "one_shot.png", baseline=dense.perplexity)

Needs matplotlib, the extra `report`; it is imported here only, when a plot is drawn.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import atomic_write
from sparse_ft.evaluation import formats

# Told apart in grey and by the colour-blind: each colour comes with a marker of its own.
_STYLES = (
    ("#d6812c", "o"),
    ("#0f7d76", "s"),
    ("#4a56c4", "^"),
    ("#b3263e", "D"),
    ("#7a6a00", "v"),
    ("#8b919c", "X"),
)
_INK, _SOFT, _GRID = "#181b20", "#59606c", "#e7e4dd"


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str = "sparsity",
    y: str = "perplexity",
    by: str = "method",
    baseline: float | None = None,
    title: str = "",
    x_label: str | None = None,
    y_label: str | None = None,
    log: bool | None = None,
) -> Path:
    """Draw `y` over `x`, one line per value of `by`, and write it whole or not at all.

    Rows with the same `x` and `by` (seeds) are drawn as their mean with the range as a bar; rows without a finite `y`
    are left out.

    Args:
        rows: flat mappings, as in the `rows` of a result file.
        path: `.png` or `.svg`; its directory must exist.
        x: key of the horizontal value; shares named `sparsity` or `density` are shown in percent.
        y: key of the vertical value.
        by: key that names the curve.
        baseline: the dense model's value, a dashed line.
        title: above the plot, none when empty.
        x_label: under the axis; the key when None.
        y_label: beside the axis; the key when None.
        log: logarithmic vertical axis; None decides by the range.

    Returns:
        The path.

    Raises:
        RuntimeError: if matplotlib is not installed.
        ValueError: if no row has the keys and a finite value, or the file name has another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"Cannot plot to '{path.name}'; use a file name that ends in .png or .svg.")
    series = _series(rows, x, y, by)
    if not series:
        raise ValueError(
            f"None of the {len(rows)} rows has '{by}', '{x}' and a finite '{y}'; check the names of the columns."
        )
    figure = _figure()
    axes = figure.add_subplot()
    for (name, points), (colour, marker) in zip(series.items(), _cycled(len(series)), strict=True):
        _draw(axes, name, points, colour, marker)
    values = [value for points in series.values() for found in points.values() for value in found]
    if log if log is not None else min(values) > 0 and max(values) / min(values) > 8:
        _make_log(axes, values if baseline is None else [*values, baseline])
    if baseline is not None:
        axes.axhline(baseline, color=_SOFT, linewidth=1.2, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            f"dense {formats.perplexity(baseline)}", (1.0, baseline), xycoords=("axes fraction", "data"),
            xytext=(-2, 4), textcoords="offset points", ha="right", va="bottom", color=_SOFT, fontsize=9,
        )  # fmt: skip
    positions = sorted({position for points in series.values() for position in points})
    if len(positions) <= 10:
        axes.set_xticks(positions)
    _dress(axes, x, x_label or x, y_label or y, title)
    written = io.BytesIO()
    metadata = {"Software": None} if path.suffix == ".png" else {"Date": None, "Creator": None}
    figure.savefig(written, format=path.suffix[1:], metadata=metadata, facecolor="white")
    atomic_write(path, written.getvalue())
    return path


def _series(rows: Sequence[Mapping[str, Any]], x: str, y: str, by: str) -> dict[str, dict[float, list[float]]]:
    """Values by curve and x, in order of appearance."""
    series: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if by in row and formats.finite(row.get(x)) and formats.finite(row.get(y)):
            series.setdefault(str(row[by]), {}).setdefault(float(row[x]), []).append(float(row[y]))
    return series


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "Plots need matplotlib, which is not installed; install it with `pip install 'sparse-ft[report]'`."
        ) from error
    return Figure(figsize=(7.2, 4.3), dpi=160, layout="constrained")


def _cycled(count: int) -> list[tuple[str, str]]:
    return [_STYLES[i % len(_STYLES)] for i in range(count)]


def _draw(axes: Any, name: str, points: Mapping[float, Sequence[float]], colour: str, marker: str) -> None:
    xs = sorted(points)
    means = [math.fsum(points[x]) / len(points[x]) for x in xs]
    below = [mean - min(points[x]) for x, mean in zip(xs, means, strict=True)]
    above = [max(points[x]) - mean for x, mean in zip(xs, means, strict=True)]
    spread = (below, above) if any(below) or any(above) else None
    axes.errorbar(
        xs, means, yerr=spread, label=name, color=colour, marker=marker, markersize=5.5, linewidth=1.9, capsize=3,
        markeredgecolor="white", markeredgewidth=0.8, zorder=3,
    )  # fmt: skip


def _make_log(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from sparse_ft.evaluation.charts import log_ticks

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(min(values), max(values))))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.tick(value)))


def _dress(axes: Any, x: str, x_label: str, y_label: str, title: str) -> None:
    """Few lines, readable labels: only the horizontal grid and the lower axis stay."""
    if x in ("sparsity", "density"):
        from matplotlib.ticker import PercentFormatter

        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(x_label, color=_SOFT)
    axes.set_ylabel(y_label, color=_SOFT)
    if title:
        axes.set_title(title, loc="left", color=_INK, fontweight="bold", fontsize=12, pad=12)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_SOFT)
    axes.tick_params(length=0, colors=_SOFT)
    axes.legend(frameon=False, labelcolor=_INK)
