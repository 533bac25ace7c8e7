"""How prune and retrain end alike: read back what was written, verify it, describe it, show it.

Everything here works on the directory that is about to become the output, before it has its name: if a pruned weight is
not zero in the files, nothing is published and the exit code is 1.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.checkpoints import CheckpointReader, Record, make_record, versions, write_sidecars
from sparse_ft.cli.main import VerificationError
from sparse_ft.evaluation import (
    PERP_TASKS,
    REPORT_HTML,
    ComparisonRow,
    EvaluationProtocol,
    ReportData,
    SparsityRow,
    mask_sample,
    perp_means,
    recovered_share,
    sparsity_table,
    sparsity_totals,
    task_protocol,
    write_report,
)
from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name, load_model, named_weights

__all__ = [
    "TITLES",
    "Outcome",
    "check_finite",
    "command_line",
    "notes_for",
    "plain_arguments",
    "print_comparison",
    "print_evaluations",
    "print_outcome",
    "print_sparsity",
    "print_tasks",
    "publish",
    "written_weights",
]

_SECRET = ("__hub_token",)
TITLES = {"prune": "Pruned", "retrain": "Retrained", "demo": "Retrained"}


@dataclass
class Outcome:
    """What a verb did, for the record, the report and the terminal.

    Attributes:
        verb: `"prune"`, `"retrain"` or `"demo"`.
        argv: words after the verb, as typed.
        model: name or path the verb started from.
        method: `--method`.
        arguments: every option and its value.
        evaluations: `PerplexityResult.to_dict` entries, first before, last after.
        histories: `Trainer.state.log_history` by name.
        trainable: how many weights were trained: `trainable` of `total`, and `groups`, by name the number of `tensors`
            and of `weights` in each.
        reconstruction: one entry per window: `block`, `window`, `loss_before`, `loss_after`, `iterations`.
        previous: record of the checkpoint it started from.
    """

    verb: str
    argv: Sequence[str]
    model: str
    method: str
    arguments: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]] = ()
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    trainable: Mapping[str, Any] = field(default_factory=dict)
    reconstruction: Sequence[Mapping[str, Any]] = ()
    previous: Record | None = None

    @property
    def training(self) -> dict[str, Any]:
        """What training left, as `Record.training` keeps it; what there is nothing of is left out."""
        logs = {name: thinned(entries) for name, entries in self.histories.items() if entries}
        kept = {"logs": logs, "trainable": dict(self.trainable), "reconstruction": list(self.reconstruction)}
        return {name: value for name, value in kept.items() if value}


def thinned(entries: Sequence[Mapping[str, Any]], most: int = 1000) -> list[Mapping[str, Any]]:
    """Log entries as a checkpoint keeps them: all evaluations, and of the losses evenly spaced ones, last included."""
    losses = [i for i, entry in enumerate(entries) if "loss" in entry]
    every = max(1, math.ceil(len(losses) / most))
    dropped = {i for place, i in enumerate(reversed(losses)) if place % every}
    return [entry for i, entry in enumerate(entries) if i not in dropped]


def check_finite(model: nn.Module) -> None:
    """Refuse a trained model that is not made of numbers; a mask alone would not tell.

    Args:
        model: the model, or the adapter on it; its floating point parameters and stored buffers are looked at.

    Raises:
        RuntimeError: with the number of tensors that hold NaN or infinity, and the first.
    """
    stored = model.state_dict().keys()
    tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if pair[0] in stored)]
    floating = {name: tensor for name, tensor in tensors if tensor.is_floating_point()}
    broken = [name for name, tensor in floating.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise RuntimeError(
            f"Training diverged: {len(broken)} of {len(floating)} tensors are not finite, the first "
            f"'{canonical_name(broken[0])}'; lower --learning_rate."
        )


def publish(directory: Path, masks: MaskSet, outcome: Outcome) -> Record:
    """Verify the weights in `directory` and put sidecars and report beside them.

    Raises:
        VerificationError: A pruned weight is not zero in the files.
    """
    weights = written_weights(directory, masks)
    try:
        masks.verify(weights)
    except RuntimeError as error:
        raise VerificationError(f"The written checkpoint is not sparse, so it was not kept: {error}") from error
    record = make_record(
        masks,
        weights,
        command=outcome.verb,
        arguments=outcome.arguments,
        evaluation=outcome.evaluations,
        previous=outcome.previous,
        training=outcome.training,
    )
    write_sidecars(directory, masks, record)
    write_report(directory, report_data(directory, masks, weights, outcome, record))
    return record


def report_data(
    directory: Path, masks: MaskSet, weights: Mapping[str, Tensor], outcome: Outcome, record: Record
) -> ReportData:
    """What the report of a written checkpoint shows."""
    return ReportData(
        title=TITLES[outcome.verb],
        model=outcome.model,
        command=command_line(outcome.verb, outcome.argv),
        rows=sparsity_table(masks, weights),
        method=outcome.method,
        evaluations=list(outcome.evaluations),
        histories=outcome.histories,
        trainable=outcome.trainable,
        reconstruction=outcome.reconstruction,
        mask_sample=mask_sample(masks),
        arguments=outcome.arguments,
        versions=versions(),
        steps=record.history,
        digests={"masks": record.masks_digest, "weights": record.weights_digest},
    )


def written_weights(directory: Path, masks: MaskSet) -> Mapping[str, Tensor]:
    """The weights in the files, by parameter name; one at a time where the files use the model's names.

    Some checkpoints store tensors under other names than the model (experts one by one, no prefix); only transformers
    knows how they map, so those are loaded.
    """
    reader = CheckpointReader(directory)
    if all(name in reader for name in masks):
        return reader
    return {name: weight for name, weight in named_weights(load_model(directory)).items() if name in masks}


def command_line(verb: str, argv: Sequence[str]) -> str:
    """The command as it can be pasted into a shell, access tokens left out."""
    words: list[str] = []
    for word in argv:
        hidden = words and words[-1].replace("-", "_") in _SECRET
        name, equals, _ = word.partition("=")
        secret = equals and name.replace("-", "_") in _SECRET
        words.append("TOKEN" if hidden else f"{name}=TOKEN" if secret else word)
    return shlex.join(["sparse-ft", verb, *words])


def plain_arguments(*groups: Any) -> dict[str, Any]:
    """Options and their values of our own argument groups, in order."""
    merged: dict[str, Any] = {}
    for group in groups:
        merged.update(asdict(group))
    return merged


def notes_for(masks: MaskSet, directory: Path) -> list[str]:
    """What these zeros do and do not give, so that nobody expects a speed-up that no runtime delivers."""
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e6
    notes = [f"Zeros are stored like other values: the files hold {size:,.1f} MB, as before."]
    patterns = {pattern for pattern in masks.patterns.values() if pattern.is_structured}
    if not patterns:
        notes.append("No GPU kernel is faster for unstructured zeros; they help compression and sparse CPU formats.")
    elif {str(pattern) for pattern in patterns} == {"2:4"}:
        notes.append(
            "2:4 runs faster only on NVIDIA GPUs from Ampere on, in fp16, bf16 or int8, with both dimensions multiples "
            "of the kernel's tile, after conversion to a compressed format."
        )
    else:
        names = ", ".join(sorted(map(str, patterns)))
        notes.append(f"GPUs have kernels for 2:4 only; {names} helps compression and sparse CPU formats.")
    return notes


def print_outcome(directory: Path, masks: MaskSet, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """A short table on standard output: sparsity of each kind of weight, perplexities, where the report is, notes."""
    print_sparsity(sparsity_table(masks))
    print_evaluations(evaluations)
    print(f"\n{directory}  verified: every pruned weight is zero in the files")
    print(directory / REPORT_HTML)
    for note in notes_for(masks, directory):
        print(f"note: {note}")


def print_sparsity(rows: Sequence[SparsityRow]) -> None:
    """Zeros of each kind of weight and of all."""
    totals = {**sparsity_totals(rows, "role"), **sparsity_totals(rows)}
    width = max(6, *map(len, totals))
    print(f"\n{'weight':<{width}}{'tensors':>9}{'zeros':>15}{'of':>15}{'sparsity':>10}")
    for role, total in totals.items():
        count = len(rows) if role == "all" else sum(row.role == role for row in rows)
        print(f"{role:<{width}}{count:>9}{total.zeros:>15,}{total.total:>15,}{total.sparsity:>10.2%}")


def print_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Perplexities, each group under the protocol it was measured by, then zero-shot tasks."""
    previous = None
    for entry in evaluations:
        if "perplexity" not in entry:
            continue
        if entry["protocol"] != previous:
            print(f"\nperplexity on {EvaluationProtocol(entry['protocol'])}")
        previous = entry["protocol"]
        print(f"  {entry['label']:<10} {float(entry['perplexity']):.4f}")
    print_tasks([entry for entry in evaluations if "task" in entry])


