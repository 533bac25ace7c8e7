"""What the pages say of distillation follows from the rows: rates chosen by validation, pairs at rates both had."""

from __future__ import annotations

import importlib
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
    yield importlib.import_module("distillation_views")
    sys.path.remove(str(DOCS))


def row(rate: float, squarehead: float, validation: float, test: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    what = {"sparsity": 0.5, "steps": 9, "learning_rate": rate, "squarehead_weight": squarehead, "kl_weight": 0.0}
    return {**what, "seed": seed, "validation": validation, "perplexity": test, "cpu_seconds_per_step": 1.0, **more}


def test_a_loss_is_shown_at_the_rate_that_validation_chose(views: ModuleType) -> None:
    rows = [row(1e-3, 0, 9.0, 5.0), row(2e-3, 0, 8.0, 7.0), row(2e-3, 0, 1.0, 8.0, seed=1)]
    [line] = views.losses(rows)
    assert line["learning rate"] == 2e-3 and line["seeds"] == 2 and line["perplexity"] == "7.50 (7.00–8.00)"
    [line] = views.losses(rows, better="high")
    assert line["learning rate"] == 1e-3


def test_a_pair_has_a_rate_that_both_were_trained_at(views: ModuleType) -> None:
    rows = [row(1e-3, 0, 9.0, 5.0), row(1e-3, 1, 9.0, 4.0), row(2e-3, 0, 8.0, 3.0)]
    [line] = views.squarehead(rows, "perplexity", better="low")
    assert (line["perplexity with"], line["without"]) == ("4.00", "5.00")
    assert line["SquareHead is"] == "better (one seed)"
    assert views.squarehead([row(1e-3, 1, 9.0, 4.0), row(2e-3, 0, 8.0, 3.0)], "perplexity", better="low") == []
    other = [row(1e-3, 0, 9.0, 5.0, kl_weight=1.0), row(1e-3, 1, 9.0, 4.0)]
    assert views.squarehead(other, "perplexity", better="low") == []


def test_words_follow_the_gains_of_seeds(views: ModuleType) -> None:
    assert views.verdict([1.0, 2.0]) == "better"
    assert views.verdict([-1.0]) == "worse (one seed)"
    assert views.verdict([0.0]) == "equal (one seed)"
    assert views.verdict([1.0, -1.0]) == "better or worse by seed"


def test_losses_have_names(views: ModuleType) -> None:
    named = {"ce_weight": 0.0, "kl_weight": 3.0, "temperature": 2.0, "squarehead_weight": 0.1, "layers": "8"}
    assert views.loss_name(named) == "3 KL (τ 2) + 0.1 SquareHead (layers 8)"
    assert views.loss_name({"kl_weight": 1.0, "squarehead_weight": 0.0}) == "CE + KL"


def test_validation_chooses_among_the_losses_of_a_setting(views: ModuleType) -> None:
    rows = [
        row(1e-3, 0, 9.0, 5.0),
        row(1e-3, 1, 8.0, 6.0),
        row(1e-3, 0.1, 8.5, 4.0),
        row(1e-3, 0, 7.0, 7.0, kl_weight=1.0),
    ]
    [line] = views.choices(rows, "perplexity", better="low")
    assert line["no teacher"] == "5.00 with CE" and line["SquareHead"] == "6.00 with CE + SquareHead"
    assert line["chosen"] == "KL" and line["KL and SquareHead"] is None
    [line] = views.choices(rows, "perplexity", better="high")
    assert line["chosen"] == "no teacher" and line["SquareHead"] == "4.00 with CE + 0.1 SquareHead"
