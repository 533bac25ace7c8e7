"""What is said of a name that does not exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparse_ft.naming import check_choice, did_you_mean


def test_the_nearest_name_else_all_else_what_the_caller_says() -> None:
    known = ["magnitude", "wanda"]
    assert did_you_mean("wnda", known) == "Did you mean 'wanda'?"
    assert did_you_mean("xyz", known) == "Known: magnitude, wanda."
    assert did_you_mean("xyz", known, otherwise="See --help.") == "See --help."
    assert did_you_mean("wnda", known, otherwise="See --help.") == "Did you mean 'wanda'?"
    assert did_you_mean(5, known) == "Known: magnitude, wanda.", "what YAML read as a number is no name"


def test_a_choice_is_given_back_or_refused() -> None:
    assert check_choice("method", "wanda", iter(["magnitude", "wanda"])) == "wanda"
    with pytest.raises(ValueError, match=r"^Unknown method 'wnda'\. Did you mean 'wanda'\?$"):
        check_choice("method", "wnda", iter(["magnitude", "wanda"]))


def test_it_needs_no_framework() -> None:
    """The command line asks before torch is imported."""
    code = "import sys, sparse_ft.naming; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
