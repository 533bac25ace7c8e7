"""`sparse-ft report`: what a checkpoint holds.

sparse-ft report S              counts the zeros of a sparse checkpoint again, prints them and renews report.html
sparse-ft report M --targets    lists the prunable tensors of any model; reads its configuration, no weights
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_ft.checkpoints import Record, read_sidecars, resolve_checkpoint
from sparse_ft.cli.arguments import ModelArguments, ReportArguments, first_word_is_model, parse
from sparse_ft.cli.measuring import load_checked
from sparse_ft.cli.publishing import print_evaluations, print_sparsity
from sparse_ft.cli.refreshing import is_sparse_checkpoint, refresh_report
from sparse_ft.masks import MaskSet
from sparse_ft.models import Target, find_targets, load_skeleton

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Report on one checkpoint; the exit code."""
    words = first_word_is_model(argv)
    model, how = parse(words, (ModelArguments, ReportArguments), verb="report", description="Show what a model holds.")
    directory = resolve_checkpoint(model.model_name_or_path, needs_weights=not how.targets)
    if how.targets:
        _print_targets(find_targets(load_skeleton(directory), exclude=how.exclude or []))
    elif is_sparse_checkpoint(directory):
        _report_ours(directory)
    else:
        _report_foreign(directory)
    return 0


def _print_targets(targets: Sequence[Target]) -> None:
    """One line per prunable tensor, and their sum."""
    width = max(len(target.name) for target in targets)
    blocks = dict.fromkeys(target.block for target in targets)
    print(f"{'tensor':<{width}}  {'shape':>16}  {'orientation':<22}  block")
    for target in targets:
        shape = " x ".join(map(str, target.shape))
        print(f"{target.name:<{width}}  {shape:>16}  {_orientation(target):<22}  {target.block}")
    total = sum(target.numel for target in targets)
    print(f"{len(targets)} prunable tensors in {len(blocks)} blocks, {total:,} weights")


def _orientation(target: Target) -> str:
    axes = ["experts", "out", "out"] if len(target.shape) == 3 else ["out", "out"]
    axes[target.input_dim] = "in"
    return f"({', '.join(axes)}) {target.kind}"


def _report_ours(directory: Path) -> None:
    """Check, count, print and renew the report.

    Raises:
        VerificationError: if a pruned weight is not zero.
    """
    masks, record = read_sidecars(directory)
    page, rows = refresh_report(directory, masks, record)
    _print_steps(record)
    print_sparsity(rows)
    print_evaluations(record.evaluation)
    print(f"\nmasks {record.masks_digest[:16]}  weights {record.weights_digest[:16]}\n{page}")


def _print_steps(record: Record) -> None:
    for step in [*record.history, record.step()]:
        arguments = step["arguments"]
        settings = " ".join(f"{arguments.get('method', '')} {step['pattern']}".split())
        print(f"{step['command']:<10} {settings:<28} sparsity {step['sparsity']:.2%}")


def _report_foreign(directory: Path) -> None:
    """A model without our sidecars: what its zeros say. Nothing is written into it."""
    model = load_checked(directory)
    try:
        masks = MaskSet.from_zeros(model)
    except ValueError as error:
        print(f"{directory}: {error}")
        return
    from sparse_ft.evaluation import sparsity_table

    print_sparsity(sparsity_table(masks, model))
    print(f"\n{directory} has no sparse_ft.json, so these are the zeros that are there, pruned or not.")
