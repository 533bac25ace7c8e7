"""What retraining starts from: a sparse model and the masks that say which of its zeros are meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_ft.checkpoints import Record, read_sidecars
from sparse_ft.cli.measuring import load_checked
from sparse_ft.cli.refreshing import check_stored, is_sparse_checkpoint
from sparse_ft.masks import MaskSet

__all__ = ["SparseModel", "load_sparse_model", "masks_from_zeros", "starting_evaluations"]

# Patterns a model without masks is tried for; the first that holds is taken.
_PATTERNS = ("1:4", "2:4", "4:8")
# With more than this share of zeros beyond the pattern's own, the model is unstructured and only fits by its sparsity.
_CHANCE = 0.005


@dataclass(frozen=True)
class SparseModel:
    """A sparse model as stored.

    Attributes:
        model: in eval mode, in its stored dtype, on the CPU.
        masks: verified against it.
        record: its history; None when it was not made by sparse-ft.
        dtype: the stored dtype of its masked weights.
    """

    model: PreTrainedModel
    masks: MaskSet
    record: Record | None
    dtype: torch.dtype


def load_sparse_model(source: Path) -> SparseModel:
    """Load a sparse checkpoint with its masks, or take the masks from its zeros and say so.

    Raises:
        ValueError: if the model is dense, or masks, record and weights do not belong together.
        VerificationError: if a pruned weight is not zero.
    """
    model = load_checked(source)
    record: Record | None = None
    if is_sparse_checkpoint(source):
        masks, record = read_sidecars(source)
        check_stored(source, masks, record, model)
    else:
        masks = masks_from_zeros(model)
        by_chance = sum(surprise.kept_zero for surprise in masks.surprises(model).values())
        pattern = "+".join(sorted({str(pattern) for pattern in masks.patterns.values()}))
        print(
            f"No masks in {source}: taken from its zeros, pattern {pattern}, sparsity {masks.sparsity():.2%}; "
            f"{by_chance:,} kept weights are zero by chance."
        )
    return SparseModel(model, masks, record, model.get_parameter(next(iter(masks))).dtype)


def masks_from_zeros(model: PreTrainedModel) -> MaskSet:
    """The zeros of a model as masks, with the n:m pattern they have if they have one.

    Raises:
        ValueError: if the model is dense.
    """
    zeros = MaskSet.from_zeros(model)
    for pattern in _PATTERNS:
        try:
            masks = MaskSet.from_zeros(model, pattern=pattern)
        except ValueError:
            continue
        if zeros.sparsity() - masks.sparsity() <= _CHANCE:
            return masks
    return zeros


def starting_evaluations(
    record: Record | None, measure: Callable[[str, str], Sequence[Mapping[str, Any]]]
) -> list[Mapping[str, Any]]:
    """The perplexity to start from, and before it the dense model's if it was measured by the same protocol.

    Args:
        record: the checkpoint's history.
        measure: evaluates the checkpoint under a label and a kind; nothing comes back without a text.
    """
    is_pruned = record is None or record.command == "prune"
    entries = [*measure("pruned" if is_pruned else "before", "pruned")]
    if not entries or record is None:
        return entries
    earlier = [entry for step in record.history for entry in step.get("evaluation", [])] + record.evaluation
    alike = [e for e in earlier if e.get("label") == "dense" and e.get("protocol") == entries[0]["protocol"]]
    return alike[:1] + entries
