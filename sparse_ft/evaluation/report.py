"""The report of a command: `report.html` to look at and `report.json` with the same numbers.

    data = ReportData(title="Pruned", model="llama-wt2", command="sparse-ft prune …", rows=sparsity_table(masks, model),
                      evaluations=[before.to_dict(label="dense"), after.to_dict(label="pruned")])
    write_report("checkpoint", data)

The page is one file: style and pictures are inside, nothing is loaded and no script runs. It is rendered from the very
dictionary that is written as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import atomic_write
from sparse_ft.evaluation import formats
from sparse_ft.evaluation.report_html import render
from sparse_ft.evaluation.sparsity import SparsityRow, sparsity_totals
from sparse_ft.masks import MaskSet
from sparse_ft.models import matrix_view

REPORT_HTML = "report.html"
REPORT_JSON = "report.json"
FORMAT_VERSION = 1
_LEAST_COST = 1.01  # pruned over dense perplexity, from which on there is a gap to win back


@dataclass(frozen=True)
class ComparisonRow:
    """One model of a comparison.

    Attributes:
        label: what was done to it, `"Wanda"`.
        group: what it is compared within, `"2:4"`; empty for the dense model.
        kind: colour: `"dense"`, `"pruned"`, `"retrained"`, `"merged"`, or `"broken"` for one that lost its zeros.
        sparsity: share of zeros, measured.
        perplexity: None when it was not measured.
        revived: pruned weights that are not zero; None when there are no masks.
        start: label of the row in the same group that it was trained from.
        seconds: time it took, None when unknown.
    """

    label: str
    group: str = ""
    kind: str = "pruned"
    sparsity: float = 0.0
    perplexity: float | None = None
    revived: int | None = None
    start: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows; a section without data is left out.

    Attributes:
        title: what was done, `"Pruned"`.
        model: name or path of the model.
        command: the exact command line or call, ready to paste.
        rows: `sparsity_table(masks, model)` of the result.
        method: `"wanda"`.
        pattern: `"2:4"`; taken from the rows when empty.
        evaluations: `PerplexityResult.to_dict(label=...)`, first the model before, last the model after; `kind` may
            give the colour as in `ComparisonRow`. Results of tasks, `TaskResult.to_dict(label=...)`, may be among them.
        histories: `Trainer.state.log_history` by name of the run.
        trainable: how many weights were trained: `trainable` of `total`, and `groups`, by name the number of `tensors`
            and of `weights` in each.
        reconstruction: one entry per window: `block`, `window`, `loss_before`, `loss_after`, `iterations`.
        comparison: models side by side.
        mask_sample: `mask_sample(masks)`, drawn beside the title.
        arguments: settings of the command.
        versions: of the packages used.
        digests: of masks and weights.
        steps: what the model went through before, `Record.history`.
        notes: sentences to show as warnings.
        verdict: one sentence; made from the numbers when empty.
    """

    title: str
    model: str
    command: str
    rows: Sequence[SparsityRow] = ()
    method: str = ""
    pattern: str = ""
    evaluations: Sequence[Mapping[str, Any]] = ()
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    trainable: Mapping[str, Any] = field(default_factory=dict)
    reconstruction: Sequence[Mapping[str, Any]] = ()
    comparison: Sequence[ComparisonRow] = ()
    mask_sample: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    verdict: str = ""


