"""How numbers are written for people: shares, counts, perplexities, changes. The exact value goes beside them."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def finite(value: Any) -> TypeGuard[float]:
    """True for a number that is neither inf nor nan, nor the text that stands for them in JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: int | None) -> str:
    """`12,582,912`; an en dash for None."""
    return "–" if value is None else f"{value:,}"


def short_count(value: int) -> str:
    """`12.6 M`: three significant digits and a unit."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**4, "k")):
        if value >= size:
            scaled = value / (1000 if unit == "k" else size)
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f} {unit}"
    return f"{value:,}"


def percent(share: float, digits: int = 2) -> str:
    """`50.00%`, and never rounded to 0 or 100 unless it is."""
    text = f"{share * 100:.{digits}f}"
    if float(text) in (0.0, 100.0) and share not in (0.0, 1.0):
        return f"{'<' if share < 0.5 else '>'}{10.0**-digits if share < 0.5 else 100 - 10.0**-digits:.{digits}f}%"
    return f"{text}%"


def perplexity(value: Any) -> str:
    """Four significant digits below 1,000, whole numbers above; `inf` and `nan` as they are, an en dash for None."""
    if value is None:
        return "–"
    if not finite(value):
        return str(value)
    if value >= 1e7:
        return f"{value:.2e}"
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def change(before: float, after: float) -> str:
    """`+4.4%` or, from a factor of three on, `×5.1`."""
    ratio = after / before
    if ratio >= 3:
        return f"×{ratio:.1f}" if ratio < 100 else f"×{ratio:,.0f}"
    return f"{(ratio - 1) * 100:+.1f}%".replace("-", "−")


def tick(value: float) -> str:
    """A number on an axis: `0.5`, `20`, `1,000`."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}"
