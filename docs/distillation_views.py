"""What the pages show of distillation: every loss beside the others, and what SquareHead adds where it was added.

Rows are trainings; the columns up to `seed` say which. Two trainings are a pair when they differ in SquareHead only.
Numbers, and the words about what is better, are computed from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from table_text import Row

# what makes a training, besides its losses and its seed
SETTING = ("sparsity", "steps", "method", "examples")
LOSS = ("ce_weight", "kl_weight", "temperature", "layers", "learning_rate")


def losses(rows: Sequence[Row]) -> list[Row]:
    """One line per pruning, method and loss, seeds joined, the best validation first; the dense model before them."""
    lines = [{"pruned to": "dense", "perplexity": row["perplexity"]} for row in rows if row["part"] == "dense"]
    groups = _groups([row for row in rows if row["part"] != "dense"])
    for group in sorted(
        groups, key=lambda g: (-g[0]["sparsity"], g[0]["steps"], g[0]["method"], mean(g, "validation"))
    ):
        first = group[0]
        lines.append(
            {
                "pruned to": f"{first['sparsity']:.0%}",
                "steps": first["steps"],
                "method": first["method"],
                "loss": loss_name(first),
                "learning rate": first["learning_rate"],
                "validation": spread(group, "validation"),
                "perplexity": spread(group, "perplexity"),
                "gap closed": f"{mean(group, 'gap_closed'):.1%}",
            }
        )
    return lines


def squarehead(rows: Sequence[Row], metric: str, *, better: str) -> list[Row]:
    """One line per training with SquareHead that has a twin without it: both numbers, and what was gained.

    Args:
        rows: of one result file.
        metric: the column that is compared.
        better: `"low"` or `"high"`.
    """
    lines = []
    groups = _groups([row for row in rows if row.get("learning_rate")])
    for group in groups:
        first = group[0]
        if not first["squarehead_weight"]:
            continue
        twin = next((other for other in groups if _twins(first, other[0])), None)
        if twin is None:
            continue
        seeds = {row["seed"] for row in group} & {row["seed"] for row in twin}
        ours, others = ({row["seed"]: row[metric] for row in g if row["seed"] in seeds} for g in (group, twin))
        gains = [(others[s] - ours[s]) * (1 if better == "low" else -1) for s in seeds]
        lines.append(
            {
                "pruned to": f"{first['sparsity']:.0%}",
                "steps": first.get("steps"),
                "method": first.get("method"),
                "examples": first.get("examples"),
                "beside": loss_name({**first, "squarehead_weight": 0.0}),
                "learning rate": first["learning_rate"],
                "layers": first.get("layers"),
                "squarehead weight": first["squarehead_weight"],
                "seeds": len(seeds),
                f"{metric} with": spread([r for r in group if r["seed"] in seeds], metric),
                "without": spread([r for r in twin if r["seed"] in seeds], metric),
                "SquareHead": verdict(gains),
            }
        )
    return sorted(lines, key=lambda line: (line["pruned to"], line["beside"], line["squarehead weight"]))


def readme_lines(rows: Sequence[Row], first: Row) -> list[tuple[str, float, float]]:
    """(label, perplexity, zeros) of the trainings with KL that fit the README's table.

    Args:
        rows: of the file of distillation.
        first: a row of that table; pruning, steps and seed are its.
    """
    same = ("sparsity", "steps", "seed")
    found = {}
    for row in rows:
        plain = row["kl_weight"] == row["ce_weight"] == row.get("temperature") == 1 and not row["squarehead_weight"]
        if plain and all(row[key] == first[key] for key in same):
            found.setdefault(row["method"], row)
    labels = {"full": "full fine-tuning", "mask_lora": "MaskLoRA"}
    return [
        (f"then {labels[method]} with the dense model as **teacher**", row["perplexity"], row["merged_sparsity"])
        for method, row in found.items()
        if method in labels
    ]


def verdict(gains: Sequence[float]) -> str:
    """`better`, `worse`, or `mixed` where seeds disagree."""
    if all(gain > 0 for gain in gains):
        return "better"
    return "worse" if all(gain < 0 for gain in gains) else "mixed"


def loss_name(row: Row) -> str:
    """`CE + 3 KL (τ 2) + 0.1 SquareHead (layers 6)`."""
    parts = []
    for column, name in (("ce_weight", "CE"), ("kl_weight", "KL"), ("squarehead_weight", "SquareHead")):
        weight = row.get(column, 1.0 if column == "ce_weight" else 0.0)
        if weight:
            parts.append(name if weight == 1 else f"{weight:g} {name}")
            if column == "kl_weight" and row.get("temperature", 1) != 1:
                parts[-1] += f" (τ {row['temperature']:g})"
            if column == "squarehead_weight" and row.get("layers", "all") != "all":
                parts[-1] += f" (layers {row['layers']})"
    return " + ".join(parts)


def mean(rows: Sequence[Row], column: str) -> float:
    """Over rows."""
    return float(sum(row[column] for row in rows) / len(rows))


def spread(rows: Sequence[Row], column: str) -> str:
    """Mean, and least to greatest in brackets where rows differ."""
    values = [row[column] for row in rows]
    digits = 1 if max(values) >= 100 else 2 if max(values) > 1 else 3
    shown = f"{mean(rows, column):.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only; a repetition is left out."""
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = tuple(row.get(column) for column in (*SETTING, *LOSS, "squarehead_weight"))
        groups.setdefault(key, {}).setdefault(row["seed"], row)
    return [list(group.values()) for group in groups.values()]


def _twins(one: Row, other: Row) -> bool:
    """Whether they differ in SquareHead only."""
    columns = [column for column in (*SETTING, *LOSS) if column != "layers"]
    return not other["squarehead_weight"] and all(one.get(column) == other.get(column) for column in columns)
