"""The tables of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_ft.evaluation import formats
from sparse_ft.evaluation.markup import Markup, join, tag

Row = Mapping[str, Any]


def number_cell(value: Any, shown: str, tone: str | None = None) -> Markup:
    """A table cell with a number as people read it, carrying the number that is in the JSON."""
    return tag("td", tag("data", shown, value=value) if value is not None else shown, class_=tone)


def sparsity_tables(numbers: Mapping[str, Any]) -> Sequence[Markup]:
    """Totals by kind of weight; by block and for every tensor folded away."""
    total, blocks, tensors = numbers["sparsity"], numbers["by_block"], numbers["tensors"]
    return [
        _counts_table(numbers["by_role"], "role", total),
        tag(
            "details", tag("summary", f"By block ({formats.count(len(blocks))})"), _counts_table(blocks, "block", total)
        ),
        tag(
            "details",
            tag("summary", f"Every tensor ({formats.count(len(tensors))})"),
            _counts_table(tensors, "name", total),
        ),
    ]


def steps_table(steps: Sequence[Mapping[str, Any]]) -> Markup:
    """The commands a checkpoint went through, oldest first."""
    body = []
    for number, step in enumerate(steps, 1):
        measured = [e["perplexity"] for e in step.get("evaluation") or [] if "perplexity" in e]
        share, ppl = step.get("sparsity"), measured[-1] if measured else None
        cells = [
            tag("th", f"{number}. {step.get('command', '')}", scope="row", class_="text"),
            tag("td", str((step.get("arguments") or {}).get("method", ""))),
            tag("td", str(step.get("pattern", ""))),
            number_cell(share, formats.percent(share) if formats.finite(share) else ""),
            number_cell(ppl, "" if ppl is None else formats.perplexity(ppl)),
        ]
        body.append(tag("tr", *cells))
    return _table(["Step", "Method", "Pattern", "Sparsity", "Perplexity after"], body)


def trainable_table(counted: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """How many weights were trained, by group, with a heading per retraining where there are several.

    Args:
        counted: heading, and `trainable`, `total` and `groups` (by name the number of `tensors` and `weights`).
    """
    body: list[Markup] = []
    for heading, counts in counted:
        if len(counted) > 1:
            body.append(tag("tr", tag("th", heading, colspan=4, scope="colgroup"), class_="group"))
        total, groups = counts.get("total"), counts.get("groups")
        known = groups if isinstance(groups, Mapping) else {}
        rows = [(name, group) for name, group in known.items() if isinstance(group, Mapping)]
        tensors = [group.get("tensors", 0) for _, group in rows]
        together = sum(tensors) if tensors and all(isinstance(count, int) for count in tensors) else None
        if len(rows) > 1:
            body += [_trainable_row(name, group.get("tensors"), group.get("weights"), total) for name, group in rows]
        name = rows[0][0] if len(rows) == 1 else "All"
        body.append(_trainable_row(name, together, counts["trainable"], total, "best" if len(rows) > 1 else None))
    return _table(["Trained", "Tensors", "Weights", "Share of the model"], body)


def _trainable_row(name: str, tensors: Any, weights: Any, total: Any, kind: str | None = None) -> Markup:
    share = weights / total if formats.finite(weights) and formats.finite(total) and total else None
    return tag(
        "tr",
        tag("th", name, scope="row", class_="text"),
        number_cell(tensors, _whole(tensors)),
        number_cell(weights, _whole(weights)),
        number_cell(share, "" if share is None else formats.percent(share, 4)),
        class_=kind,
    )


def _whole(value: Any) -> str:
    return formats.count(value) if isinstance(value, int) else ""


def reconstruction_table(windows: Sequence[Mapping[str, Any]]) -> Markup:
    """Errors of every window, folded away."""
    body = []
    for entry in windows:
        before, after, steps = entry["loss_before"], entry["loss_after"], entry.get("iterations")
        left = after / before if before else None
        cells = [
            tag("th", str(entry.get("block", "")), scope="row", class_="text"),
            tag("td", str(entry.get("window", ""))),
            number_cell(before, f"{before:.4g}"),
            number_cell(after, f"{after:.4g}"),
            number_cell(left, "" if left is None else formats.percent(left, 1)),
            number_cell(steps, _whole(steps)),
        ]
        body.append(tag("tr", *cells))
    head = ["Block", "Window", "Error after pruning", "After reconstruction", "Left of it", "Iterations"]
    return tag("details", tag("summary", f"Every window ({formats.count(len(body))})"), _table(head, body))


def tasks_table(entries: Sequence[Mapping[str, Any]]) -> Markup:
    """One line per task and metric, one column per model, in shares with their standard errors.

    Args:
        entries: from `TaskResult.to_dict(label=...)`.
    """
    labels = list(dict.fromkeys(str(entry.get("label", "")) for entry in entries))
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in entries:
        measured = [entry["task"], entry.get("metric"), entry.get("protocol")]
        rows.setdefault(json.dumps(measured, sort_keys=True, default=str), {})[str(entry.get("label", ""))] = entry
    body = []
    for of_label in rows.values():
        one = next(iter(of_label.values()))
        cells = [tag("th", str(one["task"]), scope="row", class_="text"), tag("td", str(one.get("metric", "")))]
        cells += [_task_cell(of_label.get(label)) for label in labels]
        body.append(tag("tr", *cells, tag("td", _whole((one.get("protocol") or {}).get("samples")))))
    return _table(["Task", "Metric", *labels, "Questions"], body)


def _task_cell(entry: Mapping[str, Any] | None) -> Markup:
    if entry is None or not formats.finite(entry.get("value")):
        return tag("td", "" if entry is None else str(entry.get("value")))
    value, stderr = entry["value"], entry.get("stderr")
    return number_cell(value, f"{value:.4f}" + (f" ± {stderr:.4f}" if formats.finite(stderr) else ""))


def comparison_table(rows: Sequence[Row]) -> Markup:
    """One line per model under a heading per group; the best perplexity among those that kept their zeros is bold."""
    best: dict[str, float] = {}
    for row in rows:
        if formats.finite(row["perplexity"]) and row["kind"] not in ("dense", "broken"):
            best[row["group"]] = min(best.get(row["group"], row["perplexity"]), row["perplexity"])
    timed = any(row["seconds"] is not None for row in rows)
    head = ["Model", "Sparsity", "Perplexity", "Gap won back", "Revived"] + (["Seconds"] if timed else [])
    body: list[Markup] = []
    previous = ""
    for row in rows:
        if row["group"] != previous:
            body.append(tag("tr", tag("th", row["group"], colspan=len(head), scope="colgroup"), class_="group"))
            previous = row["group"]
        is_best = row["kind"] not in ("dense", "broken") and row["perplexity"] == best.get(row["group"])
        body.append(tag("tr", *_comparison_cells(row, timed), class_="best" if is_best else None))
    return _table(head, body)


def _comparison_cells(row: Row, timed: bool) -> list[Markup]:
    ppl, won_back, revived = row["perplexity"], row["recovered"], row["revived"]
    cells = [
        tag("th", row["label"], scope="row", class_="text"),
        number_cell(row["sparsity"], formats.percent(row["sparsity"]), "bad" if row["kind"] == "broken" else None),
        number_cell(ppl, formats.perplexity(ppl)),
        number_cell(won_back, "" if won_back is None else formats.percent(won_back, 1)),
        number_cell(revived, "" if revived is None else formats.count(revived), "bad" if revived else None),
    ]
    if timed:
        cells.append(number_cell(row["seconds"], "" if row["seconds"] is None else f"{row['seconds']:,.1f}"))
    return cells


def _counts_table(rows: Sequence[Row], by: str, total: Row) -> Markup:
    tensors = by == "name"
    head = [{"role": "Kind of weight", "block": "Block", "name": "Tensor"}[by]]
    head += ["Shape", "Pattern"] if tensors else []
    head += ["Kept", "Total", "Sparsity", "Kept but zero", "Revived"]
    body = [tag("tr", *_count_cells(row, row[by] or "outside blocks", tensors)) for row in rows]
    return _table(head, body, tag("tr", *_count_cells({**total, "shape": []}, "All", tensors)))


def _count_cells(row: Row, label: str, tensors: bool) -> list[Markup]:
    cells = [tag("th", label, scope="row", class_="text")]
    if tensors:
        cells += [tag("td", " × ".join(str(size) for size in row["shape"])), tag("td", row["pattern"])]
    return [
        *cells,
        number_cell(row["kept"], formats.count(row["kept"])),
        number_cell(row["total"], formats.count(row["total"])),
        number_cell(row["sparsity"], formats.percent(row["sparsity"])),
        number_cell(row["kept_but_zero"], formats.count(row["kept_but_zero"])),
        number_cell(row["revived"], formats.count(row["revived"]), "bad" if row["revived"] else None),
    ]


def _table(head: Sequence[str], body: Sequence[Markup], foot: Markup | None = None) -> Markup:
    titles = [tag("th", name, scope="col", class_="text" if i == 0 else None) for i, name in enumerate(head)]
    table = tag(
        "table",
        tag("thead", tag("tr", *titles)),
        tag("tbody", *body),
        tag("tfoot", foot) if foot else None,
    )
    return join(tag("div", table, class_="scroll", tabindex="0"))
