"""Pages say what is true: commands have the options shown, names exist, numbers come from result files."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sparse_ft
from sparse_ft.cli.main import VERBS

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "docs").glob("*/*.md")])
PAGES = [page for page in PAGES if "_generated" not in page.parts]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def page_id(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def shown_commands(text: str) -> Iterator[list[str]]:
    """Words of every `sparse-ft <verb> …` line, comments and placeholders cut off."""
    for line in text.splitlines():
        match = re.search(r"\bsparse(?:-ft|_ft) ((?:{})\b[^`…|#]*)".format("|".join(VERBS)), line)
        if match and ("--" in match[1] or line.strip().startswith("sparse-ft")):
            yield shlex.split(match[1].removesuffix("\\").strip())


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tables", REPOSITORY / "docs" / "build_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=page_id)
def test_commands_have_the_options_shown(page: Path, generator: ModuleType) -> None:
    for words in shown_commands(page.read_text(encoding="utf-8")):
        fields = [field for group in generator.verb_groups(words[0]) for field in dataclasses.fields(group)]
        known = {field.name for field in fields} | {"config", "help", "debug"}
        for word in words[1:]:
            if word.startswith("--"):
                name = word[2:].split("=")[0]
                assert name in known or name.removeprefix("no_") in known, f"sparse-ft {words[0]} has no {word}"


def test_the_command_finder_finds_commands() -> None:
    text = "    sparse-ft prune --pattern 2:4 --output_dir S   # why\nuse `sparse-ft eval S --dataset d` now"
    assert list(shown_commands(text)) == [
        ["prune", "--pattern", "2:4", "--output_dir", "S"],
        ["eval", "S", "--dataset", "d"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_in_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bsparse_ft\.([A-Za-z]\w*)\b(?!\.json)", text):
        found = hasattr(sparse_ft, name) or importlib.util.find_spec(f"sparse_ft.{name}") is not None
        assert found or name == "json", f"sparse_ft.{name} does not exist"
    for room, names in re.findall(r"from sparse_ft\.(\w+) import ([\w, ]+)", text):
        module = importlib.import_module(f"sparse_ft.{room}")
        for name in names.split(","):
            assert hasattr(module, name.strip()), f"sparse_ft.{room} has no {name.strip()}"
    for path in re.findall(r"`((?:sparse_ft|tests|docs|recipes|launch)/[\w/.]+\.(?:py|yaml))`", text):
        assert (REPOSITORY / path).exists() or "snip" in path, f"{path} does not exist"


def test_readme_result_is_generated() -> None:
    command = [sys.executable, str(REPOSITORY / "docs" / "build_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_seeds_are_joined_and_columns_before_the_seed_are_kept_apart(generator: ModuleType) -> None:
    rows = [
        {"method": "a", "sparsity": 0.5, "seed": 0, "perplexity": 10.0},
        {"method": "a", "sparsity": 0.5, "seed": 1, "perplexity": 14.0},
        {"method": "a", "sparsity": 0.6, "seed": 0, "perplexity": 20.0},
    ]
    joined = generator.over_seeds(rows)
    assert [row["runs"] for row in joined] == [2, 1]
    assert joined[0]["perplexity"] == "12.00 (10.00–14.00)"
    assert joined[1] == {"method": "a", "sparsity": 0.6, "runs": 1, "perplexity": 20.0}


def test_tables_show_every_value_and_drop_empty_columns(generator: ModuleType) -> None:
    text = generator.table([{"name": "a|b", "count": 12345, "ratio": 0.123456, "note": None}, {"name": "c"}])
    header, rule, first, second = text.splitlines()
    assert header == "| name | count | ratio |"
    assert rule == "|---|---:|---:|"
    assert first == "| a\\|b | 12,345 | 0.1235 |"
    assert second == "| c | – | – |"


def test_one_shot_rows_become_one_line_per_method(generator: ModuleType) -> None:
    rows = [
        {"method": "dense", "pattern": "dense", "sparsity": 0.0, "seed": 0, "perplexity": 5.0},
        {"method": "wanda", "pattern": "unstructured", "sparsity": 0.5, "seed": 0, "perplexity": 6.0},
        {"method": "wanda", "pattern": "2:4", "sparsity": None, "seed": 0, "perplexity": 7.0},
    ]
    assert generator.perplexity_by_pattern(rows) == [
        {"perplexity": "dense", "50%": 5.0, "2:4": 5.0},
        {"perplexity": "wanda", "50%": 6.0, "2:4": 7.0},
    ]
