"""What the pages show of pruned deltas and of merges: one line per method, one column per drop rate or text.

Rows of `delta/*.json` are cells of task, training, method and drop rate, the mean over mask seeds beside its standard
deviation. Numbers, and the words about what is above what, are computed from the rows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from table_text import Row, cell

REFERENCES = ("base", "fine-tuned")
DARE, L2 = "DARE", "DAREx-L2"
NOISE = 2.0  # standard errors of a difference that count as one
# page -> the methods it is about, what each is compared with (DARE: after AdamW), and what a line calls that
COMPARISONS = {
    "darex_q": (
        ("DAREx-q, global, labels", DARE, "DARE"),
        ("DAREx-q, global, no labels", DARE, "DARE"),
        ("DAREx-q, per layer, labels", DARE, "DARE"),
        ("DAREx-q, per layer, no labels", DARE, "DARE"),
        ("closed form, MSE", DARE, "DARE"),
        ("closed form, eta 0.4", DARE, "DARE"),
        ("DAREx-L2 + DAREx-q, labels", L2, "DAREx-L2"),
        ("DAREx-L2 + DAREx-q, no labels", L2, "DAREx-L2"),
    ),
    "adamr": ((L2, DARE, "DARE after AdamW"),),
    "importance": (("MP (magnitude)", DARE, "DARE"), ("Wanda on the delta", DARE, "DARE")),
}


# -- tables ------------------------------------------------------------------------------------------------------------


def pruned(rows: Sequence[Row]) -> list[Row]:
    """One line per fine-tune and method, one column per drop rate; the fine-tune itself first, its base after it."""
    metric = metric_of(rows)
    lines: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row["method"] not in REFERENCES):
        line = lines.setdefault((row["task"], row["training"], row["method"]), _heading(row, rows))
        if row.get("drop_rate") is None:
            line["unpruned"] = row[metric]
        else:
            line[f"p = {row['drop_rate']:g}"] = with_spread(row, metric)
    order = {key: place for place, key in enumerate(dict.fromkeys((r["task"], r["training"]) for r in rows))}
    return [lines[key] for key in sorted(lines, key=lambda key: order[key[:2]])]


def _heading(row: Row, rows: Sequence[Row]) -> Row:
    """The first columns of a line; those that are the same everywhere are left out."""
    tasks = {other["task"] for other in rows}
    line: Row = {"text": row["task"]} if len(tasks) > 1 else {}
    size = row.get("mean_abs_delta")
    shown = "" if size is None else f" (mean delta {size:.1e})"
    return {**line, "fine-tuned with": row["training"], "method": f"{row['method']}{shown}", "unpruned": None}


def scales(rows: Sequence[Row]) -> list[Row]:
    """The divisor each method chose, as a multiple of the density that DARE divides by."""
    lines: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if row.get("scale") is None or row["method"] in (DARE, L2):
            continue
        line = lines.setdefault((row["task"], row["training"], row["method"]), _heading(row, rows))
        line[f"p = {row['drop_rate']:g}"] = f"{row['scale'] / (1 - row['drop_rate']):.3g}"
    return list(lines.values())


def merges(rows: Sequence[Row]) -> list[Row]:
    """One line per merge, seeds joined, the least excess first; base and fine-tunes before them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    lines = []
    for method, group in groups.items():
        line: Row = {"method": method + (f" ({len(group)} seeds)" if len(group) > 1 else "")}
        for column in group[0]:
            values = [row[column] for row in group if isinstance(row.get(column), (int, float))]
            if column not in ("method", "seed") and values:
                line[column] = statistics.fmean(values)
        lines.append(line)
    ordered = sorted(lines, key=lambda line: line.get("excess", float("-inf")))
    return [{**line, "excess": _signed(line.get("excess"))} for line in ordered]


def merge_speed(rows: Sequence[Row]) -> list[Row]:
    """One line per size and method: CPU seconds, beside a copy and mergekit, and memory."""
    lines: list[Row] = []
    for row in rows:
        if row["runner"] == "mergekit":
            continue
        peer = next((r for r in rows if (r["runner"], r["size_b"], r["method"]) == _peer_of(row)), None)
        lines.append(
            {
                "parameters": f"{row['size_b']:g} B",
                "merge": row["method"] or "read all, write one",
                "CPU s": f"{row['cpu_s']:.2f}",
                "of a copy's": f"{row['cpu_ratio']:.2f}",
                "MB beyond imports": round(row["beyond_imports_mb"]),
                "mergekit, CPU s / MB": f"{peer['process_cpu_s']:.1f} / {peer['peak_mb']:.0f}" if peer else None,
                "ours, whole process": f"{row['process_cpu_s']:.1f} / {row['peak_mb']:.0f}" if peer else None,
                "times faster": f"{row['faster_than_mergekit']:.1f}" if peer else None,
            }
        )
    return lines


def peer(rows: Sequence[Row]) -> list[Row]:
    """Differences as they are, for they are tiny."""
    return [
        {
            "method": row["method"],
            "tensors": row["tensors"],
            "largest difference of a weight": f"{row['largest_difference']:.1e}",
        }
        for row in rows
    ]


def _peer_of(row: Row) -> tuple[str, float, str]:
    return ("mergekit", row["size_b"], row["method"])


def _signed(value: float | None) -> str | None:
    return None if value is None else f"{value:+.3f}"


