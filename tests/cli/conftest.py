"""Read-only inputs made once, and a way to run commands in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.workspace import Result, save_model, sentences

from sparse_ft.cli.main import main


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.txt and test.txt."""
    directory = tmp_path_factory.mktemp("text")
    (directory / "train.txt").write_text(sentences(400, 1))
    (directory / "test.txt").write_text(sentences(60, 2))
    return directory


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense tiny Llama. Read only: tests that change it copy it."""
    return save_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory, dense: Path, text: Path) -> Path:
    """The same model at 2:4, made by the command. Read only."""
    target = tmp_path_factory.mktemp("pruned") / "model"
    words = ["prune", "--model_name_or_path", str(dense), "--pattern", "2:4", "--output_dir", str(target)]
    assert main([*words, "--dataset", str(text), "--sequence_length", "32"]) == 0
    return target


@pytest.fixture
def place(tmp_path: Path, dense: Path, pruned: Path, text: Path) -> Path:
    """A directory with its own `dense`, `sparse` and `text` to spoil."""
    shutil.copytree(dense, tmp_path / "dense")
    shutil.copytree(pruned, tmp_path / "sparse")
    shutil.copytree(text, tmp_path / "text")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command line in this process."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run
