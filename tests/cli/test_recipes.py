"""Every shipped recipe runs two steps on a tiny model of the family it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.wide_models import WIDE
from cli.recipe_memory import SIZES, empty_model, rows_of, trained_parameters
from cli.workspace import Result, save_model, save_tokenizer

from sparse_ft.cli.parser import read_recipe, recipe_roots
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets

Command = Callable[..., Result]
FOLDERS = ("perp", "squarehead")
RECIPES = sorted(path for root in recipe_roots() for folder in FOLDERS for path in (root / folder).glob("*.yaml"))
LARGE = [path for path in RECIPES if path.parent.name == "perp" and not path.stem.startswith("gpt2")]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_steps_of_each_recipe(path: Path, text: Path, tmp_path: Path, command: Command) -> None:
    recipe, family, model = read_recipe(path), path.stem.split("_")[0], tmp_path / "dense"
    if recipe.get("quantization"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install sparse-ft[quant]")
        torch.manual_seed(0)
        WIDE[family]().save_pretrained(model)  # 4 bits need rows of whole blocks
        save_tokenizer(model)
    else:
        save_model(model, family)
    pattern = ["--pattern", "2:4"] if "2of4" in path.stem else ["--sparsity", 0.6]
    assert command("prune", "--model_name_or_path", model, *pattern, "--output_dir", tmp_path / "sparse").code == 0
    name = f"{path.parent.name}/{path.stem}"
    options: list[object] = [
        "--model_name_or_path",
        tmp_path / "sparse",
        "--output_dir",
        tmp_path / "out",
        "--dataset",
        text,
    ]
    quick: list[object] = ["--sequence_length", 16, "--use_cpu"]
    if path.parent.name == "squarehead":
        options += ["--teacher", model]
    if "teacher_top_k" in recipe:
        options += ["--teacher_cache", tmp_path / "targets"]
    if recipe["method"] == "reconstruct":
        quick += ["--samples", 8, "--learning_rate", "3e-3"]  # a step for each sequence; two may gain nothing
    else:
        quick += ["--max_steps", 2, "--logging_steps", 1]
    result = command("retrain", "--config", name, *options, *quick)
    assert result.code == 0, result.err
    assert MaskSet.load(tmp_path / "out") == MaskSet.load(tmp_path / "sparse")
    assert ("error before" if recipe["method"] == "reconstruct" else "retrained") in result.out
    before, after = (directory / "model.safetensors" for directory in (tmp_path / "sparse", tmp_path / "out"))
    assert before.read_bytes() != after.read_bytes(), "two steps changed nothing"
    if path.parent.name == "squarehead":
        (log,) = json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["training"]["logs"].values()
        weighted = {part for part in ("ce", "kl", "squarehead") if float(recipe.get(f"{part}_weight", 0)) > 0}
        assert {key for key in log[0] if re.fullmatch(r"distill/\w+", key)} == {f"distill/{part}" for part in weighted}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_name_no_model_and_no_place(path: Path) -> None:
    assert {"model_name_or_path", "output_dir", "teacher", "teacher_cache"}.isdisjoint(read_recipe(path))


def models_of(path: Path) -> list[str]:
    """The models of published size that a recipe is for; GPT-2 has none."""
    family = {"llama": "Llama", "opt": "OPT"}.get(path.stem.split("_")[0], "no")
    return [name for name in SIZES if name.lower().startswith(family.lower())]


def test_every_recipe_for_large_models_states_its_memory() -> None:
    assert len(LARGE) >= 18
    for path in LARGE:
        text = path.read_text()
        assert text.count("Memory in GiB for") == 1, f"{path.name} has no table"
        assert "A 7B" in text and "a 30B" in text
    for path in set(RECIPES) - set(LARGE):
        assert not re.search(r"\d\dB|\b[67](\.\d)?B", path.read_text()), f"{path.name} names a large model"


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_memory_a_recipe_states(path: Path) -> None:
    text, recipe = path.read_text(), read_recipe(path)
    lines = text[text.index("Memory in GiB") :].splitlines()
    names = lines[1].split()[1:]
    assert names == models_of(path)
    stated = {
        match[1].strip(): (float(match[2]), float(match[3]))
        for line in lines[2:]
        if (match := re.match(r"#   (\w.*?) +([\d.]+) +([\d.]+)$", line))
    }
    (sums,) = (stated.pop(label) for label in list(stated) if label.startswith("sum"))
    verdicts = []
    for column, name in enumerate(names):
        rows = rows_of(name, recipe)
        assert len(stated) == len(rows)
        for row, size in rows.items():
            (found,) = (values[column] for label, values in stated.items() if label.startswith(row))
            assert found == pytest.approx(size / 2**30, abs=0.006), f"{row} of {name}"
        total = sum(size for row, size in rows.items() if row != "main memory") / 2**30
        assert sums[column] == pytest.approx(total, abs=0.006)
        limit = 80 if name.endswith("30B") else 24
        verdicts.append(f"{'fits' if total < 0.95 * limit else 'does not fit'} one GPU of {limit} GB")
    assert f"A 7B {verdicts[0]}; a 30B {verdicts[1]}." in text


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_the_counts_and_shares_a_recipe_states(path: Path) -> None:
    text, recipe = path.read_text(), read_recipe(path)
    if recipe["method"] == "reconstruct":
        return
    totals, masked, trained = [], [], []
    for name in models_of(path):
        model, (own, factors) = empty_model(name), trained_parameters(name, recipe)
        totals.append(sum(parameter.numel() for parameter in model.parameters()))
        masked.append(sum(target.numel for target in find_targets(model)))
        trained.append(own + factors)
        for share in re.findall(r"([\d.]+)% of a 7B", text) if len(trained) == 1 else []:
            # as `trainable_share` counts, factors among the parameters
            assert share == f"{100 * trained[0] / (totals[0] + factors):.{len(share.partition('.')[2])}f}"
    counts = [(totals, "weights"), (masked, "in pruned tensors"), (trained, "trained")]
    if "#   masks " not in text:
        del counts[1]
    stated = ", ".join(f"{one:,} and {other:,} {what}" for (one, other), what in counts)
    assert f"# These are {stated}." in text
    assert "% of the parameters" not in text, "'% of a 7B model' is what is checked"