def sizes(rows: Sequence[Row]) -> list[Row]:
    """One line per method, one column per density, and what two plainer encodings of the same entries would take."""
    lines: dict[str, Row] = {}
    for row in rows:
        if "kept" not in row:
            continue
        column = f"{row['density']:.3g} kept"
        lines.setdefault(row["method"], {"delta of": row["method"]})[column] = f"{row['of_model']:.2%}"
        for name, key in (("32-bit index and value", "int32_index"), ("one bit per entry and value", "bitmask")):
            line = lines.setdefault(name, {"delta of": f"({name})"})
            line.setdefault(column, f"{row[f'with_{key}_of_model']:.2%}")
    return sorted(lines.values(), key=lambda line: line["delta of"].startswith("("))


def applied(rows: Sequence[Row]) -> list[Row]:
    """One line per task, one column per density: how many copies of the model's bytes it takes as long as."""
    lines: dict[str, Row] = {}
    for row in rows:
        label = "memory held" if row["task"] == "copy" else row["task"]
        lines.setdefault(label, {"copies of the model": label})
        column = f"{row['density']:.3g} kept"
        if row["task"] != "copy":
            lines[label][column] = f"{row['over_copy']:.2f}"
        if row["held_mb"] is not None:
            line = lines.setdefault("memory held", {"copies of the model": "memory held"})
            line[column] = f"{row['held_mb'] / row['model_mb']:.1%} of it"
    return sorted(lines.values(), key=lambda line: line["copies of the model"] == "memory held")


def stored(rows: Sequence[Row]) -> list[Row]:
    """Shares as percentages."""
    return [
        {
            "mean \\|delta\\|": f"{row['mean_abs_delta']:.0e}",
            "no change at all": f"{row['unchanged']:.1%}",
            "not exact": f"{row['inexact']:.1%}",
            "error of the delta (rms)": f"{row['rms_error']:.2%}",
            "largest error of one value": f"{row['largest_error']:.2%}",
            "weights that would differ at density 1": f"{row['weights_differ']:.1%}",
        }
        for row in rows
    ]


def metric_of(rows: Sequence[Row]) -> str:
    """`accuracy` or `perplexity`."""
    return "accuracy" if any("accuracy" in row for row in rows) else "perplexity"


def with_spread(row: Row, metric: str) -> str:
    """`0.759 ± 0.004`, or the mean alone where nothing is random."""
    show = (lambda value: f"{value:.3f}") if metric == "accuracy" else cell
    spread = row.get(f"{metric}_sd")
    return show(row[metric]) + ("" if spread is None else f" ± {show(spread)}")


# -- comparisons -------------------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row], page: str) -> list[Row]:
    """How the methods of a page, a key of `COMPARISONS`, compare: a line per fine-tune, a column per rate."""
    metric = metric_of(rows)
    by_key = {(r["task"], r["training"], r["method"], r.get("drop_rate")): r for r in rows}
    rates = sorted({row["drop_rate"] for row in rows if row.get("drop_rate") is not None})
    lines = []
    for task, training in dict.fromkeys((row["task"], row["training"]) for row in rows):
        base = by_key.get((task, training, "base", None))
        for method, other, against in COMPARISONS[page]:
            where = training.replace("AdamR", "AdamW") if other == DARE else training
            line: Row = {"text": task} if len({row["task"] for row in rows}) > 1 else {}
            line |= {"fine-tuned with": training, "method": method, "beside": against}
            for p in rates:
                row, reference = by_key.get((task, training, method, p)), by_key.get((task, where, other, p))
                if row is not None and reference is not None:
                    line[f"p = {p:g}"] = _verdict(row, reference, base, metric)
            if len(line) > len({"text", "fine-tuned with", "method", "beside"} & line.keys()):
                lines.append(line)
    return lines


def _verdict(row: Row, other: Row, base: Row | None, metric: str) -> str:
    """`better: 0.575 against 0.519`; what is better and yet not above the model without any delta says so."""
    word = compared(row, other, metric)
    if word == "as good":
        return word
    show = (lambda value: f"{value:.3f}") if metric == "accuracy" else cell
    lost = base is not None and _score(row, metric)[0] <= _score(base, metric)[0]
    numbers = f"{word}: {show(row[metric])} against {show(other[metric])}"
    return f"{numbers} (base {show(base[metric])})" if base is not None and lost and word == "better" else numbers


def compared(row: Row, other: Row, metric: str) -> str:
    """`better`, `worse` or, within two standard errors, `as good`. Perplexities are compared by their logarithms."""
    (value, error), (against, error_against) = _score(row, metric), _score(other, metric)
    if abs(value - against) <= NOISE * math.hypot(error, error_against):
        return "as good"
    return "better" if value > against else "worse"


def _score(row: Row, metric: str) -> tuple[float, float]:
    """A number that is the larger the better, and its standard error over masks."""
    values = row.get("values") or [row[metric]]
    scores = [value if metric == "accuracy" else -math.log(value) for value in values]
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return statistics.fmean(scores), error


def adamr(rows: Sequence[Row]) -> list[Row]:
    """The rows of AdamR's page: plain DARE after AdamW beside every method after AdamR."""
    rates = {row["training"].removeprefix("AdamR") for row in rows if row["training"].startswith("AdamR")}
    beside = [r for r in rows if r["training"].startswith("AdamW") and r["training"].removeprefix("AdamW") in rates]
    wanted = {id(row) for row in beside if row["method"] in (*REFERENCES, DARE)}
    return [row for row in rows if row["training"].startswith("AdamR") or id(row) in wanted]
