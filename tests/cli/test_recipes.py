"""Every shipped recipe runs two steps on a tiny model of the family it is for."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from cli.workspace import Result, save_model
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from sparse_ft.adapters import group_parameters, parse_method
from sparse_ft.cli.parser import read_recipe, recipe_roots
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets

Command = Callable[..., Result]
RECIPES = sorted(path for root in recipe_roots() for path in (root / "perp").glob("*.yaml"))
SIZES = {"Llama-2-7B": (4096, 32), "LLaMA-30B": (6656, 60), "OPT-6.7B": (4096, 32), "OPT-30B": (7168, 48)}
WITH_MEMORY = [path for path in RECIPES if "Memory in GiB" in path.read_text()]


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


@cache
def empty_model(name: str) -> PreTrainedModel:
    """A model of published size without weights."""
    width, blocks = SIZES[name]
    heads = width // 128
    with torch.device("meta"):
        if name.startswith("OPT"):
            sizes = dict(vocab_size=50272, ffn_dim=4 * width, word_embed_proj_dim=width, max_position_embeddings=2048)
            model: PreTrainedModel = OPTForCausalLM(
                OPTConfig(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, **sizes)
            )
        else:
            sizes = dict(vocab_size=32000, intermediate_size={4096: 11008, 6656: 17920}[width])
            model = LlamaForCausalLM(
                LlamaConfig(hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, **sizes)
            )
    model.tie_weights()
    return model


def expected_memory(name: str, method: str, rank: int) -> dict[str, float]:
    """Rows of a recipe's table in bytes, by the start of their name; what is counted in a run is left out."""
    model, parts = empty_model(name), parse_method(method)
    config, targets = model.config, find_targets(model)
    trained = sum(rank * sum(target.shape) for target in targets) if parts.adapter else 0
    trained += sum(
        model.get_parameter(parameter).numel() for group in parts.groups for parameter in group_parameters(model, group)
    )
    rows = {
        "weights": 2 * sum(parameter.numel() for parameter in model.parameters()),
        "trained": 16 * trained,
        "inputs of blocks": 2 * 2048 * config.hidden_size * config.num_hidden_layers,
        "logits and loss": 12 * 2048 * config.vocab_size,
    }
    return {**rows, "masks": sum(target.numel for target in targets) / 8} if parts.adapter else rows


@pytest.mark.parametrize("path", WITH_MEMORY, ids=lambda path: path.stem)
def test_the_memory_a_recipe_states(path: Path) -> None:
    text, recipe = path.read_text(), read_recipe(path)
    lines = text[text.index("Memory in GiB") :].splitlines()
    names = lines[1].split()[1:]
    stated = {
        match[1].strip(): (float(match[2]), float(match[3]))
        for line in lines[2:]
        if (match := re.match(r"#   (\w.*?) +([\d.]+) +([\d.]+)$", line))
    }
    sums = stated.pop("sum")
    for column, name in enumerate(names):
        rows = expected_memory(name, recipe["method"], int(recipe.get("r", 16)))
        for row, size in rows.items():
            (found,) = (values[column] for label, values in stated.items() if label.startswith(row))
            assert found == pytest.approx(size / 2**30, abs=0.006), f"{row} of {name}"
        assert len(stated) == len(rows) + 1, "only the block is counted rather than computed"
        assert sums[column] == pytest.approx(sum(values[column] for values in stated.values()), abs=0.03)
        limit = 80 if name.endswith("30B") else 24
        fits = f"fits one GPU of {limit} GB" if sums[column] < 0.95 * limit else f"does not fit one of {limit} GB"
        assert fits in text
    method = parse_method(recipe["method"])
    for number in re.findall(r"0\.\d{4}%", text):
        weights, trained = (expected_memory(names[0], str(method), 16)[row] for row in ("weights", "trained"))
        assert number == f"{trained / 16 / (weights / 2):.4%}"
