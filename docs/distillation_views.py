"""What the pages show of distillation: every loss beside the others, and what SquareHead adds where it was added.

Rows are trainings; the columns up to `seed` say which. Every loss is shown at the learning rate that has its best
validation, and two losses are a pair when they differ in SquareHead only. Numbers, and the words about what is better,
are computed from the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from table_text import Row

# what makes a training, besides its losses and its seed
SETTING = ("sparsity", "steps", "method", "examples")
KINDS = ("no teacher", "SquareHead", "KL", "KL and SquareHead")
LOSS = ("ce_weight", "kl_weight", "temperature", "layers")


def losses(rows: Sequence[Row], metric: str = "perplexity", better: str = "low") -> list[Row]:
    """One line per pruning, method and loss, seeds joined, at the rate with the best validation; references first.

    Args:
        rows: of one result file.
        metric: the column that was measured on the test data; `validation` chose.
        better: `"low"` or `"high"`.
    """
    lines: list[Row] = []
    for row in rows:
        if not row["learning_rate"]:
            name = f"{row['sparsity']:.0%}" if row["sparsity"] else "dense"
            lines.append({"pruned to": name, "loss": "not trained", metric: spread([row], metric)})
    sign = 1 if better == "low" else -1
    groups = [_best(at_rates, better) for at_rates in _by_loss(rows).values()]
    for group in sorted(groups, key=lambda g: (*_setting(g[0]), sign * mean(g, "validation"))):
        first = group[0]
        lines.append(
            {
                "pruned to": f"{first['sparsity']:.0%}",
                "steps": first["steps"],
                "method": first.get("method"),
                "examples": first.get("examples"),
                "loss": loss_name(first),
                "learning rate": first["learning_rate"],
                "seeds": len(group),
                "validation": spread(group, "validation"),
                metric: spread(group, metric),
                "gap closed": f"{mean(group, 'gap_closed'):.1%}" if "gap_closed" in first else None,
                "CPU s per step": mean(group, "cpu_seconds_per_step"),
            }
        )
    return lines


def squarehead(rows: Sequence[Row], metric: str, *, better: str) -> list[Row]:
    """One line per loss with SquareHead that was also trained without it.

    Each of the two is shown at the best of the learning rates that both were trained at.

    Args:
        rows: of one result file.
        metric: the column that is compared.
        better: `"low"` or `"high"`.
    """
    lines = []
    trained = _by_loss(rows)
    for key, at_rates in trained.items():
        first = next(iter(at_rates.values()))[0]
        twin = next((other for other in trained.values() if _twins(first, next(iter(other.values()))[0])), {})
        common = at_rates.keys() & twin.keys()
        if not first["squarehead_weight"] or not common:
            continue
        group, twin_group = (_best({rate: r[rate] for rate in common}, better) for r in (trained[key], twin))
        seeds = {row["seed"] for row in group} & {row["seed"] for row in twin_group}
        ours, others = ({row["seed"]: row[metric] for row in g if row["seed"] in seeds} for g in (group, twin_group))
        gains = [(others[s] - ours[s]) * (1 if better == "low" else -1) for s in seeds]
        lines.append(
            {
                "pruned to": f"{first['sparsity']:.0%}",
                "steps": first.get("steps"),
                "method": first.get("method"),
                "examples": first.get("examples"),
                "beside": loss_name({**first, "squarehead_weight": 0.0}),
                "layers": first.get("layers"),
                "SquareHead weight": f"{first['squarehead_weight']:g}",
                "seeds": len(seeds),
                f"{metric} with": spread([r for r in group if r["seed"] in seeds], metric),
                "without": spread([r for r in twin_group if r["seed"] in seeds], metric),
                "SquareHead is": verdict(gains),
            }
        )
    return sorted(lines, key=lambda line: (line["pruned to"], str(line["examples"]), line["steps"], line["beside"]))


def choices(rows: Sequence[Row], metric: str, *, better: str) -> list[Row]:
    """One line per setting: cross-entropy alone and, of each kind of loss, the one validation chose; and the choice.

    Args:
        rows: of one result file.
        metric: the column that is shown; `validation` chose.
        better: `"low"` or `"high"`.
    """
    sign = 1 if better == "low" else -1
    found: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for at_rates in _by_loss(rows).values():
        group = _best(at_rates, better)
        first = group[0]
        setting = found.setdefault(_setting(first), {})
        rival = setting.get(_kind(first))
        if rival is None or sign * _chosen_by(group) < sign * _chosen_by(rival):
            setting[_kind(first)] = group
    lines = []
    for (sparsity, examples, steps, method), kinds in sorted(found.items()):
        if len(kinds) < 2:
            continue
        best = min(kinds, key=lambda kind: sign * _chosen_by(kinds[kind]))
        shown = {k: f"{spread(kinds[k], metric)} with {loss_name(kinds[k][0])}" for k in KINDS if k in kinds}
        line: Row = {"pruned to": f"{sparsity:.0%}", "examples": examples or None, "steps": steps, "method": method}
        lines.append({**line, **{k: shown.get(k) for k in KINDS}, "chosen": best})
    return lines


def _kind(row: Row) -> str:
    """The column of a loss."""
    return KINDS[bool(row["kl_weight"]) * 2 + bool(row["squarehead_weight"])]


def _chosen_by(group: Sequence[Row]) -> float:
    """Validation of the first seed, which all losses have."""
    return float(min(group, key=lambda row: int(row["seed"]))["validation"])


def readme_lines(rows: Sequence[Row], first: Row) -> list[tuple[str, float, float]]:
    """(label, perplexity, zeros) of the trainings with KL that fit the README's table.

    Args:
        rows: of the file of distillation.
        first: a row of that table; pruning, steps and seed are its.
    """
    same = ("sparsity", "steps", "seed")
    found: dict[str, Row] = {}
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
    """`better`, `worse`, `equal`, or that seeds disagree; with the number of seeds where there is one only."""
    alone = " (one seed)" if len(gains) == 1 else ""
    if all(gain > 0 for gain in gains):
        return f"better{alone}"
    if all(gain < 0 for gain in gains):
        return f"worse{alone}"
    return f"equal{alone}" if all(gain == 0 for gain in gains) else "better or worse by seed"


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


def _setting(row: Row) -> tuple[Any, ...]:
    """By what lines are sorted: the least pruned first."""
    return row["sparsity"], row.get("examples") or 0, row["steps"], row.get("method") or ""


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in their seed only; a repetition is left out."""
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        key = tuple(row.get(column) for column in (*SETTING, *LOSS, "squarehead_weight", "learning_rate"))
        groups.setdefault(key, {}).setdefault(row["seed"], row)
    return [list(group.values()) for group in groups.values()]


def _by_loss(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[float, list[Row]]]:
    """Setting and loss -> learning rate -> its trainings."""
    found: dict[tuple[Any, ...], dict[float, list[Row]]] = {}
    for group in _groups([row for row in rows if row["learning_rate"]]):
        key = tuple(group[0].get(column) for column in (*SETTING, *LOSS, "squarehead_weight"))
        found.setdefault(key, {})[group[0]["learning_rate"]] = group
    return found


def _best(at_rates: dict[float, list[Row]], better: str) -> list[Row]:
    """The trainings at the rate whose first seed has the best validation."""
    sign = 1 if better == "low" else -1
    return min(at_rates.values(), key=lambda group: sign * _chosen_by(group))


def _twins(one: Row, other: Row) -> bool:
    """Whether they differ in SquareHead, and what it brings, only."""
    columns = [column for column in (*SETTING, *LOSS) if column != "layers"]
    return not other["squarehead_weight"] and all(one.get(column) == other.get(column) for column in columns)
