"""The charts of a report as inline SVG: heat map, bars, and a piece of a mask; curves are in `line_charts.py`.

Colours are classes that `style.py` defines for light and dark; each mark carries its exact number as `data-value` and
its description as `<title>`, which browsers show as a tooltip and screen readers read out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ft.evaluation import formats
from sparse_ft.evaluation.markup import Markup, join, tag

WIDTH = 1000


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: a share of zeros, what it is, and whether something is wrong with it."""

    share: float
    description: str
    alarm: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar: `value` may be None (not measured), inf or nan; `kind` picks the colour; `group` is a heading."""

    label: str
    value: Any
    kind: str = "pruned"
    group: str = ""
    note: str = ""


def heat_map(cells: Mapping[tuple[str, str], Cell], columns: Sequence[str], rows: Sequence[str], name: str) -> Markup:
    """A grid of shares, darker for more zeros; the scale is always 0 to 100%, so that two reports compare.

    Args:
        cells: by (column, row); absent ones are drawn as gaps.
        columns: blocks, in order of depth. Short names are made from them.
        rows: roles, top to bottom.
        name: what the picture shows, read out by screen readers.
    """
    left, top, height = label_width(rows), 34, 30
    wide = max(7.0, min(96.0, (WIDTH - left) / max(1, len(columns))))
    total_width, total_height = left + wide * len(columns), top + height * len(rows)
    every = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if step * wide >= 30)
    marks: list[Markup] = []
    for i, (column, label) in enumerate(zip(columns, short_labels(columns), strict=True)):
        if i % every == 0:
            marks.append(tag("text", label, x=left + (i + 0.5) * wide, y=top - 12, text_anchor="middle", class_="axis"))
        for j, row in enumerate(rows):
            marks.append(_cell(cells.get((column, row)), left + i * wide, top + j * height, wide, height))
    for j, row in enumerate(rows):
        marks.append(tag("text", row, x=0, y=top + (j + 0.5) * height, class_="label"))
    return picture(name, total_width, total_height, *marks, class_="heat")


def bars(items: Sequence[Bar], name: str, *, baseline: tuple[str, float] | None = None) -> Markup:
    """Horizontal bars of perplexity, from 0 or, when the range needs it, on a log scale from 1 (= 0 nats).

    Args:
        items: from top to bottom; a heading is drawn where `group` changes.
        name: what the picture shows.
        baseline: (label, value) of a dashed line across.
    """
    left, right, step = label_width([b.label for b in items]), 150, 36
    numbers = [b.value for b in items if formats.finite(b.value)] + ([baseline[1]] if baseline else [])
    log = needs_log(numbers)
    top_value = max(numbers, default=1.0)
    ticks = log_ticks(1.0, top_value) if log else linear_ticks(0.0, top_value)
    low, high = ticks[0], max(ticks[-1], top_value)
    at = scale(low, high, left, WIDTH - right, log)
    y, marks = 30.0 if baseline else 14.0, list[Markup]()
    previous = ""
    for bar in items:
        if bar.group != previous:
            marks.append(tag("text", bar.group, x=0, y=y + 28, class_="group"))
            y, previous = y + 42, bar.group
        marks.append(_bar(bar, y, step, at, low, WIDTH - right))
        y += step
    grid = [_grid_line(at(t), formats.tick(t), 24 if baseline else 8, y) for t in ticks if t <= high]
    line = _baseline(baseline, at(baseline[1]), y) if baseline else None
    # the line goes under the bars, so that it strikes through no number
    return picture(f"{name}{', log scale' if log else ''}", WIDTH, y + 28, *grid, line, *marks, class_="bars")


def mask_picture(lines: Sequence[str], name: str) -> Markup:
    """A piece of a real mask: one square per weight, filled where it is kept.

    Args:
        lines: strings of `1` (kept) and `0` (pruned), one per output row.
        name: which weights these are.
    """
    unit, gap = 10, 2
    squares = {"1": "", "0": ""}
    for y, line in enumerate(lines):
        for x, bit in enumerate(line):
            squares["1" if bit == "1" else "0"] += f"M{x * unit},{y * unit}h{unit - gap}v{unit - gap}h-{unit - gap}z"
    width = unit * max((len(line) for line in lines), default=0) - gap
    return picture(
        name,
        width,
        unit * len(lines) - gap,
        tag("path", d=squares["0"], class_="off"),
        tag("path", d=squares["1"], class_="on"),
        class_="mask",
    )


def short_labels(blocks: Sequence[str]) -> list[str]:
    """The number of each block, with the stack's initial where there are several stacks: `e0 … d0`."""
    stacks = {block.rpartition(".")[0] for block in blocks}
    initials = {stack: stack[:1] if len(stacks) > 1 else "" for stack in stacks}
    return [initials[block.rpartition(".")[0]] + (block.rpartition(".")[2] or "–") for block in blocks]


def label_width(labels: Sequence[str]) -> float:
    """Room to the left of a chart for its labels, which start at the edge of the text column."""
    return min(300.0, 8.2 * max((len(label) for label in labels), default=0) + 22)


