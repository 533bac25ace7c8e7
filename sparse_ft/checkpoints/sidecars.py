"""The two files beside the weights of a sparse checkpoint or adapter: its masks and its record.

They carry digests of each other and of the weights, so masks of another model, of another revision, or edited by hand
are refused instead of zeroing the wrong weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sparse_ft.checkpoints.directories import atomic_write
from sparse_ft.checkpoints.record import Record
from sparse_ft.checkpoints.resolve import member
from sparse_ft.masks import MASKS_FILE, MaskSet

RECORD_FILE = "sparse_ft.json"


def write_sidecars(directory: str | Path, masks: MaskSet, record: Record) -> None:
    """Write `sparse_masks.safetensors` and `sparse_ft.json` into an existing directory.

    Raises:
        ValueError: if the record was made for other masks.
    """
    _check_masks(masks, record, "the record to write")
    masks.save(directory)
    atomic_write(Path(directory) / RECORD_FILE, record.to_json())


def read_sidecars(directory: str | Path) -> tuple[MaskSet, Record]:
    """Read masks and record and check that they belong together; `check_weights` checks the weights.

    Raises:
        FileNotFoundError: if either file is missing.
        ValueError: if one is damaged, or the masks are not the ones the record was written with.
    """
    directory = Path(directory)
    for name in (MASKS_FILE, RECORD_FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(
                f"No {name} in '{directory}'; it is written beside the weights by every sparse-ft command, "
                f"so copy the whole directory, or take masks from a sparse model with MaskSet.from_zeros."
            )
    file = member(directory, RECORD_FILE)
    record = Record.from_json(file.read_bytes(), source=f"'{file}'")
    masks = MaskSet.load(member(directory, MASKS_FILE))
    _check_masks(masks, record, f"'{file}'")
    return masks, record


def check_weights(masks: MaskSet, record: Record, weights: nn.Module | Mapping[str, Tensor]) -> None:
    """Refuse weights other than those the masks were made for.

    Args:
        masks: masks of `record`.
        record: what `read_sidecars` returned.
        weights: the model, or its tensors by name (a `CheckpointReader` is read one tensor at a time).

    Raises:
        ValueError: if a masked tensor is absent, has another shape, or the values have another digest.
    """
    digest = masks.weights_digest(weights)
    if digest != record.weights_digest:
        raise ValueError(
            f"The masks belong to weights with digest {record.weights_digest[:12]} but these weights have "
            f"{digest[:12]}: they are another model's or another revision's; use the masks saved beside these weights, "
            f"or take new ones with MaskSet.from_zeros."
        )


def _check_masks(masks: MaskSet, record: Record, source: str) -> None:
    digest = masks.digest()
    if digest != record.masks_digest:
        raise ValueError(
            f"The masks have digest {digest[:12]} but {source} was made for masks with {record.masks_digest[:12]}: one "
            f"of the two files was changed or is another checkpoint's; copy both again from where they were written."
        )
