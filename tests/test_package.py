"""The house rules that hold for the whole package: layering, laziness, sizes, documentation, what the wheel ships."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import sparse_ft

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "sparse_ft"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))

# A room may import rooms of a smaller number; rooms of the same number do not know each other.
FLOOR = {
    "models": 0,
    "masks": 1,
    "checkpoints": 2,
    "data": 3,
    "pruning": 4,
    "adapters": 4,
    "training": 4,
    "distillation": 4,
    "mask_learning": 4,
    "deltas": 4,
    "merging": 5,
    "reconstruction": 5,
    "evaluation": 4,
    "export": 4,
    "cli": 6,
}

# third-party module -> the rooms (or files) that may import it, at any depth of a file
ONLY_IN = {
    "peft": ("adapters/", "cli/"),
    "trl": ("cli/", "training/"),
    "matplotlib": ("evaluation/",),
    "lm_eval": ("evaluation/tasks.py",),
    "bitsandbytes": ("adapters/quantised.py",),
    "deepspeed": ("training/sharding.py",),
    "torch.distributed.fsdp": ("training/sharding.py",),
}
NOT_IN = {"transformers": ("masks/", "checkpoints/")}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[str]:
    """Every absolute module name imported anywhere in a file, functions included."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["sparse_ft", *path.relative_to(PACKAGE).parts[:-1]]
            base = here[: len(here) - node.level + 1] + ([node.module] if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter; its standard error is shown when it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(code: str, candidates: str) -> set[str]:
    """Which of the space-separated candidate packages are in sys.modules after the code ran in a fresh interpreter."""
    check = f"import sys; print('LOADED', *[m for m in {candidates.split()!r} if m in sys.modules])"
    return set(run_python(f"{code}\n{check}").splitlines()[-1].split()[1:])


def test_every_room_has_its_floor() -> None:
    assert set(ROOMS) <= set(FLOOR), "add the new room to FLOOR, where the design places it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_down_only(path: Path) -> None:
    if path.parent == PACKAGE:
        if path.stem in ("compiling", "naming"):  # every room may use them
            assert not [module for module in imported_modules(path) if module.startswith("sparse_ft")]
        pytest.skip("the package's front door sees every room")
    room = path.relative_to(PACKAGE).parts[0]
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "sparse_ft" or len(parts) < 2 or parts[1] == room or parts[1] not in FLOOR:
            continue
        assert FLOOR[parts[1]] < FLOOR[room], f"{relative(path)} imports {module}, which is not below {room}/"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_third_parties_stay_in_their_rooms(path: Path) -> None:
    where = relative(path)
    for module in imported_modules(path):
        for name, allowed in ONLY_IN.items():
            if f"{module}.".startswith(f"{name}."):
                assert where.startswith(allowed), f"{where} imports {module}; only {allowed} may"
        for name, refused in NOT_IN.items():
            if f"{module}.".startswith(f"{name}."):
                assert not where.startswith(refused), f"{where} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 450, f"{relative(path)} has {lines} lines: split it by concept"
    assert len(path.relative_to(PACKAGE).parts) <= 2, f"{relative(path)} is deeper than room/file.py"
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{relative(path)}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_public_definition_has_a_docstring(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), f"{relative(path)} has no module docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{relative(path)}: {node.name} has no docstring"


@pytest.mark.parametrize("room", ROOMS)
def test_every_exported_name_and_method_is_documented(room: str) -> None:
    module = importlib.import_module(f"sparse_ft.{room}")
    if room == "cli":
        return
    assert module.__all__, f"sparse_ft.{room} exports nothing"
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        text = inspect.getdoc(value)
        assert text, f"sparse_ft.{room}.{name} has no docstring"
        if not inspect.isclass(value):
            continue
        assert not text.startswith(f"{name}("), f"sparse_ft.{room}.{name} has only the docstring dataclasses make"
        for attribute, member in vars(value).items():
            if attribute.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
                continue
            assert inspect.getdoc(getattr(value, attribute)), f"sparse_ft.{room}.{name}.{attribute} has no docstring"


def test_top_level_names_resolve_and_are_written_once() -> None:
    for name in sparse_ft.__all__:
        assert getattr(sparse_ft, name) is not None
        assert name in dir(sparse_ft)
    lazy = set(sparse_ft._ROOM_OF)
    assert lazy == set(sparse_ft.__all__) - {"__version__"}
    block = next(node for node in parse(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    typed = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == lazy, "the names type checkers see are not the names that exist"
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = sparse_ft.prunes


def test_import_loads_no_framework() -> None:
    assert (
        loaded_after("import sparse_ft; dir(sparse_ft); sparse_ft.__version__", "torch transformers peft numpy")
        == set()
    )


def test_help_loads_no_framework() -> None:
    code = "from sparse_ft.cli.main import main\nassert main(['--help']) == 0"
    assert loaded_after(code, "torch transformers peft trl datasets numpy matplotlib") == set()


def test_low_rooms_load_neither_peft_nor_trl() -> None:
    code = "import sparse_ft.models, sparse_ft.masks, sparse_ft.checkpoints, sparse_ft.data, sparse_ft.pruning"
    assert loaded_after(code, "peft trl matplotlib") == set()


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sparse_ft", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sparse_ft.__version__ in done.stdout


def test_there_are_recipes() -> None:
    assert RECIPES, "recipes/ is empty"


# Recipes of merges are mergekit's YAML, which is not flat.
@pytest.mark.parametrize(
    "path",
    [path for path in RECIPES if path.parent.name != "merge"],
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_recipes_are_flat_and_say_how_they_are_run(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    assert isinstance(recipe, dict) and recipe
    assert all(isinstance(key, str) and not isinstance(value, dict) for key, value in recipe.items())
    assert text.startswith("#") and "sparse-ft " in text, "the command that runs a recipe stands at its top"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.slow
def test_wheel_ships_recipes_launch_files_and_types(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("sparse_ft-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    expected = {f"sparse_ft/recipes/{path.relative_to(REPOSITORY / 'recipes').as_posix()}" for path in RECIPES}
    expected |= {f"sparse_ft/{relative(path)}" for path in SOURCES}
    expected |= {"sparse_ft/launch/single.yaml", "sparse_ft/py.typed"}
    assert expected <= names
    strangers = {name for name in names if not name.startswith("sparse_ft")}
    assert not strangers, "the wheel installs things outside sparse_ft"
    code = "from sparse_ft.cli.parser import find_recipe; print(find_recipe('perp/llama_2of4').resolve())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert found.stdout.strip().startswith(str((tmp_path / "installed").resolve())), found.stdout + found.stderr
