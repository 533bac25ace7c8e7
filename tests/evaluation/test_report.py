"""The report page: parses, loads nothing, escapes everything, and shows the numbers that are in the JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.page import Page
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import TINY

from sparse_ft.evaluation import (
    ComparisonRow,
    ReportData,
    SparsityRow,
    charts,
    formats,
    mask_sample,
    recovered_share,
    report_numbers,
    sparsity_table,
    write_comparison,
    write_report,
)
from sparse_ft.evaluation.markup import Markup, join, tag
from sparse_ft.evaluation.style import STYLE
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

EVIL = "<script>alert('x')</script>\"'><img src=http://evil.example/a onerror=alert(1)> & ${x} `y`"


def protocol(windows: int = 240) -> dict[str, Any]:
    return dict(
        dataset="wikitext-2",
        split="test",
        sequence_length=256,
        stride=256,
        windows=windows,
        tokens=windows * 255,
        text_tokens=323110,
        dtype="float32 weights, bfloat16 autocast",
        attention="sdpa",
        bos="not added",
    )


def measured(label: str, perplexity: float, windows: int = 240) -> dict[str, Any]:
    return {"label": label, "perplexity": perplexity, "nll": 3.5, "protocol": protocol(windows)}


@pytest.fixture(scope="module")
def table() -> tuple[list[SparsityRow], MaskSet]:
    model = TINY["llama"]()
    targets, weights = find_targets(model), named_weights(model)
    masks = MaskSet.from_scores({t.name: weights[t.name].detach().abs() for t in targets}, sparsity=0.7, scope="global")
    masks.apply_(model)
    with torch.no_grad():
        weights[targets[3].name].view(-1)[:40] = 0.5
    return sparsity_table(masks, model), masks


@pytest.fixture
def data(table: tuple[list[SparsityRow], MaskSet]) -> ReportData:
    rows, masks = table
    history = [{"step": i, "loss": 5.5 - i / 40 + (i % 3) / 10} for i in range(1, 80)] + [
        {"step": 40, "eval_loss": 4.1}
    ]
    return ReportData(
        title="Retrained",
        model="out/llama-80",
        command="sparse-ft retrain --method mask_lora --output_dir 'my dir'",
        rows=rows,
        method="mask_lora",
        evaluations=[measured("dense", 42.068), measured("pruned", 212.63), measured("retrained", 49.812)],
        histories={"mask_lora": history},
        mask_sample=mask_sample(masks),
        arguments={"learning_rate": 2e-3, "max_steps": 150, "exclude": ["a", "b"], "unset": None},
        versions={"torch": "2.13.0"},
        digests={"masks": masks.digest()},
        steps=[
            {"command": "prune", "arguments": {"method": "wanda"}, "pattern": "2:4", "sparsity": 0.5, "evaluation": []}
        ],
        notes=["A note."],
    )


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a JSON value, and the texts that stand for inf and nan."""
    if isinstance(value, dict):
        for entry in value.values():
            yield from numbers_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from numbers_in(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path, data: ReportData) -> None:
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    page = Page(text)
    assert {"html", "head", "body", "main", "h1", "svg", "table", "style"} <= {name for name, _ in page.tags}
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & {name for name, _ in page.tags}
    for name, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (name, attributes)
        for key in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(key, "data:,") == "data:,"
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "http://" not in text and "https://" not in text
    policy = next(a["content"] for n, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


def test_page_serves_readers_of_all_kinds(tmp_path: Path, data: ReportData) -> None:
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    page = Page(text)
    assert "prefers-color-scheme: dark" in text and "max-width: 760px" in text
    assert dict(page.tags)["html"]["lang"] == "en"
    assert sum(name == "h1" for name, _ in page.tags) == 1
    for name, attributes in page.tags:
        if name == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if name == "th":
            assert attributes["scope"] in ("col", "row", "colgroup")
    assert text.count("<svg") <= text.count("<title>") - 1


def test_numbers_on_the_page_are_the_numbers_in_the_json(tmp_path: Path, data: ReportData) -> None:
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    known = set(numbers_in(numbers))
    assert page.values and page.marks
    for value, shown in page.values:
        assert float(value) in known
        if re.fullmatch(r"[\d.,]+%?", shown):
            percent = shown.endswith("%")
            read = float(shown.rstrip("%").replace(",", "")) / (100 if percent else 1)
            assert read == pytest.approx(float(value), rel=5e-4, abs=5.1e-5 if percent else 0)
    assert {float(mark) for mark in page.marks} <= known
    shown_values = {float(value) for value, _ in page.values}
    for row in numbers["tensors"]:
        assert {float(row[key]) for key in ("kept", "total", "sparsity", "kept_but_zero", "revived")} <= shown_values
    bars = {float(mark) for mark in page.marks}
    assert {42.068, 212.63, 49.812} <= bars
    assert {cell["sparsity"] for cell in numbers["by_block_and_role"]} <= bars


def test_json_holds_what_was_measured(
    tmp_path: Path, data: ReportData, table: tuple[list[SparsityRow], MaskSet]
) -> None:
    rows, masks = table
    write_report(tmp_path, data)
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert numbers["command"] == data.command and numbers["digests"] == {"masks": masks.digest()}
    assert numbers["sparsity"]["zeros"] == sum(row.zeros for row in rows)
    assert numbers["sparsity"]["revived"] == sum(row.revived or 0 for row in rows) > 0
    assert [e["perplexity"] for e in numbers["evaluation"]] == [42.068, 212.63, 49.812]
    expected = (math.log(212.63) - math.log(49.812)) / (math.log(212.63) - math.log(42.068))
    assert numbers["change"]["recovered"] == pytest.approx(expected)
    assert numbers["history"]["mask_lora"][-1] == {"step": 40, "eval_loss": 4.1}
    assert len(numbers["by_block"]) == 2 and len(numbers["by_role"]) == 7 and len(numbers["by_block_and_role"]) == 14


def test_command_and_protocol_are_on_the_page_word_for_word(tmp_path: Path, data: ReportData) -> None:
    page = Page(write_report(tmp_path, data).read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert data.command in text
    assert "240 windows of 256 tokens" in text and "bfloat16 autocast" in text and "2.13.0" in text
    assert "40 revived" in text or "revived" in text
    assert "unset" not in text


def test_a_revived_weight_is_said_loudly(data: ReportData, table: tuple[list[SparsityRow], MaskSet]) -> None:
    rows, _ = table
    revived = sum(row.revived or 0 for row in rows)
    assert f"{revived} pruned weights are not" in report_numbers(data)["verdict"]
    healthy = [replace(row, revived=0) for row in rows]
    assert "are not" not in report_numbers(replace(data, rows=healthy))["verdict"]


def test_every_string_is_escaped(tmp_path: Path) -> None:
    row = SparsityRow(EVIL, f"m.{EVIL}.0", EVIL, (2, 2), EVIL, 2, 4, 2, 0, 1, 1)
    data = ReportData(
        title=EVIL,
        model=EVIL,
        command=EVIL,
        rows=[row],
        method=EVIL,
        evaluations=[
            {"label": EVIL, "kind": EVIL, "perplexity": 2.0, "protocol": {EVIL: EVIL}},
            {**measured(EVIL, 3.0), "protocol": {**protocol(), "dataset": EVIL}},
        ],
        histories={EVIL: [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "b": [{"step": 1, "loss": 2.0}] * 2},
        comparison=[ComparisonRow(EVIL, EVIL, EVIL, perplexity=2.0), ComparisonRow(EVIL, perplexity=3.0)],
        mask_sample={"name": EVIL, "lines": ["10", EVIL]},
        arguments={EVIL: EVIL, "list": [EVIL]},
        versions={EVIL: EVIL},
        digests={EVIL: EVIL},
        steps=[{**dict.fromkeys(("command", "pattern", "sparsity"), EVIL), "evaluation": [{"perplexity": EVIL}]}],
        notes=[EVIL],
        verdict=EVIL,
    )  # fmt: skip
    text = write_report(tmp_path, data).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img"} & {name for name, _ in page.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "<script" not in text and "<img" not in text
    assert EVIL in "".join(page.text)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["model"] == EVIL


@given(st.text(), st.text())
def test_tags_escape_children_and_attributes(child: str, attribute: str) -> None:
    element = tag("p", child, title=attribute)
    page = HTMLParser(convert_charrefs=True)
    seen: dict[str, Any] = {"text": ""}
    page.handle_starttag = lambda name, attrs: seen.update({name: dict(attrs)})  # type: ignore[method-assign]
    page.handle_data = lambda text: seen.update(text=seen["text"] + text)  # type: ignore[method-assign]
    page.feed(element)
    page.close()
    readable = [c for c in child + attribute if c in "\r\0" or 0xD800 <= ord(c) <= 0xDFFF or ord(c) < 32]
    if not readable:
        assert seen == {"p": {"title": attribute}, "text": child}
    assert set(seen) == {"p", "text"}


def test_markup_is_not_escaped_twice() -> None:
    assert tag("b", tag("i", "<"), None, Markup("&amp;")) == "<b><i>&lt;</i>&amp;</b>"
    assert join("a", None, "&") == "a&amp;"
    assert (
        tag("rect", x=1, hidden=None, open=True, off=False, stroke_width=2.0) == '<rect x="1" open stroke-width="2"/>'
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinite_perplexity_is_shown_and_json_stays_valid(tmp_path: Path, data: ReportData, value: float) -> None:
    broken = replace(data, evaluations=[measured("dense", 42.0), measured("pruned", value)])
    page = Page(write_report(tmp_path, broken).read_text(encoding="utf-8"))
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert numbers["evaluation"][1]["perplexity"] == str(value) == numbers["change"]["after"]
    assert str(value) in "".join(page.text) and str(value) in page.marks
    assert numbers["change"]["ratio"] is None


def test_different_protocols_are_not_compared(tmp_path: Path, data: ReportData) -> None:
    mixed = replace(data, evaluations=[measured("dense", 42.0), measured("pruned", 84.0, windows=480)])
    text = "".join(Page(write_report(tmp_path, mixed).read_text(encoding="utf-8")).text)
    assert "do not compare" in text and "+100.0%" not in text
    assert report_numbers(mixed)["change"]["comparable"] is False
    alike = replace(data, evaluations=[measured("dense", 42.0), measured("pruned", 84.0)])
    text = "".join(Page(write_report(tmp_path, alike).read_text(encoding="utf-8")).text)
    assert "do not compare" not in text and "+100.0%" in text


@pytest.mark.parametrize("second", [[], [measured("dense", 50.0, windows=480)]])
def test_values_of_one_protocol_are_paired(tmp_path: Path, data: ReportData, second: list[dict[str, Any]]) -> None:
    """Also if the last value is of another protocol; the figure says by which windows its own two were measured."""
    other = [*second, measured("pruned", 99.0, windows=480)]
    mixed = replace(data, evaluations=[measured("dense", 42.0), measured("pruned", 84.0), *other])
    page = Page(write_report(tmp_path, mixed).read_text(encoding="utf-8"))
    change = report_numbers(mixed)["change"]
    assert (change["before"], change["after"], change["ratio"]) == (42.0, 84.0, 2.0) and not change["comparable"]
    assert change["recovered"] is None and change["only"] == {"windows": 240}
    assert "dense → pruned, +100.0% (windows 240)" in page.text
    assert "from 42.00 to 84.00" in report_numbers(mixed)["verdict"]


def test_two_protocols_make_no_pair(tmp_path: Path, data: ReportData) -> None:
    mixed = replace(data, evaluations=[measured("dense", 42.0), measured("pruned", 84.0, windows=480)])
    page = Page(write_report(tmp_path, mixed).read_text(encoding="utf-8"))
    assert "pruned (windows 480)" in page.text and " → " not in page.text


def test_no_share_where_pruning_cost_next_to_nothing(tmp_path: Path, data: ReportData) -> None:
    cheap = replace(data, evaluations=[measured("dense", 1000.0), measured("b", 1001.0), measured("c", 977.0)])
    text = "".join(Page(write_report(tmp_path, cheap).read_text(encoding="utf-8")).text)
    assert "won back" not in text and report_numbers(cheap)["change"]["recovered"] is None


@pytest.mark.parametrize(
    "empty",
    [
        ReportData("Evaluated", "m", "sparse-ft eval m"),
        ReportData("Evaluated", "m", "sparse-ft eval m", evaluations=[measured("dense", 42.0)]),
        ReportData("Retrained", "m", "c", histories={"a": [{"step": 1, "loss": 2.0}], "b": []}),
        ReportData("Pruned", "m", "c", evaluations=[{"label": "x"}, {"label": "y", "perplexity": None}]),
    ],
)
def test_what_is_not_there_is_left_out(tmp_path: Path, empty: ReportData) -> None:
    page = Page(write_report(tmp_path, empty).read_text(encoding="utf-8"))
    assert "Where the zeros are" not in page.text and "Training" not in page.text


def test_comparison_page(tmp_path: Path, data: ReportData) -> None:
    rows = [
        ComparisonRow("dense", kind="dense", perplexity=42.07),
        ComparisonRow("magnitude", "80%", "pruned", 0.8, 212.6, 0),
        ComparisonRow("MaskLoRA", "80%", "retrained", 0.8, 49.8, 0, start="magnitude", seconds=61.25),
        ComparisonRow("LoRA, merged", "80%", "broken", 0.0, 48.9, 5_033_164, start="magnitude"),
    ]
    page = Page(write_comparison(tmp_path, rows, data).read_text(encoding="utf-8"))
    numbers = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    expected = math.log(212.6 / 49.8) / math.log(212.6 / 42.07)
    assert numbers["comparison"][2]["recovered"] == pytest.approx(expected)
    assert numbers["comparison"][0]["recovered"] is None is numbers["comparison"][1]["recovered"]
    best = [attributes for name, attributes in page.tags if name == "tr" and attributes.get("class") == "best"]
    assert len(best) == 1, "a model that lost its zeros is never the best"
    assert {42.07, 212.6, 49.8, 48.9} <= {float(mark) for mark in page.marks}
    assert "5,033,164" in page.text
    with pytest.raises(ValueError, match="at least one row"):
        write_comparison(tmp_path, [], data)


def test_files_are_named_and_replaced_whole(tmp_path: Path, data: ReportData) -> None:
    assert write_report(tmp_path / "new" / "dir", data) == tmp_path / "new" / "dir" / "report.html"
    page = write_report(tmp_path / "mine.html", data)
    before = page.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.html", "mine.json", "new"]
    with pytest.raises(TypeError):
        write_report(tmp_path / "mine.html", replace(data, evaluations=[3]))  # type: ignore[list-item]
    assert page.read_bytes() == before
    assert write_report(page, data).read_bytes() == before, "the same data gives the same bytes"


def test_mask_sample_is_a_corner_of_a_real_mask(table: tuple[list[SparsityRow], MaskSet]) -> None:
    _, masks = table
    sample = mask_sample(masks, rows=5, columns=7)
    assert sample["lines"] == ["".join(str(int(masks[sample["name"]][i, j])) for j in range(7)) for i in range(5)]
    conv1d = torch.tensor([[True, False], [True, True], [False, False]])  # (in, out)
    assert mask_sample(MaskSet({"w": conv1d}, input_dims={"w": 0}))["lines"] == ["110", "010"]


@pytest.mark.parametrize(
    ("dense", "pruned", "retrained", "share"),
    [
        (10, 1000, 10, 1.0),
        (10, 1000, 1000, 0.0),
        (10, 1000, 100, 0.5),
        (10, 1000, 10_000, -0.5),
        (10, 9, 9, None),
        (1000, 1001, 980, None),
    ],
)
def test_recovered_share(dense: float, pruned: float, retrained: float, share: float | None) -> None:
    found = recovered_share(dense, pruned, retrained)
    assert found is None if share is None else found == pytest.approx(share)
    assert recovered_share(dense, math.nan, retrained) is None is recovered_share(None, pruned, retrained)


def test_heat_map_survives_many_blocks_and_gaps() -> None:
    blocks = [f"encoder.block.{i}" for i in range(48)] + [f"decoder.block.{i}" for i in range(48)]
    cells = {(b, "q"): charts.Cell(0.5, b) for b in blocks if b.startswith("d")}
    page = Page(charts.heat_map(cells, blocks, ["q"], "map"))
    assert sum(a.get("class") == "none" for _, a in page.tags) == 48
    box = next(a["viewbox"] for n, a in page.tags if n == "svg").split()
    for name, attributes in page.tags:
        if name == "rect":
            assert float(attributes["x"]) + float(attributes["width"]) <= float(box[2]) + 1e-6


def test_bars_stay_inside_the_picture() -> None:
    bars = [
        charts.Bar("a", 5.0),
        charts.Bar("b", 1e5),
        charts.Bar("c", math.inf),
        charts.Bar("d", None),
        charts.Bar("e", 0.5),
    ]
    for drawn in (
        charts.bars(bars, "x", baseline=("dense", 5.0)),
        charts.bars(bars[:1], "x"),
        charts.bars(bars[3:4], "x"),
    ):
        for name, attributes in Page(drawn).tags:
            if name in ("line", "text"):
                assert 0 <= float(attributes.get("x", attributes.get("x1", 0))) <= charts.WIDTH


def test_the_dense_line_strikes_through_no_number() -> None:
    """It lies under the bars and their numbers, which are drawn on a rim of the page's colour."""
    drawn = str(charts.bars([charts.Bar("a", 5.0), charts.Bar("b", 9.0)], "x", baseline=("dense", 5.4)))
    assert drawn.index('class="baseline"') < drawn.index('class="bar ') < drawn.index('class="value"')
    assert "svg.bars text { paint-order: stroke; stroke: var(--page);" in STYLE


@example(0.001, 0.0010000000000000002)
@example(7.0, 7.0)
@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
def test_ticks_cover_the_range(a: float, b: float) -> None:
    low, high = sorted((a, b))
    for ticks in (charts.linear_ticks(low, high), charts.log_ticks(low, high)):
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999
        assert ticks == sorted(set(ticks)) and len(ticks) <= 25


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.percent(0.5), "50.00%"),
        (formats.percent(0.0), "0.00%"),
        (formats.percent(1e-7), "<0.01%"),
        (formats.percent(1 - 1e-7), ">99.99%"),
        (formats.count(12582912), "12,582,912"),
        (formats.count(None), "–"),
        (formats.short_count(12582912), "12.6 M"),
        (formats.short_count(999), "999"),
        (formats.perplexity(42.068), "42.07"),
        (formats.perplexity(1604.4), "1,604"),
        (formats.perplexity(math.inf), "inf"),
        (formats.perplexity(None), "–"),
        (formats.change(42.0, 46.2), "+10.0%"),
        (formats.change(42.0, 21.0), "−50.0%"),
        (formats.change(42.0, 420.0), "×10.0"),
        (formats.tick(12.5), "12.5"),
        (formats.tick(1000.0), "1,000"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected
