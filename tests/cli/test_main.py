"""The front door: verbs, help, exit codes, and what becomes of an error."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.workspace import Result

from sparse_ft.cli import main as main_module
from sparse_ft.cli.main import VERBS, VerificationError, main


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(words: list[str], command: Callable[..., Result]) -> None:
    result = command(*words)
    assert result.code == 0
    assert all(verb in result.out for verb in VERBS)


def test_no_words_is_an_error_with_help(command: Callable[..., Result]) -> None:
    result = command()
    assert result.code == 2 and "usage" in result.out


def test_version(command: Callable[..., Result]) -> None:
    import sparse_ft

    assert command("--version").out.split() == ["sparse-ft", sparse_ft.__version__]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_lists_its_options(verb: str, command: Callable[..., Result]) -> None:
    result = command(verb, "--help")
    assert result.code == 0
    assert f"usage: sparse-ft {verb}" in result.out
    of_files = {"delta": ("--base", "--config"), "merge": ("--dry_run", "--seed")}
    assert all(option in result.out for option in of_files.get(verb, ("--model_name_or_path", "--config")))


@pytest.mark.parametrize(("verb", "nearest"), [("prun", "prune"), ("retran", "retrain"), ("reprot", "report")])
def test_unknown_verb_names_the_nearest(verb: str, nearest: str, command: Callable[..., Result]) -> None:
    result = command(verb, "--sparsity", "0.5")
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert repr(verb) in result.err and repr(nearest) in result.err


def test_unknown_verb_far_from_any_lists_them(command: Callable[..., Result]) -> None:
    assert all(verb in command("xyz").err for verb in VERBS)


def test_help_is_quick_and_imports_no_framework() -> None:
    code = (
        "import sys; from sparse_ft.cli.main import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'numpy', 'yaml', 'datasets'} & set(sys.modules); "
        "sys.exit(code or bool(heavy))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0


def test_an_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    words = ["prune", "--model_name_or_path", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")]
    command = [sys.executable, "-m", "sparse_ft", *words, "--sparsity", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("sparse-ft prune: error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "none") in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


RAISED = [
    (ValueError("bad\n  value"), 2, "bad value"),
    (RuntimeError("no"), 2, "no"),
    (FileNotFoundError("no file 'x'; give another"), 2, "no file 'x'; give another"),
    (OSError(28, "No space left on device", "/tmp/x"), 2, "No space left on device: /tmp/x"),
    (MemoryError(), 2, "MemoryError"),
    (ModuleNotFoundError("No module named 'matplotlib'"), 2, "No module named 'matplotlib'"),
    (VerificationError("3 weights revived"), 1, "3 weights revived"),
]


def _verb_that_raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give `report` a module whose `run` raises."""

    def run(argv: list[str]) -> int:
        raise error

    module = type(sys)("raising")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "raising", module)
    monkeypatch.setitem(main_module.VERBS, "report", ("raising", ""))


@pytest.mark.parametrize(("error", "code", "sentence"), RAISED, ids=lambda value: type(value).__name__)
def test_errors_become_one_sentence(
    error: Exception, code: int, sentence: str, command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    _verb_that_raises(error, monkeypatch)
    result = command("report")
    assert result.code == code
    assert result.err == f"sparse-ft report: error: {sentence}\n"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(ValueError("bad"), monkeypatch)
    if how == "environment":
        monkeypatch.setenv("SPARSE_FT_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        main(["report", "--debug"] if how == "option" else ["report"])


def test_warnings_are_one_line_without_the_source(
    command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(argv: list[str]) -> int:
        warnings.warn("the text\n  is short", stacklevel=1)
        warnings.warn("of libraries", FutureWarning, stacklevel=1)
        return 0

    module = type(sys)("warning")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "warning", module)
    monkeypatch.setitem(main_module.VERBS, "report", ("warning", ""))
    before = warnings.showwarning, warnings.formatwarning
    assert command("report").err == "warning: the text is short\n"
    assert (warnings.showwarning, warnings.formatwarning) == before, "the program that calls main() has its own again"


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(AttributeError("a typo of ours"), monkeypatch)
    with pytest.raises(AttributeError):
        main(["report"])


def test_interrupt_is_quiet(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    _verb_that_raises(KeyboardInterrupt(), monkeypatch)
    result = command("report")
    assert result.code == 130
    assert "Traceback" not in result.err and "interrupted" in result.err
