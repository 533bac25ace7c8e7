"""Plots: a real picture, the mean of the seeds, and a clear word when matplotlib is missing."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest

from sparse_ft.evaluation import plot_curves
from sparse_ft.evaluation.plots import _series

ROWS = [
    {"method": method, "sparsity": sparsity, "perplexity": 37.0 / (1 - sparsity) ** power}
    for power, method in ((1, "sparsegpt"), (2, "magnitude"))
    for sparsity in (0.5, 0.7, 0.9)
]


def size_of_png(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_png_is_a_picture_and_always_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = plot_curves(ROWS, tmp_path / "a.png", baseline=37.0, title="One shot").read_bytes()
    second = plot_curves(ROWS, tmp_path / "b.png", baseline=37.0, title="One shot").read_bytes()
    width, height = size_of_png(first)
    assert width > 800 and height > 500
    assert first == second
    assert plot_curves(ROWS[:3], tmp_path / "b.png").read_bytes() != first


def test_svg_names_every_curve(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_curves(ROWS, tmp_path / "a.svg", x_label="zeros", title="A & B").read_text(encoding="utf-8")
    for word in ("sparsegpt", "magnitude", "zeros", "perplexity", "A &amp; B", "50%", "90%"):
        assert word in text


def test_seeds_are_gathered_and_rows_without_a_number_left_out() -> None:
    rows: list[dict[str, Any]] = [
        {"method": "random", "sparsity": 0.5, "perplexity": p} for p in (10.0, 30.0, math.inf, math.nan, None)
    ]
    assert _series([*rows, {"method": "x"}, {"sparsity": 0.5}], "sparsity", "perplexity", "method") == {
        "random": {0.5: [10.0, 30.0]}
    }


def test_errors_name_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"None of the 6 rows has 'method', 'sparsity' and a finite 'loss'"):
        plot_curves(ROWS, tmp_path / "a.png", y="loss")
    with pytest.raises(ValueError, match=r"a\.gif.*\.png"):
        plot_curves(ROWS, tmp_path / "a.gif")
    real = builtins.__import__

    def without_matplotlib(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(RuntimeError, match=r"sparse-ft\[report\]"):
        plot_curves(ROWS, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
