"""Every shipped recipe runs two steps on a tiny model of the family it is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli.workspace import Result, save_model

from sparse_ft.cli.parser import read_recipe, recipe_roots
from sparse_ft.masks import MaskSet

Command = Callable[..., Result]
RECIPES = sorted(path for root in recipe_roots() for path in root.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_two_steps_of_each_recipe(path: Path, text: Path, tmp_path: Path, command: Command) -> None:
    model = save_model(tmp_path / "dense", path.stem.split("_")[0])
    pattern = ["--pattern", "2:4"] if "2of4" in path.stem else ["--sparsity", 0.6]
    assert command("prune", "--model_name_or_path", model, *pattern, "--output_dir", tmp_path / "sparse").code == 0
    name = f"{path.parent.name}/{path.stem}"
    options = ["--model_name_or_path", tmp_path / "sparse", "--output_dir", tmp_path / "out", "--dataset", text]
    quick = ["--max_steps", 2, "--sequence_length", 16, "--logging_steps", 1, "--use_cpu"]
    result = command("retrain", "--config", name, *options, *quick)
    assert result.code == 0, result.err
    assert MaskSet.load(tmp_path / "out") == MaskSet.load(tmp_path / "sparse")
    assert "retrained" in result.out
    before, after = (directory / "model.safetensors" for directory in (tmp_path / "sparse", tmp_path / "out"))
    assert before.read_bytes() != after.read_bytes(), "two steps changed nothing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_name_no_model_and_no_place(path: Path) -> None:
    assert {"model_name_or_path", "output_dir"}.isdisjoint(read_recipe(path))
