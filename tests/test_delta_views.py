"""What the pages show of pruned deltas and merges is computed from the rows, whichever of them are there yet."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def views() -> Iterator[ModuleType]:
    sys.path.insert(0, str(DOCS))
    spec = importlib.util.spec_from_file_location("delta_views", DOCS / "delta_views.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(DOCS))


def row(training: str, method: str, p: float | None, value: float, sd: float | None = None, **more: Any) -> Any:
    cell = {"task": "sst2", "training": training, "method": method, "drop_rate": p, "accuracy": value}
    reach = (sd or 0.0) * 0.75**0.5  # four values around the mean whose standard deviation is sd
    values = [value - reach, value - reach, value + reach, value + reach] if sd else [value]
    return {**cell, "accuracy_sd": sd, "masks": len(values), "values": values, **more}


ROWS = [
    row("AdamW, 0.0001", "fine-tuned", None, 0.767, mean_abs_delta=2e-3),
    row("AdamW, 0.0001", "DARE", 0.99, 0.658, 0.01, scale=0.01),
    row("AdamW, 0.0001", "DARE", 0.999, 0.519, 0.01, scale=0.001),
    row("AdamW, 0.0001", "DAREx-q, global, labels", 0.99, 0.66, 0.01, scale=0.02),
    row("AdamW, 0.0001", "DAREx-q, global, labels", 0.999, 0.575, 0.01, scale=0.004),
    row("AdamW, 0.0001", "MP (magnitude)", 0.99, 0.57),
    row("AdamW, 0.0005", "DARE", 0.99, 0.5, 0.01, scale=0.01),
    row("AdamR, 0.0001", "DAREx-L2", 0.99, 0.7, 0.01, scale=0.01),
]


def test_one_line_per_method_one_column_per_drop_rate(views: ModuleType) -> None:
    lines = views.pruned(ROWS)
    assert lines[0]["method"] == "fine-tuned (mean delta 2.0e-03)" and lines[0]["unpruned"] == 0.767
    dare = next(line for line in lines if line["method"] == "DARE")
    assert dare["p = 0.99"] == "0.658 ± 0.010" and dare["p = 0.999"] == "0.519 ± 0.010"
    assert [line["fine-tuned with"] for line in lines][-2:] == ["AdamW, 0.0005", "AdamR, 0.0001"]
    assert all("text" not in line for line in lines), "one task needs no column"
    assert views.scales(ROWS)[0]["p = 0.999"] == "4"


def test_findings_compare_with_dare_beyond_two_standard_errors(views: ModuleType) -> None:
    (searched,) = views.findings(ROWS, "darex_q")
    assert searched["method"] == "DAREx-q, global, labels" and searched["beside"] == "DARE"
    assert searched["p = 0.99"] == "as good" and searched["p = 0.999"] == "better: 0.575 against 0.519"
    (ranked,) = views.findings(ROWS, "importance")
    assert ranked["p = 0.99"] == "worse: 0.570 against 0.658" and "p = 0.999" not in ranked
    (pulled,) = views.findings(ROWS, "adamr")
    assert pulled["fine-tuned with"] == "AdamR, 0.0001" and pulled["p = 0.99"] == "better: 0.700 against 0.658"
    assert views.findings([], "adamr") == []


def test_what_is_better_but_not_above_the_base_says_so(views: ModuleType) -> None:
    lost = [row("AdamW, 0.0001", "base", None, 0.6), *ROWS]
    assert views.findings(lost, "darex_q")[0]["p = 0.999"] == "better: 0.575 against 0.519 (base 0.600)"


def test_perplexities_are_compared_by_their_logarithms(views: ModuleType) -> None:
    """One mask of four that ruins the model makes the deviation as large as the mean."""

    def perplexities(method: str, *values: float) -> Any:
        mean = sum(values) / len(values)
        return {**row("AdamW", method, 0.999, 0.0), "perplexity": mean, "perplexity_sd": mean, "values": list(values)}

    rows = [perplexities("DARE", 1e30, 1e33, 1e31, 1e40), perplexities("DAREx-q, global, labels", 500, 510, 490, 505)]
    for one in rows:
        del one["accuracy"], one["accuracy_sd"]
    assert views.findings(rows, "darex_q")[0]["p = 0.999"] == "better: 501.2 against 2.5e+39"


def test_the_page_of_adamr_shows_the_same_learning_rates_only(views: ModuleType) -> None:
    chosen = views.adamr(ROWS)
    assert {r["training"] for r in chosen} == {"AdamW, 0.0001", "AdamR, 0.0001"}
    assert {r["method"] for r in chosen} == {"fine-tuned", "DARE", "DAREx-L2"}


def test_merges_join_seeds_and_come_in_order(views: ModuleType) -> None:
    rows = [
        {"method": "base", "seed": None, "sentences": 100.0, "docstrings": 200.0},
        {"method": "dare_ties", "seed": 0, "sentences": 50.0, "docstrings": 60.0, "excess": 0.2},
        {"method": "dare_ties", "seed": 1, "sentences": 52.0, "docstrings": 60.0, "excess": 0.4},
        {"method": "ties", "seed": None, "sentences": 50.0, "docstrings": 60.0, "excess": 0.1},
    ]
    lines = views.merges(rows)
    assert [line["method"] for line in lines] == ["base", "ties", "dare_ties (2 seeds)"]
    assert lines[2]["sentences"] == 51.0 and lines[2]["excess"] == "+0.300"


def test_the_speed_of_a_merge_stands_beside_its_own_peer(views: ModuleType) -> None:
    ours = {
        "size_b": 0.35,
        "runner": "sparse_ft",
        "cpu_s": 2.0,
        "cpu_ratio": 1.5,
        "process_cpu_s": 4.0,
        "peak_mb": 390.0,
    }
    ours |= {"beyond_imports_mb": 8.0, "faster_than_mergekit": 4.0}
    rows = [
        {**ours, "runner": "copy", "method": ""},
        {**ours, "method": "ties"},
        {"size_b": 0.35, "runner": "mergekit", "method": "ties", "process_cpu_s": 16.0, "peak_mb": 1500.0},
        {"size_b": 0.1, "runner": "mergekit", "method": "dare_ties", "process_cpu_s": 9.0, "peak_mb": 1500.0},
        {**ours, "method": "dare_ties"},
    ]
    lines = views.merge_speed(rows)
    assert [line["merge"] for line in lines] == ["read all, write one", "ties", "dare_ties"]
    assert [line["mergekit, CPU s / MB"] for line in lines] == [None, "16.0 / 1500", None], "the same size and method"


def test_sizes_are_shares_of_the_model_with_the_plainer_encodings_last(views: ModuleType) -> None:
    plain = {"with_int32_index_of_model": 0.03, "with_bitmask_of_model": 0.0725, "kept": 1}
    rows = [
        {"method": "dense", "density": 1.0, "bytes": 10, "of_model": 1.0},
        {"method": "dare", "density": 0.01, "of_model": 0.0101, **plain},
        {"method": "magnitude", "density": 0.01, "of_model": 0.0164, **plain},
    ]
    assert [tuple(line.values()) for line in views.sizes(rows)] == [
        ("dare", "1.01%"), ("magnitude", "1.64%"), ("(32-bit index and value)", "3.00%"),
        ("(one bit per entry and value)", "7.25%"),
    ]  # fmt: skip


def test_times_are_copies_of_the_model_and_the_memory_held_is_last(views: ModuleType) -> None:
    times = {"copy": 1.0, "load": 2.2, "apply": 0.57, "swap": 0.589}
    rows = [
        {
            "density": d,
            "task": task,
            "model_mb": 800.0,
            "over_copy": t * d,
            "held_mb": 32.0 if task in "apply" else None,
        }
        for d in (0.1, 1.0)
        for task, t in times.items()
    ]
    lines = views.applied(rows)
    assert [line["copies of the model"] for line in lines] == ["load", "apply", "swap", "memory held"]
    assert lines[1]["1 kept"] == "0.57" and lines[2]["0.1 kept"] == "0.06" and lines[3]["1 kept"] == "4.0% of it"


def test_what_the_stored_dtype_loses_is_shown_in_percent(views: ModuleType) -> None:
    row = {"mean_abs_delta": 4e-4, "unchanged": 0.0712, "inexact": 0.0135, "rms_error": 0.000371}
    (line,) = views.stored([{**row, "largest_error": 0.0039, "weights_differ": 0.0083}])
    assert list(line.values()) == ["4e-04", "7.1%", "1.4%", "0.04%", "0.39%", "0.8%"]
