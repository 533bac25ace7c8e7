"""Values, rows and where they come from, as markdown text. What `build_tables.py` and the views share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]


def cell(value: Any) -> str:
    """One value as table text: about four significant digits, yes/no, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1e6:
            return f"{value:.1e}"
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
        return f"{value:,.{digits}f}" if abs(value) >= 1 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items() if item is not None)
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Row]) -> str:
    """Rows as a markdown table; the columns are all keys in order of appearance, without those that are empty."""
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = [key for key in keys if any(row.get(key) is not None for row in rows)]
    left = {c for c in columns if any(isinstance(row.get(c), str) and not _is_number(row[c]) for row in rows)}
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "|".join("---" if column in left else "---:" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text == "–" or (text[:1] == "-" and text[1:2].isdigit())


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """Join the rows that differ in `seed` only; columns before `seed` are what was varied, those after it results."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        keys = list(row)[: list(row).index("seed")] if "seed" in row else list(row)
        groups.setdefault(tuple((k, row[k]) for k in keys), []).append(row)
    return [_joined(group) for group in groups.values()]


def _joined(group: Sequence[Row]) -> Row:
    joined: Row = {}
    for column, value in group[0].items():
        values = [row.get(column) for row in group]
        if column == "seed":
            joined["runs"] = len(group)
        elif all(v == value for v in values) or not all(isinstance(v, (int, float)) for v in values):
            joined[column] = value
        else:
            joined[column] = f"{cell(sum(values) / len(values))} ({cell(min(values))}–{cell(max(values))})"
    return joined


def provenance(key: str, result: Result) -> str:
    """One small line: the file, the command, the machine, the protocol."""
    facts = [f"`docs/results/{key}.json`", f"made by `{result['command']}`"]
    for name in ("protocol", "machine", "seeds", "commit"):
        if result.get(name):
            facts.append(f"{name}: {cell(result[name])}")
    return "<small>" + " · ".join(facts) + "</small>"
