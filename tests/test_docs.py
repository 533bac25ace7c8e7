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
from typing import Any

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
def generator() -> Iterator[ModuleType]:
    sys.path.insert(0, str(REPOSITORY / "docs"))  # where it finds its own modules as a script
    spec = importlib.util.spec_from_file_location("build_tables", REPOSITORY / "docs" / "build_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(REPOSITORY / "docs"))


@pytest.fixture(scope="module")
def views(generator: ModuleType) -> ModuleType:
    return generator.retraining_views


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


def perp_row(method: str, rate: float | None, seed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    """A cell of `quality_perp.py`; validation perplexity, gap and costs follow from the perplexity unless given."""
    row = {"method": method, "pruning": "magnitude 80%", "learning_rate": rate, "seed": seed, "perplexity": perplexity}
    if rate is not None:
        row |= {"validation_perplexity": perplexity, "gap_closed": (200 - perplexity) / 100, "trainable_share": 0.5}
        row |= {"seconds_per_step": 1.0, "cpu_seconds": 150.0, "peak_mb": 1000}
    return row | more


PERP_ROWS = [
    perp_row("dense", None, 0, 100.0, pruning="none"),
    perp_row("dense", None, 0, 100.0, pruning="none"),  # two processes may both write it
    perp_row("pruned", None, 0, 200.0),
    perp_row("full", 1e-3, 0, 106.0, validation_perplexity=50.0),
    perp_row("full", 5e-4, 0, 104.0, validation_perplexity=51.0),  # better on the test text, not on validation
    perp_row("full", 1e-3, 1, 110.0),
    perp_row("mask_lora", 2e-3, 0, 112.0, trainable_share=0.05, cpu_seconds=120.0),
    perp_row("biases+norms", 1e-2, 0, 130.0, trainable_share=0.0002, cpu_seconds=200.0),
    perp_row("norms", 1e-2, 0, 140.0, trainable_share=0.0001, cpu_seconds=90.0),
    perp_row("reconstruct, linear", 1e-3, 0, 120.0, cpu_seconds=123.0),
    perp_row("reconstruct, attn_mlp", 1e-3, 0, 118.0, peak_mb=800),
    perp_row("pruned", None, 0, 150.0, pruning="SparseGPT 80%"),
    perp_row("mask_lora", 2e-3, 0, 105.0, pruning="SparseGPT 80%"),
    perp_row("full", 5e-4, 0, 106.0, pruning="SparseGPT 80%"),  # not the chosen rate
]


def test_the_learning_rate_is_chosen_by_validation_and_seeds_are_joined(views: ModuleType) -> None:
    assert views.chosen_rates(PERP_ROWS)["full"] == 1e-3
    shown = views.recovered(PERP_ROWS)
    assert [(row["pruning"], row["method"]) for row in shown] == [
        ("–", "dense"),
        ("magnitude 80%", "pruned"),
        ("magnitude 80%", "full (2 seeds)"),
        ("magnitude 80%", "mask_lora"),
        ("magnitude 80%", "reconstruct, attn_mlp"),
        ("magnitude 80%", "reconstruct, linear"),
        ("magnitude 80%", "biases+norms"),
        ("magnitude 80%", "norms"),
        ("SparseGPT 80%", "pruned"),
        ("SparseGPT 80%", "mask_lora"),
    ]
    full = shown[2]
    assert full["learning rate"] == 1e-3
    assert full["perplexity"] == "108.0 (106.0–110.0)" and full["gap closed"] == "92.0% (90.0%–94.0%)"
    assert shown[3]["trained"] == "5%" and shown[1]["trained"] is None


def test_a_second_seed_does_not_take_part_in_the_choice(views: ModuleType) -> None:
    rows = [*PERP_ROWS, perp_row("full", 5e-4, 1, 101.0, validation_perplexity=1.0)]
    assert views.chosen_rates(rows) == views.chosen_rates(list(reversed(rows))) == views.chosen_rates(PERP_ROWS)


def test_every_learning_rate_is_listed_with_the_chosen_one_marked(views: ModuleType) -> None:
    listed = [row for row in views.learning_rates(PERP_ROWS) if row["method"] == "full"]
    assert [(row["learning rate"], row["chosen"]) for row in listed] == [(5e-4, False), (1e-3, True)]


def test_advice_follows_from_the_rows(views: ModuleType) -> None:
    lines = views.advice(PERP_ROWS).splitlines()
    bullets = [re.sub(r"\]\(methods/\w+\.md\)", "", line).replace("[", "") for line in lines]
    needs, pairs = bullets[2:9], bullets[12:15]
    assert needs == [
        "* Best recovered quality: full (92.0%).",
        "* An adapter that is a file of its own: mask_lora (88.0%).",
        "* Least computation above 70%: mask_lora (120 CPU s; 88.0%), reconstruct, linear (123 CPU s; 80.0%).",
        "* No back-propagation through the whole model: reconstruct, attn_mlp (82.0%).",
        "* Least memory above 70%: reconstruct, attn_mlp (800 MB at the peak; 82.0%).",
        "* Small parts only, no pruned matrix changed: biases+norms (70.0%).",
        "* Fewest trained parameters above 70%: biases+norms (0.02%; 70.0%).",
    ]
    assert pairs[0] == "* Windows of attention and MLP, not single matrices: 82.0% instead of 80.0%."
    assert pairs[1] == "* An adapter under the mask, not every kept weight: 88.0% instead of 92.0%."
    assert bullets[-1] == "* after SparseGPT 80%: mask_lora 95.0%."
    changed = [row | {"gap_closed": 0.99} if row["method"] == "norms" else row for row in PERP_ROWS]
    assert "Best recovered quality: [norms](methods/perp_groups.md) (99.0%)" in views.advice(changed)


def test_advice_links_to_pages_that_exist(views: ModuleType) -> None:
    for label in ("full", "mask_lora", "mask_lora+norms", "scale_lora, symmetry broken", "lora_prune", "head", "norms"):
        page = re.search(r"\((.*)\)", views.link(label))
        assert page is not None and (REPOSITORY / "docs" / page[1]).is_file()
    assert "reconstruction.md" in views.link("reconstruct, then mask_lora")


def test_views_of_the_encoder_and_of_a_training_step(views: ModuleType) -> None:
    dense = {"model": "dense", "seed": 0, "masked_token_loss": 2.0, "sparsity": 0.0}
    rebuilt = {"model": "r", "seed": 0, "masked_token_loss": 2.5, "sparsity": 0.5, "gap_closed": 0.75}
    assert [row["gap closed"] for row in views.encoder([dense, rebuilt])] == [None, "75.0%"]
    step = {"precision": "bf16", "variant": "lora", "trainable": 7, "wall_over_lora": 1.0, "cpu_over_lora": 1.0}
    assert views.training_step([step])[0] == {
        "precision": "bf16",
        "variant": "lora",
        "wall / LoRA": 1.0,
        "CPU / LoRA": 1.0,
        "peak MB": None,
        "peak MB, checkpointing": None,
        "rise over LoRA's, in weights": None,
        "trained": 7,
    }
    measured = views.training_step([{**step, "over_lora_weights": 3.53, "over_lora_weights_checkpointing": -0.4}])
    assert measured[0]["rise over LoRA's, in weights"] == "+3.5 / -0.4"


def test_fragments_of_a_file_are_sentences_without_it_and_tables_with_it(generator: ModuleType) -> None:
    without = dict(generator.fragments({}, "readme"))
    assert set(without.values()) and all(text.strip() for text in without.values())
    for name in ("perp.md", "perp_advice.md", "encoder.md", "adapter_steps.md", "method_reconstruction.md"):
        assert without[name].startswith("No measurement")
    result = {"command": "c", "rows": PERP_ROWS}
    found = dict(generator.fragments({generator.PERP: result}, "readme"))
    assert "| magnitude 80% | mask_lora |" in found["perp.md"]
    assert "| magnitude 80% | reconstruct, linear |" in found["method_reconstruction.md"]
    assert "full" not in found["method_reconstruction.md"] and "| – | dense |" in found["method_reconstruction.md"]
    assert "biases+norms" in found["method_perp_groups.md"]


def test_every_recipe_is_listed(generator: ModuleType) -> None:
    text = generator.recipes_fragment()
    assert (
        len(RECIPES) == sum(text.count(f"| `{folder}/") for folder in ("perp", "delta", "merge", "squarehead"))
        and "| `perp/llama_2of4` | Recover" in text
    )


def test_the_method_of_a_step_is_shown_beside_plain_lora(generator: ModuleType) -> None:
    step = {"precision": "bf16", "trainable": 7, "wall_over_lora": 1.0, "cpu_over_lora": 1.0}
    rows = [{**step, "variant": name} for name in ("lora", "lora_prune", "mask_lora")]
    text = generator.method_fragment({generator.STEP: {"command": "c", "rows": rows}}, ("mask_lora",))
    assert [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| bf16")] == ["lora", "mask_lora"]


def test_every_method_page_is_in_the_navigation_and_includes_its_numbers(generator: ModuleType) -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    overview = (REPOSITORY / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    for page in generator.METHOD_PAGES:
        assert f"methods/{page}.md" in navigation and f"({page}.md)" in overview
        text = (REPOSITORY / "docs" / "methods" / f"{page}.md").read_text(encoding="utf-8")
        assert f'--8<-- "method_{page}.md"' in text