def needs_log(values: Sequence[float]) -> bool:
    """True when the largest is so far above the smallest that a linear bar of the smallest would be a stub."""
    return bool(values) and min(values) >= 1 and max(values) / min(values) > 6


def linear_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`."""
    size = max(abs(low), abs(high)) or 1.0
    span = high - low if high - low > 1e-6 * size else size  # values that are equal to the eye need no fine scale
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten, or powers only when there are many, from at or below `low` to at or above `high`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1, 3) if len(powers) <= 5 else (1,)
    every = [m * 10.0**p for p in powers for m in steps]
    first = max((t for t in every if t <= low * 1.0001), default=every[0])
    last = min((t for t in every if t >= high * 0.9999), default=every[-1])
    return [t for t in every if first <= t <= last]


def scale(low: float, high: float, start: float, end: float, log: bool) -> Any:
    """Function from a value to a coordinate."""
    if high <= low:
        high = low + 1.0

    def at(value: float) -> float:
        if log:
            share = (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        else:
            share = (value - low) / (high - low)
        return round(start + share * (end - start), 2)

    return at


def picture(name: str, width: float, height: float, *children: Any, class_: str) -> Markup:
    """One SVG in a box that scrolls sideways where the screen is narrower than the picture can be read."""
    svg = tag(
        "svg",
        tag("title", name),
        *children,
        viewBox=f"0 0 {width:.6g} {height:.6g}",
        width=f"{width:.6g}",
        height=f"{height:.6g}",
        # a narrow picture is not blown up to the width of the page
        style=f"max-width:{width:.6g}px;min-width:min(720px,{width:.6g}px)" if width < WIDTH else None,
        role="img",
        aria_label=name,
        class_=class_,
    )
    return tag("div", svg, class_="picture", tabindex="0") if class_ != "mask" else svg


def _cell(cell: Cell | None, x: float, y: float, width: float, height: float) -> Markup:
    gap = 2 if width > 12 else 1
    box: dict[str, Any] = dict(x=x, y=y, width=width - gap, height=height - gap, rx=3 if width > 12 else 1)
    if cell is None:
        return tag("rect", class_="none", **box)
    parts = [
        tag("title", cell.description),
        tag("rect", class_="base", **box),
        tag("rect", class_="fill", fill_opacity=round(cell.share, 4), **box),
    ]
    if width >= 44:
        shown = formats.percent(cell.share, 1 if width >= 60 else 0).removesuffix("%")
        parts.append(
            tag(
                "text",
                shown,
                x=x + (width - gap) / 2,
                y=y + height / 2,
                class_="strong" if cell.share > 0.62 else "weak",
            )
        )
    if cell.alarm:
        parts.append(tag("rect", class_="alarm", **box))
    return tag("g", *parts, class_="cell", data_value=cell.share)


def _bar(bar: Bar, y: float, step: float, at: Any, low: float, end: float) -> Markup:
    middle, thick = y + step / 2, 20
    label = tag("text", bar.label, x=0, y=middle, class_="label")
    said = formats.perplexity(bar.value)
    if bar.value is None:
        return join(label, tag("text", "not measured", x=at(low) + 8, y=middle, class_="axis"))
    known = formats.finite(bar.value)
    x = at(max(bar.value, low)) if known else end
    start, y0 = at(low), middle - thick / 2
    width = max(2.0, x - start)
    shape = _rounded_right(start, y0, width, thick)
    drawn = tag("path", d=shape, class_=f"bar {bar.kind if known else 'broken'}")
    note = tag("tspan", bar.note, class_="note", dx=8) if bar.note else None
    text = tag("text", tag("tspan", said, class_="value"), note, x=x + 10, y=middle)
    title = tag(
        "title", f"{bar.group + ', ' if bar.group else ''}{bar.label}: {said}{' ' + bar.note if bar.note else ''}"
    )
    return tag("g", title, label, drawn, text, data_value=bar.value)


def _rounded_right(x: float, y: float, width: float, height: float) -> str:
    """Path of a rectangle whose right corners are round."""
    r = min(4.0, width)
    right, down = f"h{width - r:g}q{r:g},0 {r:g},{r:g}", f"v{height - 2 * r:g}q0,{r:g} -{r:g},{r:g}"
    return f"M{x:g},{y:g}{right}{down}h-{width - r:g}z"


def _grid_line(x: float, label: str, top: float, bottom: float) -> Markup:
    return join(
        tag("line", x1=x, x2=x, y1=top, y2=bottom + 4, class_="grid"),
        tag("text", label, x=x, y=bottom + 20, text_anchor="middle", class_="axis"),
    )


def _baseline(baseline: tuple[str, float], x: float, bottom: float) -> Markup:
    label = f"{baseline[0]} {formats.perplexity(baseline[1])}"
    return join(
        tag("line", x1=x, x2=x, y1=20, y2=bottom + 4, class_="baseline"),
        tag("text", label, x=x, y=10, text_anchor="middle", class_="axis"),
    )
