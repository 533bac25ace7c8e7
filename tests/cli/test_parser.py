"""Recipes and command lines: the same keys, the same conversions, and the command line wins."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sparse_ft.cli import parser as parser_module
from sparse_ft.cli.main import main
from sparse_ft.cli.parser import ConfigParser, find_recipe, read_recipe, suggest


@dataclass
class Options:
    """Options of every kind of value."""

    model: str
    pattern: str = "unstructured"
    sparsity: float | None = None
    steps: int = 3
    eval: bool = True
    quick: bool = False
    exclude: list[str] | None = field(default=None)
    kwargs: dict | str | None = field(default=None)


def parse(*words: str) -> Options:
    (options,) = ConfigParser([Options], prog="test", description="").parse(words)
    return options


def recipe(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_values_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    text = "model: m\npattern: 2:4\nsparsity: 5e-1\nsteps: 12\neval: false\nquick: yes\nexclude: [k_proj, 1:2]\n"
    options = parse("--config", recipe(tmp_path / "r.yaml", text))
    assert options == Options("m", "2:4", 0.5, 12, False, True, ["k_proj", "1:2"])


@pytest.mark.parametrize("pattern", ["2:4", "1:16", "1:1", "16:32", "4:8"])
def test_a_pattern_is_never_a_time_of_day(pattern: str, tmp_path: Path) -> None:
    assert parse("--model", "m", "--config", recipe(tmp_path / "r.yaml", f"pattern: {pattern}")).pattern == pattern


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_wins_wherever_the_recipe_stands(first: bool, tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", "model: a\nsteps: 5\nsparsity: 0.5\neval: false\nexclude: [a, b]\n")
    own = ["--model", "b", "--steps", "7", "--eval", "--exclude", "c"]
    options = parse(*(["--config", file, *own] if first else [*own, "--config", file]))
    assert (options.model, options.steps, options.eval, options.exclude) == ("b", 7, True, ["c"])
    assert options.sparsity == 0.5


def test_null_is_none(tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", "model: m\nexclude: null\nsparsity: ~\nkwargs:\n")
    options = parse("--config", file)
    assert (options.exclude, options.sparsity, options.kwargs) == (None, None, None)
    assert parse("--config", file, "--sparsity", "0.4").sparsity == 0.4


@pytest.mark.parametrize(
    ("in_recipe", "typed", "expected"),
    [
        ("", "", (1000, None)),
        ("", "--sparsity 0.5", (3, 0.5)),
        ("sparsity: 0.5", "", (3, 0.5)),
        ("steps: 7", "--sparsity=0.5", (3, 0.5)),
        ("sparsity: 0.5", "--steps 7", (7, 0.5)),
        ("steps: 7\nsparsity: 0.5", "", (7, 0.5)),
        ("steps: 7", "--sparsity 0.5 --steps 8", (8, 0.5)),
    ],
)
def test_an_option_that_stands_in_for_another(
    in_recipe: str, typed: str, expected: tuple[int, float | None], tmp_path: Path
) -> None:
    """Given, it leaves the other's own default; typed, it wins over the other's line in the recipe."""
    parser = ConfigParser([Options], prog="test", description="")
    parser.change({"steps": 1000}, [], {"sparsity": "steps"})
    file = recipe(tmp_path / "r.yaml", f"model: m\n{in_recipe}\n")
    (options,) = parser.parse(["--config", file, *typed.split()])
    assert (options.steps, options.sparsity) == expected


def test_null_does_not_stand_in_for_a_required_option(tmp_path: Path) -> None:
    parser = ConfigParser([Options], prog="test", description="")
    parser.change({}, ["exclude"])
    with pytest.raises(ValueError, match="--exclude"):
        parser.parse(["--config", recipe(tmp_path / "r.yaml", "model: m\nexclude: null\n")])


def test_a_mapping_reaches_the_option_as_json(tmp_path: Path) -> None:
    file = recipe(tmp_path / "r.yaml", "model: m\nkwargs: {num_cycles: 3, deep: {a: 0.5}}\n")
    assert parse("--config", file).kwargs == '{"num_cycles": 3, "deep": {"a": 0.5}}'


def test_values_that_look_like_options(tmp_path: Path) -> None:
    assert parse("--config", recipe(tmp_path / "r.yaml", "model: --odd\nsparsity: -0.5\n")).model == "--odd"


WRONG = {
    "unknown key": ("modle: m", ("'modle'", "Did you mean 'model'?")),
    "twice": ("model: a\nmodel: b", ("'model' twice",)),
    "wrong type": ("model: m\nsteps: few", ("--steps", "'few'")),
    "fraction for a count": ("model: m\nsteps: 1.5", ("--steps", "'1.5'")),
    "wrong flag": ("model: m\nquick: maybe", ("--quick", "maybe")),
    "no value for text": ("model: m\npattern:", ("'pattern' no value",)),
    "no value for a count": ("model: m\nsteps: null", ("'steps' no value",)),
    "no value for what is required": ("model: ~", ("'model' no value",)),
    "several values for one": ("model: m\nsteps: [1, 2]", ("'steps' 2 values", "takes one")),
    "no mapping": ("- model\n- m", ("mapping",)),
    "no yaml": ("model: [", ("not valid YAML",)),
    "empty": ("", ("mapping",)),
    "missing": ("steps: 3", ("--model", "required")),
    "code": ("model: !!python/object/apply:os.system ['touch hacked']", ("--model",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_recipes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, naming = WRONG[case]
    file = recipe(tmp_path / "r.yaml", text)
    try:
        options = parse("--config", file)
    except ValueError as error:
        assert "\n" not in str(error)
        if case != "code":
            assert all(part in str(error) for part in naming), str(error)
    else:
        assert case == "code", options
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--modle", "m"], ("'--modle'", "'--model'")),
        (["--model=m", "--spars=0.5"], ("'--spars'", "'--sparsity'")),
        (["--model", "m", "stray"], ("'stray'",)),
        (["--model"], ("--model", "argument")),
        (["--model", "m", "--config"], ("--config",)),
        (["--model", "m", "--config", "no/such.yaml"], ("no/such",)),
        ([], ("--model", "required")),
    ],
)
def test_bad_command_lines(words: list[str], naming: tuple[str, ...]) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse(*words)
    assert all(part in str(caught.value) for part in naming), str(caught.value)


@pytest.mark.parametrize("name", ["perp/llama_2of4", "perp/llama_2of4.yaml", "recipes/perp/llama_2of4.yaml"])
def test_shipped_recipes_are_found_by_bare_name_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).is_file()
    assert read_recipe(find_recipe(name))["method"] == "mask_lora"


def test_recipes_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "sparse_ft"
    (installed / "cli").mkdir(parents=True)
    (installed / "recipes" / "perp").mkdir(parents=True)
    (installed / "recipes" / "perp" / "mine.yaml").write_text("r: 3\n")
    monkeypatch.setattr(parser_module, "__file__", str(installed / "cli" / "parser.py"))
    assert find_recipe("perp/mine") == installed / "recipes" / "perp" / "mine.yaml"
    with pytest.raises(FileNotFoundError, match="Did you mean 'perp/mine'"):
        find_recipe("perp/mien")


def test_a_file_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "perp").mkdir()
    (tmp_path / "perp" / "llama_2of4.yaml").write_text("r: 1\n")
    assert read_recipe(find_recipe("perp/llama_2of4.yaml")) == {"r": "1"}


def test_suggestions() -> None:
    assert suggest("magnitud", ["magnitude", "wanda"]) == " Did you mean 'magnitude'?"
    assert suggest("xyz", ["magnitude", "wanda"]) == " Known: magnitude, wanda."


def test_an_option_that_an_older_transformers_names_otherwise(tmp_path: Path) -> None:
    @dataclass
    class Older:
        gradient_checkpointing: bool = False

    text = "activation_checkpointing: true\n"
    (options,) = ConfigParser([Older], prog="test", description="").parse(["--config", recipe(tmp_path / "r", text)])
    assert options.gradient_checkpointing


def test_help_says_what_a_flag_turns_off_and_which_option_decides(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrain", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--no_eval, --no-eval turn off: measure perplexity" in text
    assert "Given without --max_steps, it decides." in text
    assert text.count("turn off: turn off") == 0
