"""`sparse-ft merge`: several checkpoints become one, as a mergekit YAML says, streamed from files to files.

    sparse-ft merge mergekit.yaml OUT
    sparse-ft merge mergekit.yaml --dry_run          # what would happen, and whether the models fit each other

A killed merge goes on where it was when the same command is given again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from sparse_ft.checkpoints import check_output_dir
from sparse_ft.cli.plain_options import option, parse_plain

__all__ = ["run"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass
class MergeArguments:
    """What is merged, and where to."""

    yaml: str = field(metadata={"help": "YAML file of the merge, as mergekit reads it"})
    output_dir: str | None = option(None, "directory to make; it appears when it is whole")
    dry_run: bool = option(False, "print the report of the models and of what would be written, and write nothing")
    overwrite: bool = option(False, "replace an output directory that is not empty")
    seed: int | None = option(None, "seed of everything random; by default the file's, or 0")
    compat: str | None = option(
        None, "mergekit: its formulas where they differ from the papers'; paper; by default the file's, or paper"
    )
    threads: int | None = option(None, "tensors worked on at once; does not change the result")
    truncate_embeddings: bool = option(
        False, "without tokenizer_source: cut embeddings of different length to the shortest"
    )
    max_shard_size: str = option("5GB", "size of an output file at most: 500MB, 5GB")


GROUPS = (MergeArguments,)


def _check_template(name: str) -> None:
    """Say where a shipped recipe is that was meant: it names no models of the user's, so it cannot be run as it is."""
    if Path(name).exists():
        return
    from sparse_ft.cli.parser import find_recipe

    try:
        found = find_recipe(name)
    except FileNotFoundError:
        return
    raise ValueError(f"'{name}' is a shipped template, '{found}'; copy that file and write your models into it.")


def run(argv: Sequence[str]) -> int:
    """Merge as one command line says; the exit code."""
    how = parse_plain(
        argv,
        MergeArguments,
        verb="merge",
        description="Merge checkpoints as a mergekit YAML says, in memory that does not grow with the models.",
        words=("yaml", "output_dir"),
        aliases={"plan": "dry_run"},
    )
    size = _bytes(how.max_shard_size)
    if how.compat not in (None, "paper", "mergekit"):
        raise ValueError(f"Unknown compat '{how.compat}'; give 'mergekit' or 'paper'.")
    if how.threads is not None and how.threads < 1:
        raise ValueError(f"--threads is {how.threads}; give at least 1.")
    _check_template(how.yaml)
    if not how.dry_run:
        check_output_dir(how.output_dir, overwrite=how.overwrite)
    from sparse_ft.merging.merge import merge_checkpoints, prepare_merge

    prepared = prepare_merge(
        how.yaml,
        seed=how.seed,
        compat=cast("Literal['paper', 'mergekit'] | None", how.compat),
        truncate_embeddings=how.truncate_embeddings,
        max_shard_size=size,
        threads=how.threads,
    )
    print("\n".join(prepared.report.lines()))
    if how.dry_run:
        return 0
    assert how.output_dir is not None
    command = ["sparse-ft", "merge", *argv]
    done = merge_checkpoints(prepared, how.output_dir, threads=how.threads, overwrite=how.overwrite, command=command)
    resumed = f", {done.resumed} of them from the interrupted run" if done.resumed else ""
    print(f"\n{how.output_dir}  {done.merged} tensors merged, {done.copied} copied, {done.files} files{resumed}")
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"--max_shard_size is '{text}'; give a size like 500MB or 5GB.")
    return size
