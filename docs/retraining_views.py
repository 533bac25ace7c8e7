"""What the pages show of the ways back after pruning: the comparison, the advice, the encoder, one training step.

Rows of the comparison are cells of method, pruning, learning rate and seed. A method ran at several learning rates
after the first pruning; the one with the best VALIDATION perplexity there is the method's, everywhere. Names, numbers
and the order of every sentence are computed from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from table_text import Row, cell

FIRST = "magnitude 80%"  # the pruning after which learning rates are chosen
ENOUGH = 0.7  # share of the gap that a frugal method has to close to be named
TIE = 0.05  # measured costs that differ by less count as equal
ADAPTERS = ("mask_lora", "scale_lora", "lora_prune")
REFERENCES = ("dense", "pruned")

# The page of a method, by how its label begins; the first that fits.
PAGES = (
    ("reconstruct", "reconstruction"),
    ("mask_lora+", "perp_groups"),
    ("mask_lora", "mask_lora"),
    ("scale_lora", "scale_lora"),
    ("lora_prune", "lora_prune"),
    ("full", "mask_callback"),
)

# label, the label it is compared with, what differs between them
PAIRS = (
    ("mask_lora", "full", "An adapter under the mask, not every kept weight"),
    ("mask_lora", "lora_prune", "The mask in training and merge (MaskLoRA), not in the merge only (LoRA-Prune)"),
    ("mask_lora+norms", "mask_lora", "Norms beside MaskLoRA"),
    ("scale_lora, symmetry broken", "scale_lora", "ScaleLoRA with `break_symmetry`"),
    ("reconstruct, then mask_lora", "mask_lora", "Reconstruction before MaskLoRA"),
    ("reconstruct, attn_mlp", "reconstruct, linear", "Windows of attention and MLP, not single matrices"),
    ("reconstruct, attn_mlp", "reconstruct, block", "Windows of attention and MLP, not whole blocks"),
)


@dataclass(frozen=True, eq=False)
class Way:
    """One method after one pruning, at the method's learning rate; `runs` are its seeds."""

    method: str
    pruning: str
    runs: tuple[Row, ...]

    def mean(self, column: str) -> float | None:
        """Over the seeds that have the column."""
        values = [run[column] for run in self.runs if run.get(column) is not None]
        return sum(values) / len(values) if values else None

    @property
    def closed(self) -> float:
        """Share of the gap; reference rows have none."""
        return self.mean("gap_closed") or 0.0

    def spread(self, column: str, show: Callable[[float], str]) -> str | None:
        """Mean, and least to greatest in brackets where seeds differ."""
        values = [run[column] for run in self.runs if run.get(column) is not None]
        if not values:
            return None
        mean = show(sum(values) / len(values))
        return mean if min(values) == max(values) else f"{mean} ({show(min(values))}–{show(max(values))})"


def percent(value: float) -> str:
    """`97.1%`."""
    return f"{value:.1%}"


def small_percent(value: float) -> str:
    """Three digits, however small: `100%`, `5.23%`, `0.0241%`."""
    return f"{100 * value:.3g}%"


# -- choosing and joining ----------------------------------------------------------------------------------------------