def write_report(path: str | Path, data: ReportData) -> Path:
    """Write the page and the JSON beside it, each whole or not at all.

    Args:
        path: a directory (made if absent) for `report.html` and `report.json`, or the `.html` file itself.
        data: what to show.

    Returns:
        Path of the page.
    """
    path = Path(path)
    page = path if path.suffix == ".html" else path / REPORT_HTML
    page.parent.mkdir(parents=True, exist_ok=True)
    numbers = report_numbers(data)
    atomic_write(page.with_suffix(".json"), json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write(page, render(numbers))
    return page


def write_comparison(path: str | Path, rows: Sequence[ComparisonRow], data: ReportData) -> Path:
    """Write a report that puts several models side by side; `data` supplies everything else.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("A comparison needs at least one row, got none; use write_report for a single model.")
    return write_report(path, replace(data, comparison=list(rows)))


def report_numbers(data: ReportData) -> dict[str, Any]:
    """What is shown, as plain JSON values; inf and nan become the texts `"inf"`, `"-inf"` and `"nan"`."""
    total = sparsity_totals(data.rows).get("all")
    evaluations = [dict(entry) for entry in data.evaluations if "task" not in entry]
    numbers = {
        "format_version": FORMAT_VERSION,
        "title": data.title,
        "model": data.model,
        "command": data.command,
        "method": data.method,
        "pattern": data.pattern or (total.pattern if total else ""),
        "notes": list(data.notes),
        "sparsity": total.to_dict() if total else None,
        "by_block": [row.to_dict() for row in sparsity_totals(data.rows, "block").values()],
        "by_role": [row.to_dict() for row in sparsity_totals(data.rows, "role").values()],
        "by_block_and_role": [row.to_dict() for row in sparsity_totals(data.rows, "block_role").values()],
        "tensors": [row.to_dict() for row in data.rows],
        "evaluation": evaluations,
        "change": _change(evaluations),
        "tasks": [dict(entry) for entry in data.evaluations if "task" in entry],
        "comparison": _comparison(data.comparison),
        "history": {name: [dict(entry) for entry in entries] for name, entries in data.histories.items()},
        "trainable": dict(data.trainable),
        "reconstruction": [dict(entry) for entry in data.reconstruction],
        "mask_sample": dict(data.mask_sample),
        "arguments": dict(data.arguments),
        "versions": dict(data.versions),
        "digests": dict(data.digests),
        "steps": [dict(step) for step in data.steps],
    }
    numbers["verdict"] = data.verdict or _verdict(numbers)
    return {key: _plain(value) for key, value in numbers.items()}


def mask_sample(masks: MaskSet, *, rows: int = 20, columns: int = 32) -> dict[str, Any]:
    """The top left corner of the mask in the middle of the model, for the picture beside the title.

    Returns:
        `name` of the tensor and `lines` of `1` (kept) and `0`, one per output.
    """
    names = [name for name, (kept, total) in masks.counts().items() if kept < total] or list(masks)
    name = names[len(names) // 2]
    view = matrix_view(masks[name], masks.input_dims[name])
    corner = view.reshape(-1, view.shape[-1])[:rows, :columns]
    return {"name": name, "lines": ["".join("1" if bit else "0" for bit in line) for line in corner.tolist()]}


def recovered_share(dense: float | None, pruned: float | None, retrained: float | None) -> float | None:
    """Share of the log-perplexity gap that retraining won back: (ln pruned - ln retrained) / (ln pruned - ln dense).

    None when pruning cost less than 1% of perplexity, so that the share would be noise, or a number is missing or not
    finite.
    """
    if dense is None or pruned is None or retrained is None:
        return None
    if not all(formats.finite(value) and value > 0 for value in (dense, pruned, retrained)):
        return None
    if pruned <= dense * _LEAST_COST:
        return None
    return (math.log(pruned) - math.log(retrained)) / (math.log(pruned) - math.log(dense))


def _change(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """From the first to the last perplexity of one protocol, `comparable` if there is no other.

    Without two of one protocol, `before` is None and `after` the last of all. `only` has the settings of the protocol
    in which the others differ, `through` the perplexity of the pruned model in between.
    """
    if len(evaluations) < 2:
        return None
    alike = _largest_group(evaluations)
    first = alike[0] if len(alike) > 1 else {}
    found: dict[str, Any] = {
        "comparable": len(alike) == len(evaluations),
        "before": first.get("perplexity"),
        "before_label": first.get("label", "before"),
        "after": alike[-1].get("perplexity"),
        "after_label": alike[-1].get("label", "after"),
        "only": _differing(alike[0], evaluations),
        "through": alike[1].get("perplexity") if len(alike) > 2 else None,
        "through_label": alike[1].get("label", "pruned") if len(alike) > 2 else None,
        "ratio": None,
        "recovered": None,
    }
    before, after = found["before"], found["after"]
    if before and formats.finite(before) and formats.finite(after):
        found["ratio"] = after / before
        found["recovered"] = recovered_share(before, found["through"], after)
    return found


def _largest_group(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The entries of the protocol that most were measured by, of several the earliest; the last entry if all differ."""
    groups = [[e for e in evaluations if _settings(e) == _settings(entry)] for entry in evaluations]
    largest = max(groups, key=len)
    return largest if len(largest) > 1 else [evaluations[-1]]


def _differing(entry: Mapping[str, Any], evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of an entry that another entry has otherwise, without the token counts that follow from them."""
    mine, others = _settings(entry), [_settings(other) for other in evaluations]
    counted = ("tokens", "text_tokens")
    return {k: v for k, v in mine.items() if k not in counted and any(other.get(k) != v for other in others)}


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What must agree for two perplexities to compare: the text, how it was cut and how it was computed."""
    return dict(entry.get("protocol") or {})


def _comparison(rows: Sequence[ComparisonRow]) -> list[dict[str, Any]]:
    dense = next((row.perplexity for row in rows if row.kind == "dense"), None)
    by_name = {(row.group, row.label): row for row in rows}
    out = []
    for row in rows:
        start = by_name.get((row.group, row.start))
        won_back = recovered_share(dense, start.perplexity, row.perplexity) if start else None
        out.append({**asdict(row), "recovered": won_back})
    return out


def _verdict(numbers: Mapping[str, Any]) -> str:
    parts = []
    total, entries = numbers["sparsity"], numbers["evaluation"]
    if total:
        share, count = formats.percent(total["sparsity"]), formats.short_count(total["total"])
        back = f", but {formats.count(total['revived'])} pruned weights are not" if total["revived"] else ""
        parts.append(f"{share} of {count} prunable weights are exactly zero{back}")
    if numbers["change"] and numbers["change"]["ratio"] is not None:
        parts.append(_perplexity_sentence(numbers["change"]))
    elif entries:
        parts.append(f"perplexity is {formats.perplexity(entries[-1].get('perplexity'))}")
    sentence = "; ".join(parts) or "Nothing was measured"
    return sentence[0].upper() + sentence[1:] + "."


def _perplexity_sentence(change: Mapping[str, Any]) -> str:
    before, after = formats.perplexity(change["before"]), formats.perplexity(change["after"])
    if change["recovered"] is None:
        return f"perplexity went from {before} to {after} ({formats.change(change['before'], change['after'])})"
    between = f"{formats.perplexity(change['through'])} ({change['through_label']})"
    won_back = f"{formats.percent(change['recovered'], 1)} of the gap won back"
    return f"perplexity went from {before} through {between} to {after}, {won_back}"


def _plain(value: Any) -> Any:
    """JSON values only: paths and dtypes become text, tuples lists, inf and nan their names."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
