"""The page of a report, section by section, from the dictionary that is also written as `report.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_ft.evaluation import charts, formats
from sparse_ft.evaluation.charts import Bar, Cell
from sparse_ft.evaluation.markup import Markup, join, tag
from sparse_ft.evaluation.perplexity import EvaluationProtocol
from sparse_ft.evaluation.report_training import training_section
from sparse_ft.evaluation.style import STYLE
from sparse_ft.evaluation.tables import comparison_table, sparsity_tables, steps_table, tasks_table
from sparse_ft.evaluation.tasks import perp_means, task_protocol

Numbers = Mapping[str, Any]

# Nothing may be loaded and no script may run, whatever a model or a file is called.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_ABOUT_METRICS = (
    "acc takes the answer with the highest log-likelihood, acc_norm divides it by the answer's length first; "
    "the two do not compare."
)


def render(numbers: Numbers) -> str:
    """The whole page.

    Args:
        numbers: `report_numbers(data)`.
    """
    title = f"{numbers['model']} – {numbers['title']}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        Markup(f"<style>{STYLE}</style>"),
    )
    sections = [
        _comparison(numbers),
        _perplexity(numbers),
        _tasks(numbers),
        _sparsity(numbers),
        training_section(numbers),
        _what_changed(numbers),
        _reproduce(numbers),
    ]
    main = tag("main", _header(numbers), _key_figures(numbers), *_notes(numbers), *sections, _footer(numbers))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def exact(value: Any, shown: str) -> Markup:
    """A number as people read it, carrying the number that is in the JSON."""
    return tag("data", shown, value=value) if value is not None else join(shown)


def kind_of(entry: Mapping[str, Any]) -> str:
    """Colour of an evaluation: its `kind`, or what its label says."""
    if entry.get("kind"):
        return str(entry["kind"])
    label = str(entry.get("label", "")).casefold()
    words = {"dense": ("dense", "before"), "merged": ("merge",), "retrained": ("train", "tun", "lora", "after")}
    return next((kind for kind, parts in words.items() if any(part in label for part in parts)), "pruned")


def _header(numbers: Numbers) -> Markup:
    eyebrow = " · ".join(part for part in ("sparse_ft", numbers["title"], numbers["method"]) if part)
    text = tag(
        "div",
        tag("p", eyebrow, class_="eyebrow"),
        tag("h1", numbers["model"]),
        tag("p", numbers["verdict"], class_="verdict"),
    )
    sample = numbers["mask_sample"]
    if not sample.get("lines"):
        return tag("header", text)
    name = f"Corner of the mask of {sample['name']}: filled squares are kept weights"
    picture = charts.mask_picture(sample["lines"], name)
    caption = f"A corner of the mask of {sample['name']}. Filled: kept."
    return tag("header", text, tag("figure", picture, tag("figcaption", caption)))


def _key_figures(numbers: Numbers) -> Markup | None:
    total, change, evaluations = numbers["sparsity"], numbers["change"], numbers["evaluation"]
    figures: list[Markup] = []
    if total:
        zeros = f"{formats.count(total['zeros'])} of {formats.count(total['total'])} weights are zero"
        figures.append(_figure("Sparsity", exact(total["sparsity"], formats.percent(total["sparsity"])), zeros))
        figures.append(_figure("Pattern", join(numbers["pattern"]), _pattern_line(total), not total["violations"]))
    if evaluations:
        figures.append(_perplexity_figure(evaluations, change))
    if total:
        figures.append(_zeros_figure(total))
    return tag("dl", *figures, class_="figures") if figures else None


def _figure(name: str, big: Markup, small: str, fine: bool = True, tone: str = "") -> Markup:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", big, class_=f"big {tone}".strip()),
        tag("dd", small, class_=None if fine else "bad"),
    )


def _pattern_line(total: Mapping[str, Any]) -> str:
    if total["violations"] is None:
        return "no structure asked for"
    if total["violations"]:
        return f"broken in {formats.count(total['violations'])} groups"
    return "holds in every group of weights"


def _perplexity_figure(evaluations: Sequence[Mapping[str, Any]], change: Mapping[str, Any] | None) -> Markup:
    if change is None:
        only = evaluations[0].get("perplexity")
        return _figure("Perplexity", exact(only, formats.perplexity(only)), str(evaluations[0].get("label", "")))
    first, last = change["before"], change["after"]
    big, said = exact(last, formats.perplexity(last)), str(change["after_label"])
    if first is not None or change["comparable"]:
        big = join(exact(first, formats.perplexity(first)), " → ", big)
        said = f"{change['before_label']} → {said}"
    if change["ratio"] is not None:
        said += f", {formats.change(first, last)}"
    if change["only"]:
        said += f" ({', '.join(f'{key} {value}' for key, value in change['only'].items())})"
    return _figure("Perplexity", big, said)


def _zeros_figure(total: Mapping[str, Any]) -> Markup:
    revived, by_chance = total["revived"], total["kept_but_zero"]
    if revived is None:
        return _figure("Zeros", join("not checked"), "counted in the masks only")
    if revived:
        big = exact(revived, f"{formats.count(revived)} revived")
        return _figure("Zeros", big, "pruned weights that are not zero", False, "bad")
    small = "no pruned weight came back"
    if by_chance:
        small += f"; {formats.count(by_chance)} kept weights are zero too"
    return _figure("Zeros", exact(0, "all intact"), small, True, "good")


def _notes(numbers: Numbers) -> Iterable[Markup]:
    yield from (tag("p", note, class_="warning", role="note") for note in numbers["notes"])
    change = numbers["change"]
    if change and not change["comparable"]:
        text = (
            "These perplexities were measured under different protocols, across which they do not compare; see “How it "
            "was measured”."
        )
        yield tag("p", text, class_="warning", role="note")


def _perplexity(numbers: Numbers) -> Markup | None:
    entries = numbers["evaluation"]
    if not entries:
        return None
    if len(entries) == 1:
        return tag("section", tag("h2", "Perplexity"), _protocols(entries))
    dense = next((e["perplexity"] for e in entries if kind_of(e) == "dense" and formats.finite(e["perplexity"])), None)
    alike = not numbers["change"] or numbers["change"]["comparable"]
    drawn = []
    for entry in entries:
        value, note = entry.get("perplexity"), ""
        if alike and dense is not None and formats.finite(value) and value != dense:
            note = formats.change(dense, value)
        drawn.append(Bar(str(entry.get("label", "")), value, kind_of(entry), "", note))
    return tag(
        "section",
        tag("h2", "Perplexity"),
        tag("p", f"Lower is better.{_about_scale(drawn)}"),
        charts.bars(drawn, "Perplexity of each model"),
        _protocols(entries),
    )


def _about_scale(drawn: Sequence[Bar]) -> str:
    if not charts.needs_log([bar.value for bar in drawn if formats.finite(bar.value)]):
        return ""
    return " Bars start at 1 on a log scale, so that their length is the loss in nats per token."


def _protocols(entries: Sequence[Mapping[str, Any]]) -> Markup:
    lines = dict.fromkeys(protocol_line(entry.get("protocol") or {}) for entry in entries)
    return tag("p", "How it was measured: ", "; ".join(line for line in lines if line), ".", class_="caption")


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """The settings of an evaluation in one line, those of another tool as `key value` pairs."""
    try:
        return str(EvaluationProtocol(protocol))
    except (KeyError, ValueError, TypeError):
        return ", ".join(f"{key} {value}" for key, value in protocol.items())


def _sparsity(numbers: Numbers) -> Markup | None:
    rows = numbers["by_block_and_role"]
    if not rows:
        return None
    columns, roles = list(dict.fromkeys(r["block"] for r in rows)), list(dict.fromkeys(r["role"] for r in rows))
    cells = {
        (r["block"], r["role"]): Cell(r["sparsity"], _describe(r), bool(r["revived"] or r["violations"])) for r in rows
    }
    name = f"Share of zeros in each of {len(columns)} blocks and {len(roles)} kinds of weight, in percent"
    legend = [tag("span", "0%", tag("i", class_="ramp"), "100% zeros")]
    if any(cell.alarm for cell in cells.values()):
        legend.append(tag("span", tag("i", class_="alarm"), "outlined: revived weights or a broken pattern"))
    return tag(
        "section",
        tag("h2", "Where the zeros are"),
        tag("p", "Share of zeros in percent, by block from the first on the left to the last, and by kind of weight."),
        charts.heat_map(cells, columns, roles, name),
        tag("p", *legend, class_="legend"),
    )


def _describe(row: Mapping[str, Any]) -> str:
    text = f"{row['block']} {row['role']}: {formats.count(row['zeros'])} of {formats.count(row['total'])} zero"
    text += f" ({formats.percent(row['sparsity'])})"
    if row["revived"]:
        text += f", {formats.count(row['revived'])} revived"
    if row["violations"]:
        text += f", pattern broken in {formats.count(row['violations'])} groups"
    return text


def _tasks(numbers: Numbers) -> Markup | None:
    entries = numbers["tasks"]
    if not entries:
        return None
    lines = dict.fromkeys(task_protocol(entry.get("protocol") or {}) for entry in entries)
    means = [
        tag("p", f"{label}: ".lstrip(": "), "mean of acc over the tasks of PERP ", exact(mean, f"{mean:.4f}"), ".")
        for label, mean in perp_means(entries).items()
    ]
    return tag(
        "section",
        tag("h2", "Tasks"),
        tag("p", "Share of questions answered right, ± one standard error. ", tag("span", _ABOUT_METRICS)),
        tasks_table(entries),
        *means,
        tag("p", "How it was measured: ", "; ".join(lines), ".", class_="caption"),
    )


def _comparison(numbers: Numbers) -> Markup | None:
    rows = numbers["comparison"]
    if not rows:
        return None
    dense = next((r for r in rows if r["kind"] == "dense" and formats.finite(r["perplexity"])), None)
    drawn = [Bar(r["label"], r["perplexity"], r["kind"], r["group"], _gain(r)) for r in rows]
    names = {
        "dense": "dense",
        "pruned": "pruned in one shot",
        "retrained": "retrained",
        "merged": "merged",
        "broken": "lost its zeros",
    }
    kinds = dict.fromkeys(r["kind"] for r in rows)
    legend = [tag("span", tag("i", class_=kind), names.get(kind, kind)) for kind in kinds]
    return tag(
        "section",
        tag("h2", "Side by side"),
        tag("p", f"Perplexity, lower is better.{_about_scale(drawn)}"),
        charts.bars(
            drawn, "Perplexity of each model", baseline=(dense["label"], dense["perplexity"]) if dense else None
        ),
        tag("p", *legend, class_="legend"),
        tag("h3", "The same in numbers"),
        comparison_table(rows),
    )


def _gain(row: Mapping[str, Any]) -> str:
    return f"{formats.percent(row['recovered'], 0)} won back" if row["recovered"] is not None else ""


def _what_changed(numbers: Numbers) -> Markup | None:
    if not numbers["tensors"]:
        return None
    return tag(
        "section",
        tag("h2", "What changed"),
        tag("p", "Counted in the weights. Kept but zero: the mask keeps the weight, its value happens to be zero."),
        *sparsity_tables(numbers),
    )


def _reproduce(numbers: Numbers) -> Markup:
    parts = [
        tag("h2", "Do it again"),
        tag("p", "One click selects the whole command."),
        tag("pre", tag("code", *_unbroken_words(numbers["command"]))),
    ]
    if numbers["steps"]:
        parts += [tag("h3", "Before this command"), steps_table(numbers["steps"])]
    lines = dict.fromkeys(protocol_line(entry.get("protocol") or {}) for entry in numbers["evaluation"])
    groups = [
        ("Settings", numbers["arguments"]),
        (
            "Evaluation",
            {f"protocol {i}" if len(lines) > 1 else "protocol": line for i, line in enumerate(lines, 1) if line},
        ),
        ("Versions", numbers["versions"]),
        ("Digests (SHA-256)", numbers["digests"]),
    ]
    for name, facts in groups:
        if facts:
            parts += [tag("h3", name), _facts(facts, wide=name in ("Evaluation", "Digests (SHA-256)"))]
    return tag("section", *parts)


def _facts(facts: Mapping[str, Any], wide: bool) -> Markup:
    known = {key: value for key, value in facts.items() if value is not None}
    pairs = [tag("div", tag("dt", key), tag("dd", _said(value))) for key, value in known.items()]
    return tag("dl", *pairs, class_="facts wide" if wide else "facts")


def _unbroken_words(command: str) -> Iterable[Markup]:
    """A command that wraps between its words and not inside `--an-option`; the text itself is unchanged."""
    for word in re.split(r"(\s+)", command):
        yield join(word) if word.isspace() else tag("span", word)


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(entry) for entry in value)
    return str(value)


def _footer(numbers: Numbers) -> Markup:
    return tag("footer", "This page is one file and loads nothing. The same numbers are in the JSON file beside it.")
