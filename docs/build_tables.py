"""Turn every `docs/results/<topic>/<name>.json` into the tables and plots that the pages and the README include.

    python docs/build_tables.py            # writes docs/_generated/ and the block between the README's markers
    python docs/build_tables.py --check    # writes nothing; exit code 1 if the README's block is out of date

A result file is `{script, command, commit, versions, machine, protocol, seeds, rows: [{column: value}, …]}`. A number
in a page that did not pass through here is a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS / "results"
GENERATED = DOCS / "_generated"
README = DOCS.parent / "README.md"
BEGIN, END = "<!-- result: begin -->", "<!-- result: end -->"

# page of a method -> the words that its rows carry in a `method` column
METHOD_PAGES = {
    "magnitude": ("magnitude",),
    "random": ("random",),
    "wanda": ("wanda",),
    "sparsegpt": ("sparsegpt",),
    "mask_lora": ("mask_lora", "masklora"),
    "mask_callback": ("full", "mask_callback"),
}

Row = dict[str, Any]
Result = dict[str, Any]


def read_results() -> dict[str, Result]:
    """Every result file by `topic/name`, in alphabetical order."""
    return {
        path.relative_to(RESULTS).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*/*.json"))
    }


def cell(value: Any) -> str:
    """One value as table text: four significant digits, yes/no, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Row]) -> str:
    """Rows as a markdown table; the columns are all keys in order of appearance, the header is the key in words."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c: all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns}
    lines = [
        "| " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|" + "|".join("---:" if numeric[column] else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def provenance(key: str, result: Result) -> str:
    """One small line: the file, the command, the machine, the protocol."""
    facts = [f"`docs/results/{key}.json`"]
    if result.get("command"):
        facts.append(f"made by `{result['command']}`")
    if result.get("machine"):
        facts.append(f"machine: {cell(result['machine'])}")
    if result.get("protocol"):
        facts.append(f"protocol: {cell(result['protocol'])}")
    if result.get("seeds"):
        facts.append(f"seeds: {cell(result['seeds'])}")
    if result.get("commit"):
        facts.append(f"commit {str(result['commit'])[:10]}")
    return "<small>" + " · ".join(facts) + "</small>"


def section(key: str, result: Result, rows: Sequence[Row] | None = None) -> str:
    """Table with its provenance below."""
    return f"{table(result['rows'] if rows is None else rows)}\n\n{provenance(key, result)}\n"


def rows_of_method(result: Result, words: Iterable[str]) -> list[Row]:
    """Rows whose `method` begins with one of the words, in any spelling of case, dashes and spaces."""
    wanted = tuple(words)
    return [
        row
        for row in result["rows"]
        if str(row.get("method", "")).lower().replace("-", "_").replace(" ", "_").startswith(wanted)
    ]


def method_fragment(results: dict[str, Result], words: Iterable[str]) -> str:
    """All rows of one method, file after file."""
    parts = []
    for key, result in results.items():
        rows = rows_of_method(result, words)
        if rows:
            parts.append(f"**{key.split('/')[1].replace('_', ' ')}**\n\n{section(key, result, rows)}")
    return "\n".join(parts) or "No measurement of this method is in `docs/results`.\n"