def print_tasks(entries: Sequence[Mapping[str, Any]]) -> None:
    """Results of `zero_shot` under how they were measured, and the mean of `acc` over the whole set of PERP.

    Args:
        entries: from `TaskResult.to_dict`.
    """
    width = max((len(f"{entry['task']} {entry['metric']}") for entry in entries), default=0)
    previous = ""
    for entry in entries:
        heading = " ".join(part for part in (entry.get("label"), task_protocol(entry["protocol"])) if part)
        if heading != previous:
            print(f"\n{heading}")
        previous = heading
        name = f"{entry['task']} {entry['metric']}"
        stderr = "" if entry.get("stderr") is None else f" ± {float(entry['stderr']):.4f}"
        print(f"  {name:<{width}}  {float(entry['value']):.4f}{stderr:<9}  {entry['protocol']['samples']:,} questions")
    for label, mean in perp_means(entries).items():
        print(f"{label} mean of acc over the {len(PERP_TASKS)} tasks of PERP {mean:.4f}".strip())


def print_comparison(rows: Sequence[ComparisonRow]) -> None:
    """Models side by side, group by group; the gap won back is that of the log-perplexity to the dense model."""
    dense = next((row.perplexity for row in rows if row.kind == "dense"), None)
    by_name = {(row.group, row.label): row for row in rows}
    width = max(len(row.label) for row in rows) + 2
    print(f"\n{'model':<{width}}{'zeros':>9}{'perplexity':>12}{'won back':>10}{'revived':>12}{'seconds':>9}")
    group = ""
    for row in rows:
        if row.group != group:
            print(row.group)
            group = row.group
        start = by_name.get((row.group, row.start))
        share = recovered_share(dense or 0.0, start.perplexity or 0.0, row.perplexity or 0.0) if start else None
        won, revived = "" if share is None else f"{share:.1%}", "" if row.revived is None else f"{row.revived:,}"
        label = f"  {row.label}" if row.group else row.label
        cells = f"{row.sparsity:>9.2%}{row.perplexity or float('nan'):>12.2f}{won:>10}{revived:>12}"
        print(f"{label:<{width}}{cells}{row.seconds or 0.0:>9.1f}")
