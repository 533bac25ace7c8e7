"""`sparse-ft <verb> …`: finds the verb, runs it, and turns what goes wrong into one sentence.

A verb is a module with `run(argv) -> int`. It is imported only when it is asked for, so `sparse-ft --help` costs no
import of torch. Exit codes: 0 done, 1 a verification failed, 2 an error the user can fix, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import PurePath
from typing import TextIO

from sparse_ft.naming import did_you_mean

__all__ = ["VERBS", "VerificationError", "main"]

VERBS = {
    "prune": ("sparse_ft.cli.prune", "make a sparse checkpoint from a dense one (magnitude, random, wanda, sparsegpt)"),
    "retrain": ("sparse_ft.cli.retrain", "train a sparse checkpoint, its zeros staying exactly zero"),
    "delta": ("sparse_ft.cli.delta", "what a fine-tune changed, pruned and stored small; search its scale, apply it"),
    "merge": ("sparse_ft.cli.merge", "merge several checkpoints into one, as a mergekit YAML says"),
    "eval": (
        "sparse_ft.cli.eval",
        "perplexity and zero-shot tasks of a checkpoint or adapter, and how they were measured",
    ),
    "report": ("sparse_ft.cli.report", "what a checkpoint holds: sparsity per tensor, history, evaluations, targets"),
    "demo": ("sparse_ft.cli.demo", "train, prune and recover a small model in a few minutes, offline"),
}


class VerificationError(RuntimeError):
    """What was written is not what was promised, for example a pruned weight that is not zero. Exit code 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: Words after the program's name; those of the process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    words, debug = _take_debug(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"sparse-ft {_version()}")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        return _unknown_verb(verb)
    try:
        return _run(verb, rest)
    except KeyboardInterrupt:
        print(f"\nsparse-ft {verb}: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_user_error(error):
            raise
        process = os.environ.get("RANK", "0")  # of several, as torchrun and accelerate start them
        speaker = f"sparse-ft {verb}" if process == "0" else f"sparse-ft {verb} (process {process})"
        print(f"{speaker}: error: {_sentence(error)}", file=sys.stderr)
        return 1 if isinstance(error, VerificationError) else 2


def _take_debug(words: list[str]) -> tuple[list[str], bool]:
    """The words without our `--debug`. With a value it is the option of that name of `TrainingArguments`, and stays."""
    ours = [i for i, word in enumerate(words) if word == "--debug" and words[i + 1 : i + 2] != ["underflow_overflow"]]
    rest = [word for i, word in enumerate(words) if i not in ours]
    return rest, bool(ours) or bool(os.environ.get("SPARSE_FT_DEBUG"))


def _run(verb: str, rest: list[str]) -> int:
    """The verb's own exit code; `--help` leaves argparse through SystemExit."""
    importlib.import_module("sparse_ft.cli.early").check_texts(rest)
    if "torch" not in sys.modules:
        # Threads that spin while they wait cost a factor of twenty when another program shares the cores; threads that
        # sleep cost next to nothing. OpenMP reads this once, when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft imports bitsandbytes where it is installed, which then warns of an optional kernel, whatever it is used for
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their programmers
            warnings.showwarning = _show_warning  # for this block only
            return int(importlib.import_module(VERBS[verb][0]).run(rest))
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """The warning on one line, without the place in the source that Python shows with it."""
    print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)


def _is_user_error(error: Exception) -> bool:
    """Whether one sentence is enough; anything else is a defect of ours and keeps its traceback."""
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError, MemoryError)):
        return True
    return type(error).__name__ == "SafetensorError"


def _sentence(error: Exception) -> str:
    """The error on one line."""
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        where = f": {error.filename}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def _unknown_verb(verb: str) -> int:
    name = PurePath(verb).name
    print(f"sparse-ft: error: Unknown verb {name!r}. {did_you_mean(name, VERBS)}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: sparse-ft <verb> [--config RECIPE] [--option value …]",
            "",
            "Sparse fine-tuning of Hugging Face models: prune, retrain with exact zeros, merge, evaluate, report.",
            "",
            *lines,
            "",
            "sparse-ft <verb> --help lists a verb's options; --debug shows the traceback of an error.",
        ]
    )


def _version() -> str:
    import sparse_ft

    return sparse_ft.__version__
