"""Curves as inline SVG: panels one below the other over the same horizontal axis, which may have several stretches.

One retraining after another is one stretch after another, each with its own steps and as wide as it was long; what was
measured in them (loss, learning rate, ...) is one panel each. Colours are classes that `style.py` defines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.evaluation.charts import WIDTH, label_width, linear_ticks, log_ticks, picture, scale
from sparse_ft.evaluation.markup import Markup, tag

#: Of the largest to the smallest value, from which on a panel that may choose has a logarithmic axis.
LOG_FROM = 20.0
_LOG_LEAST = 1.1  # below it a logarithmic axis has no second tick
_GAP = 18.0  # between two stretches
_HEAD, _SPACE = 26.0, 20.0  # above each panel, for its title; below it
_LINE = 17.0  # smallest distance of two labels one below the other
_LETTER = 8.2  # width of a letter of a heading, rather more than less


@dataclass(frozen=True)
class Curve:
    """One curve through `points` (x, y) of one stretch; curves of one `hue` belong together.

    `dots` marks the points. A line joins them; a long one that is `noisy` is drawn faint, its running mean on top.
    """

    label: str
    points: Sequence[tuple[float, float]]
    hue: int = 0
    dots: bool = False
    noisy: bool = False
    stretch: int = 0

    @property
    def drawn(self) -> Sequence[tuple[float, float]]:
        """The points the line goes through."""
        return running_mean(self.points) if self.noisy else self.points


@dataclass(frozen=True)
class Panel:
    """What is drawn over one vertical axis.

    Attributes:
        title: what the axis measures, with its unit.
        curves: at least one with a point.
        height: of the drawing area.
        log: logarithmic axis; None decides by the range. Values of zero or less, or all alike, have a linear one.
        least: smallest range of the axis, so that values equal to the eye are a flat line.
    """

    title: str
    curves: Sequence[Curve]
    height: float = 84.0
    log: bool | None = None
    least: float = 0.0


@dataclass(frozen=True)
class Stretch:
    """A part of the horizontal axis from `low` to `high`, with its own heading and, in place of numbers, own labels."""

    low: float
    high: float
    heading: str = ""
    labels: Mapping[float, str] = field(default_factory=dict)


def panels(items: Sequence[Panel], stretches: Sequence[Stretch], name: str, *, x_label: str) -> Markup:
    """Panels over a common horizontal axis.

    Args:
        items: from top to bottom.
        stretches: from left to right.
        name: what the picture shows, read out by screen readers.
        x_label: what the horizontal axis counts.
    """
    axes = [_Axis.of(panel) for panel in items]
    left = max(label_width([text]) for axis in axes for text in axis.labels) + 4
    names = [curve.label for panel in items for curve in panel.curves if curve.label]
    right = WIDTH - (label_width(names) + 12 if names else 24.0)
    places = _places(stretches, left, right)
    y = 24.0 if any(stretch.heading for stretch in stretches) else 2.0
    marks: list[Markup] = []
    for panel, axis in zip(items, axes, strict=True):
        top, bottom = y + _HEAD, y + _HEAD + panel.height
        title = panel.title + (" (log scale)" if axis.log else "")
        marks.append(tag("text", title, x=left, y=y + 10, class_="panel"))
        marks += _drawn(panel, axis, places, top, bottom, right)
        y = bottom + _SPACE
    for place in places:
        marks.append(_heading(place))
        marks += _numbers(place, y, last=place is places[-1])
    marks.append(tag("text", x_label, x=(left + right) / 2, y=y + 24, text_anchor="middle", class_="axis"))
    return picture(name, WIDTH, y + 36, *marks, class_="curves")


@dataclass(frozen=True)
class _Place:
    """Where a stretch lies: its coordinates, and the function from a value to one."""

    stretch: Stretch
    start: float
    end: float
    to_x: Any


def _places(stretches: Sequence[Stretch], left: float, right: float) -> list[_Place]:
    """Widths in proportion to what the stretches span, but none so narrow that it cannot be read."""
    room = right - left - _GAP * (len(stretches) - 1)
    spans = [max(stretch.high - stretch.low, 1e-9) for stretch in stretches]
    least = [min(max(110.0, _LETTER * len(stretch.heading)), room / len(stretches)) for stretch in stretches]
    widths = [max(small, room * span / sum(spans)) for small, span in zip(least, spans, strict=True)]
    spare, excess = sum(widths) - sum(least), sum(widths) - room
    places, x = [], left
    for stretch, width, small in zip(stretches, widths, least, strict=True):
        width -= excess * (width - small) / spare if spare else 0.0
        places.append(_Place(stretch, x, x + width, scale(stretch.low, stretch.high, x, x + width, False)))
        x += width + _GAP
    return places


def _heading(place: _Place) -> Markup:
    """What a stretch is, cut off where it would run into the next one."""
    text, letters = place.stretch.heading, int((place.end - place.start) / _LETTER)
    shown = text if len(text) <= letters else text[: max(letters - 1, 1)] + "…"
    return tag("text", tag("title", text), shown, x=place.start, y=8, class_="heading")


@dataclass(frozen=True)
class _Axis:
    """The vertical axis of a panel."""

    low: float
    high: float
    log: bool
    ticks: Sequence[float]
    labels: Sequence[str]

    @classmethod
    def of(cls, panel: Panel) -> _Axis:
        values = [y for curve in panel.curves for _, y in curve.points]
        low, high = min(values), max(values)
        least = LOG_FROM if panel.log is None else _LOG_LEAST if panel.log else math.inf
        log = low > 0 and high / low > least
        if high - low < panel.least:
            low, high = (low + high - panel.least) / 2, (low + high + panel.least) / 2
        every = log_ticks(low, high) if log else linear_ticks(low, high, max(2, round(panel.height / 45)))
        low, high = min(low, every[0]), max(high, every[-1])
        to_y = scale(low, high, panel.height, 0.0, log)
        ticks = [tick for i, tick in enumerate(every) if i == 0 or _apart(to_y, tick, every[:i])]
        return cls(low, high, log, ticks, tick_labels(ticks))


def _apart(to_y: Any, tick: float, below: Sequence[float]) -> bool:
    """Whether a tick is a line's height above the last one that was kept below it."""
    kept: list[float] = []
    for candidate in [*below, tick]:
        if not kept or abs(to_y(candidate) - to_y(kept[-1])) >= _LINE - 1:
            kept.append(candidate)
    return kept[-1] == tick


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Numbers on an axis with as few digits as tell them apart: `0.0005`, `2e-5`, `1,000`.

    Example:
        >>> tick_labels([0.0, 0.0002, 0.0004])
        ['0', '2e-4', '4e-4']
    """
    labels: list[str] = []
    plain_from = 0.1 if any(0 < abs(tick) < 1e-3 for tick in ticks) else 1e-3
    for digits in range(3, 16):
        labels = [_number(tick, digits, plain_from) for tick in ticks]
        if len(set(labels)) == len(set(ticks)):
            break
    return labels


def _number(value: float, digits: int, plain_from: float) -> str:
    if value == 0 or plain_from <= abs(value) < 1e6:
        return f"{value:,.0f}" if value == int(value) else f"{value:,.{digits}g}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def _drawn(
    panel: Panel, axis: _Axis, places: Sequence[_Place], top: float, bottom: float, right: float
) -> list[Markup]:
    """Grid, numbers and curves of one panel."""
    to_y = scale(axis.low, axis.high, bottom, top, axis.log)
    marks: list[Markup] = []
    for value, label in zip(axis.ticks, axis.labels, strict=True):
        y = to_y(value)
        marks += [tag("line", x1=p.start, x2=p.end, y1=y, y2=y, class_="grid") for p in places]
        marks.append(tag("text", label, x=places[0].start - 10, y=y, text_anchor="end", class_="axis"))
    taken: list[float] = []
    for curve in panel.curves:
        marks.append(_curve(curve, places[curve.stretch].to_x, to_y, panel.title))
        if curve.label and curve.points:
            y = _free_place(to_y(curve.drawn[-1][1]), taken)
            label = tag("text", curve.label, x=right + 12, y=y, class_="name")
            marks.append(tag("g", label, class_=f"series s{curve.hue % 6}"))
    return marks


def _numbers(place: _Place, y: float, *, last: bool) -> list[Markup]:
    """Numbers below a stretch; the last one of a stretch gives way to the first of the next."""
    stretch, wanted = place.stretch, max(1, int((place.end - place.start) / 90))
    if stretch.labels:
        every = max(1, -(-len(stretch.labels) * 34 // int(place.end - place.start)))
        shown = [(x, text) for i, (x, text) in enumerate(stretch.labels.items()) if i % every == 0]
    else:
        ticks = [t for t in linear_ticks(stretch.low, stretch.high, wanted) if stretch.low <= t <= stretch.high]
        shown = list(zip(ticks, tick_labels(ticks), strict=True))
    return [
        tag("text", text, x=place.to_x(x), y=y, text_anchor="middle", class_="axis")
        for x, text in shown
        if last or place.to_x(x) <= place.end - 4 * len(text)
    ]


def _curve(curve: Curve, to_x: Any, to_y: Any, unit: str) -> Markup:
    (first_x, first_y), (last_x, last_y) = curve.points[0], curve.points[-1]
    said = " ".join(part for part in (curve.label, unit) if part)
    ends = tick_labels([first_x, last_x]) if first_x != last_x else tick_labels([first_x])
    parts = [tag("title", f"{said}: {first_y:.4g} to {last_y:.4g} from {ends[0]} to {ends[-1]}")]
    if curve.drawn is not curve.points:
        parts.append(tag("path", d=_path(curve.points, to_x, to_y), class_="raw"))
    parts.append(tag("path", d=_path(curve.drawn, to_x, to_y), class_="thin" if curve.dots else "line"))
    if curve.dots:
        for x, y in curve.points:
            title = tag("title", f"{said} {y:.4g} at {tick_labels([x])[0]}")
            parts.append(tag("circle", title, cx=to_x(x), cy=to_y(y), r=4, class_="dot", data_value=y))
    return tag("g", *parts, class_=f"series s{curve.hue % 6}")


def _free_place(y: float, taken: list[float]) -> float:
    """The nearest height below `y` where a label does not run into those `taken`; it is added to them."""
    while any(abs(y - other) < _LINE for other in taken):
        y += 3
    taken.append(y)
    return y


def running_mean(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Mean over a centred window of a tenth of the points, shorter at the ends; the points themselves below 30."""
    if len(points) < 30:
        return points
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        reach = min(i, len(points) - 1 - i, len(points) // 20)
        out.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return out


def _path(points: Sequence[tuple[float, float]], to_x: Any, to_y: Any) -> str:
    return "M" + "L".join(f"{to_x(x):g},{to_y(y):g}" for x, y in points)
