"""The training part of a report: numbers can be read off the charts again, and every retraining is there once."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from evaluation.page import Page
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_ft.evaluation import ReportData, report_numbers, write_report
from sparse_ft.evaluation.charts import WIDTH
from sparse_ft.evaluation.line_charts import Curve, Panel, Stretch, panels, running_mean, tick_labels

Tags = list[tuple[str, dict[str, str]]]


def texts(drawn: str) -> list[tuple[float, float, str, str]]:
    """x, y, class and content of every text of a picture."""
    found = re.findall(r"<text ([^>]*)>(?:<title>.*?</title>)?([^<]*)</text>", drawn)
    read = [(dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)), content) for attributes, content in found]
    return [(float(a["x"]), float(a["y"]), a.get("class", ""), content) for a, content in read]


def circles(drawn: str) -> list[tuple[float, float, float]]:
    """x, y and value of every mark."""
    found = [a for name, a in Page(drawn).tags if name == "circle"]
    return [(float(a["cx"]), float(a["cy"]), float(a["data-value"])) for a in found]


def vertical_axis(drawn: str) -> list[tuple[float, float]]:
    """(value, y) of the numbers left of a single panel: those to the left of its title."""
    left = next(x for x, _, kind, _ in texts(drawn) if kind == "panel")
    return [(float(text.replace(",", "")), y) for x, y, kind, text in texts(drawn) if kind == "axis" and x < left]


positive = st.floats(1e-6, 1e6)


@example([1.0, 1.0], True, 50.0)
@example([1.0, 1.2], True, 50.0)
@settings(max_examples=60, deadline=None)
@given(st.lists(positive, min_size=2, max_size=20), st.sampled_from([None, True]), st.floats(50.0, 300.0))
def test_values_can_be_read_off_the_vertical_axis(values: list[float], log: bool | None, height: float) -> None:
    points = [(float(i), value) for i, value in enumerate(values)]
    panel = Panel("loss, nats", [Curve("", points, dots=True)], height=height, log=log)
    drawn = panels([panel], [Stretch(0.0, len(values) - 1.0)], "a chart", x_label="step")
    axis = vertical_axis(drawn)
    is_log = "(log scale)" in drawn
    assert is_log or not log or max(values) <= 1.1 * min(values)
    ys = [y for _, y in axis]
    assert all(lower - upper >= 15 for lower, upper in pairwise(ys)), "labels run into each other"
    assert len(axis) >= 2, values
    assert len({value for value, _ in axis}) == len(axis)
    of = math.log if is_log else float
    (first, first_y), (last, last_y) = axis[0], axis[-1]
    for _, y, value in circles(drawn):
        expected = first_y + (of(value) - of(first)) / (of(last) - of(first)) * (last_y - first_y)
        assert y == pytest.approx(expected, abs=1.0 + 0.02 * height)
    assert [value for _, _, value in circles(drawn)] == values


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(1, 100_000)), min_size=1, max_size=5),
    st.lists(st.text("abcdefgh +", max_size=30), min_size=5, max_size=5),
)
def test_everything_is_inside_the_picture_and_in_its_stretch(runs: list[tuple[int, int]], names: list[str]) -> None:
    several = len(runs) > 1
    stretches = [
        Stretch(0.0, float(last), name if several else "") for (_, last), name in zip(runs, names, strict=False)
    ]
    curves = [
        Curve("", [(last * (i + 1) / count, 1.0 + i % 3) for i in range(count)], dots=True, stretch=place)
        for place, (count, last) in enumerate(runs)
    ]
    drawn = panels([Panel("a", curves), Panel("b", curves)], stretches, "chart", x_label="step")
    page = Page(drawn)
    width, height = (float(size) for size in next(a for n, a in page.tags if n == "svg")["viewbox"].split()[2:])
    assert width == WIDTH
    assert all(0 <= x <= width and 0 <= y <= height for x, y, _, _ in texts(drawn))
    headings = [(x, content) for x, _, kind, content in texts(drawn) if kind == "heading"] + [(width, "")]
    for (x, content), (following, _) in pairwise(headings):
        assert x + 7.5 * len(content) <= following, "headings run into each other"
    lines = sorted({(float(a["x1"]), float(a["x2"])) for n, a in page.tags if n == "line"})
    assert len(lines) == len(runs), "one piece of the grid for each stretch"
    assert all(end < start for (_, end), (start, _) in pairwise(lines)), "stretches overlap"
    found = iter(circles(drawn))
    for _ in range(2):
        for (start, end), (count, _) in zip(lines, runs, strict=True):
            assert all(start - 0.1 <= next(found)[0] <= end + 0.1 for _ in range(count))
    bottom = [(x, content) for x, y, kind, content in texts(drawn) if kind == "axis" and y > height - 40]
    ticks = [(x, len(content)) for x, content in bottom if content != "step"]
    for (x, letters), (following, more) in pairwise(ticks):
        assert following - x >= 3.4 * (letters + more), "numbers run into each other"


def test_the_horizontal_axis_counts_the_steps_of_each_stretch() -> None:
    curves = [
        Curve("", [(0.0, 1.0), (100.0, 2.0)], dots=True),
        Curve("", [(0.0, 1.0), (50.0, 2.0)], dots=True, stretch=1),
    ]
    drawn = panels([Panel("a", curves)], [Stretch(0.0, 100.0, "one"), Stretch(0.0, 50.0, "two")], "c", x_label="step")
    ends = [x for x, _, value in circles(drawn) if value == 2.0]
    starts = [x for x, _, value in circles(drawn) if value == 1.0]
    numbers = [(content, x) for x, _, kind, content in texts(drawn) if kind == "axis"]
    [second] = [x for content, x in numbers if content == "40" and x > starts[1]]
    assert second == pytest.approx(starts[1] + 0.8 * (ends[1] - starts[1]), abs=0.1)
    assert [content for content, x in numbers if x == pytest.approx(starts[1], abs=0.1)] == ["0"]
    assert [content for _, _, kind, content in texts(drawn) if kind == "heading"] == ["one", "two"]


def test_names_of_curves_do_not_run_into_each_other() -> None:
    curves = [Curve(f"run {i}", [(0.0, 1.0), (10.0, 1.0 + i / 1000)], hue=i) for i in range(6)]
    drawn = panels([Panel("a", curves, height=240.0)], [Stretch(0.0, 10.0)], "c", x_label="step")
    ys = sorted(y for _, y, kind, _ in texts(drawn) if kind == "name")
    assert len(ys) == 6 and all(after - before >= 17 for before, after in pairwise(ys))


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1"]),
        ([0.0, 0.00025, 0.0005], ["0", "2.5e-4", "5e-4"]),
        ([0.0001, 0.001, 0.01, 0.1, 1.0], ["1e-4", "1e-3", "1e-2", "0.1", "1"]),
        ([1.0, 1000.0], ["1", "1,000"]),
        ([3.5000, 3.5005, 3.5010], ["3.5", "3.5005", "3.501"]),
        ([50.0], ["50"]),
        ([2e6], ["2e6"]),
    ],
)
def test_labels_tell_ticks_apart(ticks: list[float], labels: list[str]) -> None:
    assert tick_labels(ticks) == labels


@given(st.lists(st.floats(-100, 100), min_size=30, max_size=200))
def test_running_mean_stays_within_the_values(values: list[float]) -> None:
    smooth = running_mean([(float(i), v) for i, v in enumerate(values)])
    assert len(smooth) == len(values)
    assert min(values) - 1e-9 <= min(v for _, v in smooth) and max(v for _, v in smooth) <= max(values) + 1e-9
    assert smooth[0][1] == pytest.approx(values[0]) and smooth[-1][1] == pytest.approx(values[-1])


# -- the section ------------------------------------------------------------------------------------------------------


def log(steps: int, loss: float, rate: float = 1e-3) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        entry = {"step": step, "loss": loss + 1 / step, "learning_rate": rate * (1.01 - step / steps), "grad_norm": 0.5}
        entries += [entry | {"sparsity/total": 0.5}]
    return [*entries, {"step": steps, "eval_loss": loss + 0.125}, {"step": steps, "train_runtime": 3.0}]


def step(command: str, method: str, **training: Any) -> dict[str, Any]:
    return {
        "command": command, "arguments": {"method": method}, "pattern": "2:4", "sparsity": 0.5, "evaluation": [],
        "training": training,
    }  # fmt: skip


def page_of(directory: Path, **content: Any) -> tuple[str, str]:
    """The page and its text."""
    data = ReportData(title="Retrained", model="m", command="sparse-ft retrain --x 1", **{"method": "norms", **content})
    written = write_report(directory, data).read_text(encoding="utf-8")
    return written, " ".join(Page(written).text)


def pictures(written: str) -> list[str]:
    return re.findall(r"<svg [^>]*curves.*?</svg>", written)


def test_a_retraining_is_drawn_with_all_it_logged(tmp_path: Path) -> None:
    written, text = page_of(tmp_path, histories={"norms": log(100, 3.0)})
    [picture] = pictures(written)
    titles = [content for _, _, kind, content in texts(picture) if kind == "panel"]
    assert titles == [
        "loss, nats per token",
        "learning rate",
        "norm of the gradient, before clipping",
        "sparsity of the masked weights, %",
    ]
    assert [value for _, _, value in circles(picture)] == [3.125]
    assert "loss on the evaluation text" in text and "optimizer step" in text
    assert "learning rate (log scale)" not in text, "a schedule is drawn as it is, however small it ends"
    assert not [content for _, _, kind, content in texts(picture) if kind == "heading" and content]
    _, text = page_of(tmp_path, histories={"norms": [{"step": i, "loss": 2.0} for i in (1, 2)]})
    assert "learning rate" not in text and "evaluation text" not in text


def test_what_was_learnt_from_a_teacher_is_drawn_below_the_loss(tmp_path: Path) -> None:
    taught = [
        {**entry, "distill/ce": 3.0, "distill/kl": 0.5, "distill/squarehead/layer_1": 0.1} for entry in log(100, 3.0)
    ]
    written, text = page_of(tmp_path, histories={"norms": taught})
    [picture] = pictures(written)
    titles = [content for _, _, kind, content in texts(picture) if kind == "panel"]
    assert titles[1:4] == ["cross-entropy, nats per token", "KL from the teacher, nats per token", "learning rate"]
    assert "weighted sum" in text
    assert "weighted sum" not in page_of(tmp_path, histories={"norms": log(100, 3.0)})[1]


def test_retrainings_stand_one_after_the_other(tmp_path: Path) -> None:
    steps = [
        step("prune", "wanda"),
        step("retrain", "full", logs={"full": log(300, 5.0, 1e-5)}),
        step("prune", "magnitude"),
    ]
    written, text = page_of(tmp_path, histories={"norms": log(100, 3.0)}, steps=steps)
    [picture] = pictures(written)
    headings = [(x, content) for x, _, kind, content in texts(picture) if kind == "heading"]
    assert [content for _, content in headings] == ["2. retrain full", "4. retrain norms"]
    marks = circles(picture)
    assert [value for _, _, value in marks] == [5.125, 3.125]
    assert marks[0][0] < headings[1][0] < marks[1][0]
    assert "learning rate (log scale)" in text, "rates a hundred times apart are not drawn on one linear axis"
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert numbers["steps"][1]["training"]["logs"]["full"] == log(300, 5.0, 1e-5)


def test_runs_of_one_command_lie_over_each_other(tmp_path: Path) -> None:
    written, _ = page_of(tmp_path, histories={"first": log(100, 3.0), "second": log(100, 4.0)})
    [picture] = pictures(written)
    names = [(y, content) for _, y, kind, content in texts(picture) if kind == "name"]
    assert [content for _, content in names] == ["first", "second"], "named once, in the first panel"
    assert names[1][0] < names[0][0], "the higher loss is the higher curve"


WINDOWS = [
    {"block": f"model.layers.{i}", "window": window, "loss_before": 0.5 * 4**i, "loss_after": left * 0.5 * 4**i,
     "iterations": 64}
    for i in range(5) for window, left in (("attn", 0.25), ("mlp", 0.01))
]  # fmt: skip


def test_reconstruction_has_a_panel_for_each_kind_of_window(tmp_path: Path) -> None:
    written, text = page_of(tmp_path, reconstruction=WINDOWS)
    [picture] = pictures(written)
    titles = [content for _, _, kind, content in texts(picture) if kind == "panel"]
    assert titles == [f"{kind}: mean squared error of its output (log scale)" for kind in ("attn", "mlp")]
    shown = sorted(value for _, _, value in circles(picture))
    assert shown == sorted(entry[key] for entry in WINDOWS for key in ("loss_before", "loss_after"))
    assert "5% of the error that pruning had made is left" in text  # sqrt(0.25 * 0.01)
    assert "Every window ( 10 )" in text or "Every window (10)" in text
    assert "25.0%" in text and "1.0%" in text
    assert json.loads((tmp_path / "report.json").read_text())["reconstruction"] == WINDOWS
    places = [x for x, _, value in circles(picture)[:5]]
    assert places == sorted(places), "blocks in order of depth"
    numbers = [content for _, _, kind, content in texts(picture) if kind == "axis"]
    assert [n for n in numbers if n in list("01234")][-5:] == list("01234")


def test_reconstruction_without_an_error_is_drawn_too(tmp_path: Path) -> None:
    windows = [{"block": i, "window": "block", "loss_before": 0.0, "loss_after": 0.0, "iterations": 0} for i in (0, 1)]
    written, text = page_of(tmp_path, reconstruction=windows)
    assert "log scale" not in text and "is left" not in text
    assert len(circles(pictures(written)[0])) == 4


def test_what_was_trained_adds_up(tmp_path: Path) -> None:
    groups = {"mask_lora": {"tensors": 28, "weights": 4000}, "norms": {"tensors": 5, "weights": 160}}
    counts = {"trainable": 4160, "total": 104_000, "groups": groups}
    written, text = page_of(tmp_path, trainable=counts)
    cells = re.findall(r'<data value="([^"]*)">([^<]*)</data>', written)
    assert ("4160", "4,160") in cells and ("33", "33") in cells and (repr(0.04), "4.0000%") in cells
    assert "mask_lora" in text and "What was trained" in text
    alone = {"trainable": 160, "total": 104_000, "groups": {"norms": groups["norms"]}}
    written, text = page_of(tmp_path, trainable=alone, steps=[step("retrain", "x", trainable=counts)])
    assert text.count("2. retrain norms") == 1 and text.count("1. retrain x") == 2, "here and in the history"
    assert text.count("All") == 1, "one group needs no sum"


@pytest.mark.parametrize(
    "broken",
    [
        {"logs": 5, "trainable": [], "reconstruction": "x"},
        {"logs": {"a": [1, {"loss": "nan", "step": 1}, {"loss": 2.0}], "b": None}},
        {"trainable": {"trainable": "many"}, "reconstruction": [1, {"block": 0}, {"loss_before": "inf"}]},
        {"trainable": {"trainable": 3, "groups": {"a": 7, "b": {"tensors": "x"}}}},
        None,
    ],
)
def test_a_spoilt_record_of_training_is_left_out(tmp_path: Path, broken: Any) -> None:
    written, text = page_of(tmp_path, steps=[{**step("retrain", "full"), "training": broken}])
    assert not pictures(written)
    assert "What was trained" not in text or "a" in text
    assert Page(written).open == []


def of_task(label: str, task: str, metric: str, value: float, **protocol: Any) -> dict[str, Any]:
    fixed = {"samples": 20, "limit": None, "num_fewshot": 0, "seed": 0, "task_version": "1.0", "max_length": 64}
    measured = {"task": task, "metric": metric, **fixed, "dtype": "float32 weights", "lm_eval": "0.4", **protocol}
    return {"label": label, "task": task, "metric": metric, "value": value, "stderr": 0.01, "protocol": measured}


def test_tasks_stand_side_by_side_where_they_were_measured_alike(tmp_path: Path) -> None:
    entries = [
        {"label": "dense", "perplexity": 20.0, "protocol": {}},
        of_task("dense", "arc_easy", "acc", 0.5),
        of_task("dense", "arc_easy", "acc_norm", 0.25),
        {"label": "pruned", "perplexity": 40.0, "protocol": {}},
        of_task("pruned", "arc_easy", "acc", 0.375),
        of_task("pruned", "arc_easy", "acc_norm", 0.125, limit=5, samples=5),
    ]
    written, text = page_of(tmp_path, evaluations=entries)
    rows = [re.findall(r">([^<>]+)<", row) for row in re.findall(r"<tr>.*?</tr>", written)]
    rows = [row for row in rows if row[0] == "arc_easy"]
    assert len(rows) == 3
    assert rows[0] == ["arc_easy", "acc", "0.5000 ± 0.0100", "0.3750 ± 0.0100", "20"]
    assert rows[1] == ["arc_easy", "acc_norm", "0.2500 ± 0.0100", "20"]
    assert rows[2] == ["arc_easy", "acc_norm", "0.1250 ± 0.0100", "5"], "another protocol is another line"
    assert "lm_eval 0.4, 0-shot, all questions" in text and "the first 5 questions" in text
    numbers = report_numbers(ReportData("t", "m", "c", evaluations=entries))
    assert [entry["perplexity"] for entry in numbers["evaluation"]] == [20.0, 40.0]
    assert numbers["change"]["ratio"] == 2.0 and len(numbers["tasks"]) == 4
    assert "mean of acc" not in text


def test_the_mean_is_that_of_the_whole_set(tmp_path: Path) -> None:
    names = ["boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75]
    entries = [of_task("pruned", name, "acc", value) for name, value in zip(names, values, strict=True)]
    _, text = page_of(tmp_path, evaluations=[*entries, of_task("pruned", "hellaswag", "acc_norm", 0.9)])
    assert f"{sum(values) / 7:.4f}" in text and "mean of acc" in text
    _, text = page_of(tmp_path, evaluations=[*entries[:6], of_task("pruned", names[6], "acc", 0.5, limit=3)])
    assert "mean of acc" not in text
