"""Turn every `docs/results/<topic>/<name>.json` into the tables and plots that the pages and the README include.

    python docs/build_tables.py            # writes docs/_generated/ and the block between the README's markers
    python docs/build_tables.py --check    # writes nothing; exit code 1 if the README's block is out of date

A result file is `{script, command, commit, versions, machine, protocol, seeds, rows: [{column: value}, …]}`. Rows that
differ in `seed` only (among the columns up to it) are joined: mean, and least to greatest in brackets. A file with a
view of its own is shown by it; those of retraining are in `retraining_views.py`. A number in a page that did not pass
through here is a mistake.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import delta_views
import distillation_views
import retraining_views
from table_text import Result, Row, over_seeds, provenance, table

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = DOCS / "results"
GENERATED = DOCS / "_generated"
README = ROOT / "README.md"
BEGIN, END = "<!-- result: begin -->", "<!-- result: end -->"

ONE_SHOT = "one_shot/llama_wt2"
RETRAINING = "retraining/llama_wt2"
PERP = "perp/llama_wt2"
COST = "perp/cost"
ENCODER = "perp/encoder"
STEP = "adapters/step"
DELTA_TASKS = ("delta/sst2", "delta/perplexity")
DELTA_COSTS = ("delta/size", "delta/apply", "delta/stored_dtype")
MERGES = "merging/quality"
MERGE_SPEED = "merging/speed"
MERGE_PEER = "merging/peer"
FIRST_USE = "merging/first_use"
DISTILLED = "distillation/llama_wt2"
DISTILLED_TASKS = {"distillation/sst2": "accuracy", "distillation/t5": "exact_match"}
DISTILL_COSTS = ("distill/step", "distill/memory", "distill/self_teacher")

# page of a method -> how the names in its rows begin (column `method`, `variant` or `model`)
METHOD_PAGES: dict[str, tuple[str, ...]] = {
    "magnitude": ("magnitude",),
    "random": ("random",),
    "wanda": ("wanda",),
    "sparsegpt": ("sparsegpt",),
    "mask_lora": ("mask_lora",),
    "scale_lora": ("scale_lora",),
    "lora_prune": ("lora_prune",),
    "perp_groups": ("biases", "norms", "head", "embeddings", "mask_lora+", "scale_lora+", "lora_prune+"),
    "reconstruction": ("reconstruct",),
    "mask_callback": ("full",),
}

# file -> the rows shown beside those of a method
REFERENCES = {PERP: ("dense", "pruned"), ENCODER: ("dense", "pruned 2:4 by magnitude"), STEP: ("lora",)}

# method of a retraining row -> how the README calls it
AFTER_PRUNING = {
    "lora": "then an ordinary LoRA, merged",
    "mask_lora": "then **MaskLoRA**, merged",
    "full": "then full fine-tuning with **MaskCallback**",
}


def section(key: str, result: Result, rows: Sequence[Row] | None = None) -> str:
    """The table of a result file, its provenance below."""
    view = VIEWS.get(key, over_seeds)
    return f"{table(view(result['rows'] if rows is None else rows))}\n\n{provenance(key, result)}\n"


# -- views of one file -------------------------------------------------------------------------------------------------


def pattern_label(row: Row) -> str:
    """`80%` or `2:4`."""
    return f"{row['sparsity']:.0%}" if row["pattern"] == "unstructured" else str(row["pattern"])


def perplexity_by_pattern(rows: Sequence[Row]) -> list[Row]:
    """One line per method, one column per pattern; the dense model has one perplexity for all of them."""
    joined = over_seeds(rows)
    labels = {pattern_label(row) for row in joined} - {"dense"}
    patterns = sorted(labels, key=lambda label: (":" in label, label))
    lines: dict[str, Row] = {}
    for row in joined:
        line = lines.setdefault(row["method"], {"perplexity": row["method"], **dict.fromkeys(patterns)})
        here = patterns if row["pattern"] == "dense" else [pattern_label(row)]
        line.update(dict.fromkeys(here, row["perplexity"]))
    return list(lines.values())


def recovery(rows: Sequence[Row]) -> list[Row]:
    """One line per retraining: what was pruned, what came back, what is left of the zeros."""
    return [
        {
            "method": row["method"],
            "pruned to": pattern_label(row),
            "steps": row["steps"],
            "runs": row["runs"],
            "perplexity pruned": row.get("pruned_perplexity"),
            "perplexity": row["perplexity"],
            "gap closed": row.get("gap_closed"),
            "merged sparsity": row.get("merged_sparsity"),
            "learning rate": row.get("learning_rate"),
        }
        for row in over_seeds(rows)
    ]


VIEWS: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    ONE_SHOT: perplexity_by_pattern,
    RETRAINING: recovery,
    PERP: retraining_views.recovered,
    ENCODER: retraining_views.encoder,
    STEP: retraining_views.training_step,
    **dict.fromkeys(DELTA_TASKS, delta_views.pruned),
    DELTA_COSTS[0]: delta_views.sizes,
    DELTA_COSTS[1]: delta_views.applied,
    DELTA_COSTS[2]: delta_views.stored,
    MERGES: delta_views.merges,
    MERGE_SPEED: delta_views.merge_speed,
    MERGE_PEER: delta_views.peer,
    DISTILLED: distillation_views.losses,
    **{key: partial(distillation_views.losses, metric=m, better="high") for key, m in DISTILLED_TASKS.items()},
}
TITLES = {
    ONE_SHOT: "One-shot pruning",
    RETRAINING: "Retraining after magnitude pruning",
    PERP: "Every way back after pruning",
    ENCODER: "An encoder, reconstructed without labels",
    STEP: "One training step of each adapter",
    DELTA_TASKS[0]: "Pruned deltas of a classifier, accuracy on SST-2",
    DELTA_TASKS[1]: "Pruned deltas of causal models, perplexity",
    DELTA_COSTS[0]: "Size of a delta file, as a share of the bf16 model",
    DELTA_COSTS[1]: "A delta on a loaded bf16 model, beside a copy of all its weights",
    DELTA_COSTS[2]: "What storing a delta in bf16 loses",
    MERGES: "Two fine-tunes merged, perplexity on the domain of each",
    MERGE_SPEED: "Merges of three fine-tunes, bf16, beside a copy and mergekit",
    MERGE_PEER: "Merges with `compat: mergekit` beside mergekit's own, fp32",
    DISTILLED: "Retraining with the dense model as the teacher",
    "distillation/sst2": "A sparse classifier and its dense teacher, accuracy on SST-2",
    "distillation/t5": "A sparse T5 and its dense teacher, a task with known answers",
    DISTILL_COSTS[0]: "One training step with a teacher",
    DISTILL_COSTS[1]: "Memory of a step with large vocabularies",
    DISTILL_COSTS[2]: "A teacher made of the student's own weights",
    FIRST_USE: "Compiled loops when they are first used, and when they are there",
}


def plot_one_shot(result: Result, path: Path) -> None:
    """Perplexity against sparsity, a line per method, for the unstructured patterns."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sparse_ft"
    from matplotlib import pyplot

    lines: dict[str, dict[float, list[float]]] = {}
    for row in result["rows"]:
        if row["pattern"] == "unstructured":
            lines.setdefault(row["method"], {}).setdefault(row["sparsity"], []).append(row["perplexity"])
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for method, points in lines.items():
        at = sorted(points)
        axes.plot(at, [sum(points[s]) / len(points[s]) for s in at], marker="o", markersize=4, label=method)
    dense = [row["perplexity"] for row in result["rows"] if row["method"] == "dense"]
    if dense:
        axes.axhline(dense[0], color="grey", linewidth=1, linestyle=":", label="dense")
    axes.set(xlabel="sparsity", ylabel="perplexity (log scale)", yscale="log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


# -- fragments ---------------------------------------------------------------------------------------------------------


def method_fragment(results: dict[str, Result], beginnings: tuple[str, ...]) -> str:
    """All rows of one method, file after file, beside the rows they are compared with where the file has them."""
    parts = []
    for key, result in results.items():
        rows = [row for row in result["rows"] if row_name(row).startswith(beginnings)]
        if rows:
            references = [row for row in result["rows"] if row_name(row) in REFERENCES.get(key, ("dense",))]
            parts.append(f"**{title(key)}**\n\n{section(key, result, references + rows)}")
    return "\n".join(parts) or "No measurement of this method is in `docs/results`.\n"


def row_name(row: Row) -> str:
    """What a row is about: a method, a variant of a step, or a state of a model."""
    return str(row.get("method") or row.get("variant") or row.get("model") or "")


def file_fragment(results: dict[str, Result], key: str) -> str:
    """The table of one file, or a sentence that there is none."""
    return section(key, results[key]) if key in results else f"No measurement is in `docs/results/{key}.json`.\n"


def delta_fragments(results: dict[str, Result]) -> Iterable[tuple[str, str]]:
    """Tables of pruned deltas, what they say of the paper's claims, the divisors chosen, and AdamR's rows alone."""
    for key in DELTA_TASKS:
        name, rows = key.replace("/", "_"), results.get(key, {"rows": []})["rows"]
        yield f"{name}.md", file_fragment(results, key)
        for page in delta_views.COMPARISONS:
            lines = delta_views.findings(rows, page)
            yield f"{name}_findings_{page}.md", (table(lines) if lines else "Nothing of this is measured yet.") + "\n"
        yield f"{name}_scales.md", (table(delta_views.scales(rows)) if rows else "No scale was searched.") + "\n"
        alone = section(key, results[key], delta_views.adamr(rows)) if rows else file_fragment(results, key)
        yield f"{name}_adamr.md", alone
    for key in DELTA_COSTS:
        yield f"{key.replace('/', '_')}.md", file_fragment(results, key)


def distillation_fragments(results: dict[str, Result]) -> Iterable[tuple[str, str]]:
    """Every loss beside the others, what SquareHead adds where it was added, and what a teacher costs."""
    yield "distillation_losses.md", file_fragment(results, DISTILLED)
    parts: list[str] = []
    chosen: list[str] = []
    for key, metric in ((DISTILLED, "perplexity"), *DISTILLED_TASKS.items()):
        if key in results:
            better = "low" if key == DISTILLED else "high"
            rows = distillation_views.squarehead(results[key]["rows"], metric, better=better)
            best = distillation_views.choices(results[key]["rows"], metric, better=better)
            chosen.append(f"**{title(key)}** ({metric.replace('_', ' ')})\n\n{table(best)}\n")
            shown = table(rows) if rows else "No pair with and without it is measured yet."
            parts.append(f"**{title(key)}**\n\n{shown}\n\n{provenance(key, results[key])}\n")
    yield "distillation_squarehead.md", "\n".join(parts) or "No measurement is in `docs/results/distillation`.\n"
    yield "distillation_choices.md", "\n".join(chosen) or "Nothing of this is measured yet.\n"
    tasks = [f"**{title(key)}**\n\n{file_fragment(results, key)}" for key in DISTILLED_TASKS if key in results]
    yield "distillation_tasks.md", "\n".join(tasks) or "No task is measured yet.\n"
    for key in DISTILL_COSTS:
        yield f"{key.replace('/', '_')}.md", file_fragment(results, key)


def results_fragment(results: dict[str, Result]) -> str:
    """Every table, one heading per file."""
    parts = []
    for key, result in results.items():
        picture = f"![Perplexity against sparsity](_generated/{key}.svg)\n\n" if key == ONE_SHOT else ""
        parts.append(f"## {title(key)}\n\n{picture}{section(key, result)}")
        if key == PERP:
            rates = table(retraining_views.learning_rates(result["rows"]))
            parts.append(f"### Every learning rate after {retraining_views.FIRST}\n\n{rates}\n")
    return "\n".join(parts) or "No measurement is in `docs/results`.\n"


def title(key: str) -> str:
    """The heading of a result file; its own words when it has none."""
    topic, name = key.split("/")
    return TITLES.get(key, f"{topic.replace('_', ' ').capitalize()}: {name.replace('_', ' ')}")


def readme_fragment(results: dict[str, Result]) -> str:
    """The one result of the README: perplexity and zeros after pruning, ordinary LoRA, MaskLoRA, full fine-tuning."""
    result = results.get(RETRAINING, {"rows": []})
    dense = next((row for row in result["rows"] if row["method"] == "dense"), None)
    first = next((row for row in result["rows"] if row["method"] == "mask_lora"), None)
    if dense is None or first is None:
        return ""
    same = ("pattern", "sparsity", "steps", "seed")
    by_method = {row["method"]: row for row in result["rows"] if all(row[key] == first[key] for key in same)}
    pruned = f"pruned to {first['sparsity']:.0%} by magnitude"
    lines = [
        ("dense model", dense["perplexity"], 0.0),
        (pruned, first["pruned_perplexity"], first["sparsity"]),
        *(
            (label, by_method[method]["perplexity"], by_method[method]["merged_sparsity"])
            for method, label in AFTER_PRUNING.items()
            if method in by_method
        ),
    ]
    taught = distillation_views.readme_lines(results.get(DISTILLED, {"rows": []})["rows"], first)
    lines += taught
    rows = [{"WikiText-2": name, "perplexity": value, "zeros": f"{zeros:.1%}"} for name, value, zeros in lines]
    file, other = (f"docs/results/{key}.json" for key in (RETRAINING, DISTILLED))
    beside = f"; with a teacher in [`{other}`]({other})" if taught else ""
    return (
        f"{table(rows)}\n\n"
        f"<small>A small Llama on a CPU, {first['steps']} steps; {result['protocol']['training']}; made by "
        f"`{result['command']}`, all rows in [`{file}`]({file}){beside}.</small>"
    )


def names_fragment() -> str:
    """The lazy top-level names and the room each comes from."""
    import sparse_ft

    rows = [{"name": f"`sparse_ft.{name}`", "from": f"`sparse_ft.{room}`"} for name, room in sparse_ft._ROOM_OF.items()]
    return table(rows) + "\n"


def recipes_fragment() -> str:
    """Every shipped recipe with the first line of its comment."""
    folder = ROOT / "recipes"
    lines = {path: path.read_text(encoding="utf-8").splitlines()[0] for path in sorted(folder.rglob("*.yaml"))}
    rows = [
        {"recipe": f"`{path.relative_to(folder).with_suffix('').as_posix()}`", "for": line.lstrip("# ")}
        for path, line in lines.items()
    ]
    return table(rows) + "\n"


def verb_groups(verb: str) -> tuple[type, ...]:
    """The dataclasses a verb's options come from: its GROUPS, or those it imports when it has only a few."""
    from sparse_ft.cli.main import VERBS

    module = importlib.import_module(VERBS[verb][0])
    imported = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == "sparse_ft.cli.arguments"]
    return tuple(getattr(module, "GROUPS", imported))


def commands_fragment() -> str:
    """Options of every verb, read from the dataclasses that parse them."""
    from sparse_ft.cli.main import VERBS

    parts = []
    for verb, (_, text) in VERBS.items():
        parts.append(f"## {verb}\n\n{text[0].upper()}{text[1:]}.\n")
        for group in verb_groups(verb):
            summary = str(group.__doc__).strip().splitlines()[0]
            if not group.__module__.startswith("sparse_ft."):
                name = f"{group.__module__.split('.')[0]}.{group.__name__}"
                parts.append(f"And every field of `{name}`, as it is called there.\n")
                continue
            parts.append(
                f"**{summary}**\n\n{table([option_row(entry) for entry in dataclasses.fields(group) if entry.init])}\n"
            )
    return "\n".join(parts)


def option_row(entry: dataclasses.Field[Any]) -> Row:
    """One option as a table row."""
    default: Any = entry.default
    if entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    if default is dataclasses.MISSING:
        shown = "required"
    else:
        shown = "–" if default in (None, [], "") else f"`{default}`"
    return {"option": f"`--{entry.name}`", "default": shown, "meaning": str(entry.metadata.get("help", ""))}


def for_site(text: str) -> str:
    """A page of the repository's root as a fragment of the site: its links lose the docs/ folder."""
    for key in (RETRAINING, DISTILLED):
        text = text.replace(f"](docs/results/{key}.json)", "](results.md)")
    return text.replace("](docs/", "](").replace("](CONTRIBUTING.md)", "](contributing.md)")


