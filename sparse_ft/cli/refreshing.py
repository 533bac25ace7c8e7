"""Bring the record and the report of a sparse checkpoint up to date, without touching its weights."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_ft.checkpoints import RECORD_FILE, Record, atomic_write, check_weights, read_sidecars
from sparse_ft.cli.main import VerificationError
from sparse_ft.cli.publishing import TITLES, written_weights
from sparse_ft.evaluation import REPORT_JSON, ReportData, SparsityRow, mask_sample, sparsity_table, write_report
from sparse_ft.masks import MASKS_FILE, MaskSet

__all__ = ["add_evaluations", "check_stored", "is_sparse_checkpoint", "refresh_report"]


def is_sparse_checkpoint(directory: Path) -> bool:
    """Whether a model directory carries a record or masks of ours."""
    return (directory / RECORD_FILE).exists() or (directory / MASKS_FILE).exists()


def check_stored(directory: Path, masks: MaskSet, record: Record, weights: nn.Module | Mapping[str, Tensor]) -> None:
    """Check the weights of a sparse checkpoint: first its zeros, then that they are the ones the record names.

    Raises:
        VerificationError: if a pruned weight is not zero.
        ValueError: if every pruned weight is zero but the values have another digest, or a masked tensor is absent or
            has another shape.
    """
    revived = masks.revived(weights)
    if revived:
        first = next(iter(revived))
        raise VerificationError(
            f"{sum(revived.values())} pruned weights of '{directory}' are not zero, {revived[first]} of them in "
            f"'{first}': weights were changed after pruning, or the masks are another revision's; copy both again from "
            f"where they were written, or prune again."
        )
    check_weights(masks, record, weights)


def add_evaluations(directory: Path, entries: Sequence[Mapping[str, Any]]) -> Path:
    """Add results to `sparse_ft.json`, make `report.html` anew, and return the path of the page.

    The entries are labelled by what the checkpoint is, `"pruned"` or `"retrained"`. An earlier result of the same label
    and protocol is replaced.

    Raises:
        VerificationError: if a pruned weight is not zero.
        ValueError: if the weights, masks and record of the directory do not belong together.
    """
    masks, record = read_sidecars(directory)
    label = TITLES.get(record.command, record.command).lower()
    new = [{"label": label, **entry} for entry in entries]
    replaced = [(label, entry.get("protocol")) for entry in new]
    kept = [old for old in record.evaluation if (old.get("label"), old.get("protocol")) not in replaced]
    record.evaluation = [*kept, *new]
    page, _ = refresh_report(directory, masks, record)
    atomic_write(directory / RECORD_FILE, record.to_json())
    return page


def refresh_report(directory: Path, masks: MaskSet, record: Record) -> tuple[Path, list[SparsityRow]]:
    """Count the weights again and write `report.html` and `report.json` from them and the record.

    Returns:
        Path of the page, and the counts.

    Raises:
        VerificationError: if a pruned weight is not zero.
        ValueError: if the weights are not the ones the record was written with.
    """
    weights = written_weights(directory, masks)
    check_stored(directory, masks, record, weights)
    old = _old_numbers(directory)
    rows = sparsity_table(masks, weights)
    data = ReportData(
        title=TITLES.get(record.command, record.command.capitalize()),
        model=str(record.arguments.get("model_name_or_path", directory)),
        command=str(old.get("command") or _command_of(record)),
        rows=rows,
        method=str(record.arguments.get("method", "")),
        evaluations=record.evaluation,
        histories=old.get("history") or record.training.get("logs") or {},
        trainable=record.training.get("trainable") or {},
        reconstruction=record.training.get("reconstruction") or [],
        mask_sample=mask_sample(masks),
        arguments=record.arguments,
        versions=record.versions,
        steps=record.history,
        digests={"masks": record.masks_digest, "weights": record.weights_digest},
    )
    return write_report(directory, data), rows


def _old_numbers(directory: Path) -> dict[str, Any]:
    """What the last report said, for what the record does not hold: the command as typed and the loss curve."""
    try:
        numbers = json.loads((directory / REPORT_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return numbers if isinstance(numbers, dict) else {}


def _command_of(record: Record) -> str:
    """The command again, from the arguments that have a value."""
    words = ["sparse-ft", record.command]
    for name, value in record.arguments.items():
        if value is not None and value != []:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