def cells(rows: Sequence[Row]) -> list[Row]:
    """The rows without repetitions: of those with one key the first."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in ("method", "pruning", "learning_rate", "seed")), row)
    return list(found.values())


def chosen_rates(rows: Sequence[Row]) -> dict[str, float]:
    """The learning rate of each method: best validation perplexity after the first pruning, at its first seed."""
    best: dict[str, Row] = {}
    for row in sorted((r for r in rows if r["pruning"] == FIRST), key=lambda r: int(r["seed"])):
        rival = best.get(row["method"])
        if row.get("learning_rate") is None or (rival is not None and row["seed"] > rival["seed"]):
            continue
        if rival is None or row["validation_perplexity"] < rival["validation_perplexity"]:
            best[row["method"]] = row
    return {method: row["learning_rate"] for method, row in best.items()}


def ways(rows: Sequence[Row]) -> list[Way]:
    """Seeds joined, at the chosen rates; reference rows first, then pruning by pruning, the most recovered first."""
    rows = cells(rows)
    rates = chosen_rates(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["method"] in REFERENCES or row.get("learning_rate") == rates.get(row["method"], object()):
            groups.setdefault((row["method"], row["pruning"]), []).append(row)
    found = [Way(method, pruning, tuple(runs)) for (method, pruning), runs in groups.items()]
    prunings = list(dict.fromkeys(way.pruning for way in found))
    return sorted(
        found, key=lambda w: (w.method != "dense", prunings.index(w.pruning), w.method != "pruned", -w.closed)
    )


def with_costs(rows: Sequence[Row], costs: Sequence[Row]) -> list[Row]:
    """The rows with the columns of the cost row of their method, where there is one."""
    by_method = {row["method"]: row for row in costs}
    return [{**row, **by_method.get(row["method"], {})} for row in rows]


# -- tables ------------------------------------------------------------------------------------------------------------


def recovered(rows: Sequence[Row]) -> list[Row]:
    """One line per pruning and method; a pruned model without any method after it is left out."""
    found = ways(rows)
    used = {way.pruning for way in found if way.method not in REFERENCES} or {way.pruning for way in found}
    return [_line(way) for way in found if way.method == "dense" or way.pruning in used]


def _line(way: Way) -> Row:
    return {
        "pruning": "–" if way.method == "dense" else way.pruning,
        "method": way.method + (f" ({len(way.runs)} seeds)" if len(way.runs) > 1 else ""),
        "perplexity": way.spread("perplexity", cell),
        "gap closed": way.spread("gap_closed", percent),
        "trained": way.spread("trainable_share", small_percent),
        "CPU s/step": way.spread("seconds_per_step", cell),
        "CPU s": way.spread("cpu_seconds", cell),
        "peak MB": way.spread("peak_mb", lambda value: f"{value:,.0f}"),
        "learning rate": way.runs[0].get("learning_rate"),
    }


def learning_rates(rows: Sequence[Row]) -> list[Row]:
    """Every learning rate after the first pruning, at the first seed, and which was chosen."""
    rows = cells(rows)
    rates = chosen_rates(rows)
    seeds = {m: min(r["seed"] for r in rows if r["method"] == m and r["pruning"] == FIRST) for m in rates}
    return [
        {
            "method": row["method"],
            "learning rate": row["learning_rate"],
            "validation perplexity": row["validation_perplexity"],
            "test perplexity": row["perplexity"],
            "chosen": row["learning_rate"] == rates[row["method"]],
        }
        for row in sorted(rows, key=lambda r: (r["method"], r.get("learning_rate") or 0))
        if row["method"] in rates and row["pruning"] == FIRST and row["seed"] == seeds[row["method"]]
    ]


def encoder(rows: Sequence[Row]) -> list[Row]:
    """One line per state of the encoder and learning rate."""
    return [
        {
            "model": row["model"],
            "learning rate": row.get("learning_rate"),
            "masked-token loss": f"{row['masked_token_loss']:.4f}",
            "sparsity": percent(row["sparsity"]),
            "gap closed": None if row.get("gap_closed") is None else percent(row["gap_closed"]),
            "CPU s": row.get("cpu_seconds"),
        }
        for row in rows
    ]


def training_step(rows: Sequence[Row]) -> list[Row]:
    """Precision by variant: time against plain LoRA, peak memory with and without activation checkpointing.

    The last but one column is how much more a step takes over what was held before it than plain LoRA's does, in copies
    of the largest weight.
    """
    return [
        {
            "precision": row["precision"],
            "variant": row["variant"],
            "wall / LoRA": row["wall_over_lora"],
            "CPU / LoRA": row["cpu_over_lora"],
            "peak MB": row.get("peak_mb"),
            "peak MB, checkpointing": row.get("peak_mb_checkpointing"),
            "rise over LoRA's, in weights": _with_and_without(row),
            "trained": row["trainable"],
        }
        for row in rows
    ]


def _with_and_without(row: Row) -> str | None:
    """Without and with activation checkpointing."""
    rises = [row.get(f"over_lora_weights{suffix}") for suffix in ("", "_checkpointing")]
    return None if None in rises else " / ".join(f"{rise:+.1f}" for rise in rises)


# -- advice ------------------------------------------------------------------------------------------------------------


def advice(rows: Sequence[Row]) -> str:
    """Who is best at what after the first pruning, what each choice changed, and the order after other prunings."""
    found = [way for way in ways(rows) if way.method not in REFERENCES]
    first = [way for way in found if way.pruning == FIRST]
    if not first:
        return "No measurement to choose by is in `docs/results`.\n"
    heading = f"After {FIRST}, by share of the log-perplexity gap won back (costs within {TIE:.0%} count as equal):"
    parts = [heading, _bullets(_needs(first))]
    pairs = _bullets(_pairs(first))
    if pairs:
        parts += ["What one choice changed:", pairs]
    prunings = dict.fromkeys(way.pruning for way in found)
    orders = (_order(pruning, [way for way in found if way.pruning == pruning]) for pruning in prunings)
    parts += ["The whole order:", _bullets(orders)]
    return "\n\n".join(parts) + "\n"


def _needs(found: Sequence[Way]) -> list[str]:
    """A sentence per need, the one that recovers most first."""
    enough = [way for way in found if way.closed >= ENOUGH]
    above = f"above {ENOUGH:.0%}"
    sentences: list[tuple[float, str]] = []

    def best(need: str, candidates: Sequence[Way]) -> None:
        if candidates:
            way = max(candidates, key=lambda way: way.closed)
            sentences.append((-way.closed, f"{need}: {link(way.method)} ({percent(way.closed)})"))

    def least(need: str, column: str, show: Callable[[float], str], tie: float) -> None:
        costs = {way: cost for way in enough if (cost := way.mean(column)) is not None}
        if costs:
            named = sorted((w for w in costs if costs[w] <= (1 + tie) * min(costs.values())), key=lambda w: -w.closed)
            listed = ", ".join(f"{link(way.method)} ({show(costs[way])}; {percent(way.closed)})" for way in named)
            sentences.append((-named[0].closed, f"{need} {above}: {listed}"))

    best("Best recovered quality", found)
    best("An adapter that is a file of its own", [way for way in found if way.method.startswith(ADAPTERS)])
    best("Small parts only, no pruned matrix changed", [way for way in found if _is_group(way.method)])
    best("No back-propagation through the whole model", [way for way in found if _is_reconstruction(way.method)])
    least("Fewest trained parameters", "trainable_share", small_percent, 0.0)
    least("Least computation", "cpu_seconds", lambda seconds: f"{seconds:,.0f} CPU s", TIE)
    least("Least memory", "peak_mb", lambda megabytes: f"{megabytes:,.0f} MB at the peak", TIE)
    return [sentence for _, sentence in sorted(sentences, key=lambda entry: entry[0])]


def _pairs(found: Sequence[Way]) -> list[str]:
    """What each pair differs by, the largest gain first."""
    by_label = {way.method: way for way in found}
    known = [(by_label[one], by_label[other], what) for one, other, what in PAIRS if {one, other} <= by_label.keys()]
    known.sort(key=lambda pair: pair[1].closed - pair[0].closed)
    return [f"{what}: {percent(one.closed)} instead of {percent(other.closed)}" for one, other, what in known]


def _order(pruning: str, found: Sequence[Way]) -> str:
    listed = ", ".join(f"{link(way.method)} {percent(way.closed)}" for way in found)
    return f"after {pruning}: {listed}"


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {sentence}." for sentence in sentences)


def _is_group(label: str) -> bool:
    return not any(part in label for part in (*ADAPTERS, "full", "reconstruct"))


def _is_reconstruction(label: str) -> bool:
    return label.startswith("reconstruct") and "then" not in label


def link(label: str) -> str:
    """A method's name, linked to its page from a page in docs/."""
    page = next((page for beginning, page in PAGES if label.startswith(beginning)), "perp_groups")
    return f"[{label}](methods/{page}.md)"