def with_block(text: str, block: str) -> str:
    """The README with `block` between its markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}" if block else f"{before}{BEGIN}\n{END}{after}"


def read_results() -> dict[str, Result]:
    """Every result file by `topic/name`, in alphabetical order; what the ways back cost is joined to their rows."""
    found: dict[str, Result] = {
        path.relative_to(RESULTS).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(RESULTS.glob("*/*.json"))
    }
    costs = found.pop(COST, {"rows": []})
    if PERP in found:
        found[PERP]["rows"] = retraining_views.with_costs(found[PERP]["rows"], costs["rows"])
    return found


def fragments(results: dict[str, Result], readme: str) -> Iterable[tuple[str, str]]:
    """(file name in docs/_generated, text) of everything the pages include."""
    yield "results.md", results_fragment(results)
    yield "perp.md", file_fragment(results, PERP)
    yield "perp_advice.md", retraining_views.advice(results.get(PERP, {"rows": []})["rows"])
    yield "encoder.md", file_fragment(results, ENCODER)
    yield "adapter_steps.md", file_fragment(results, STEP)
    yield from delta_fragments(results)
    yield from distillation_fragments(results)
    yield "merging_quality.md", file_fragment(results, MERGES)
    yield "merging_speed.md", file_fragment(results, MERGE_SPEED)
    yield "merging_peer.md", file_fragment(results, MERGE_PEER)
    yield "merging_first_use.md", file_fragment(results, FIRST_USE)
    yield "names.md", names_fragment()
    yield "commands.md", commands_fragment()
    yield "recipes.md", recipes_fragment()
    yield "readme_body.md", for_site(readme)
    yield "contributing_body.md", for_site((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    for page, beginnings in METHOD_PAGES.items():
        yield f"method_{page}.md", method_fragment(results, beginnings)


def main() -> int:
    """Write everything, or only check the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the README is out of date")
    check = parser.parse_args().check
    results = read_results()
    old = README.read_text(encoding="utf-8")
    new = with_block(old, readme_fragment(results))
    if check:
        if new != old:
            print("The result in README.md is out of date; run `make docs`.", file=sys.stderr)
        return int(new != old)
    GENERATED.mkdir(exist_ok=True)
    for name, text in fragments(results, new):
        (GENERATED / name).write_text(text, encoding="utf-8")
    if ONE_SHOT in results:
        picture = GENERATED / f"{ONE_SHOT}.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        plot_one_shot(results[ONE_SHOT], picture)
    if new != old:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
