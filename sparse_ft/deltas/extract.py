"""Make a delta directory from a base and a fine-tune of it, or a LoRA adapter, one tensor at a time.

    delta = finetuned - base (fp32)        stored: its kept entries, unscaled, cast once to the fine-tune's dtype

The cast costs little. The difference of two bf16 numbers that are within a factor of two of each other is a bf16 number
again, so it is exact for all but the weights whose sign or order of magnitude the fine-tune changed; those are off by
at most 1/256 of the delta. `dtype=torch.float32` stores the difference itself. At density 1 without a scale nothing is
differenced: the fine-tune's weights are stored as they are and come back bit for bit.
"""

from __future__ import annotations

import filecmp
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from sparse_ft.checkpoints import (
    CheckpointReader,
    atomic_directory,
    check_output_dir,
    copy_side_files,
    resolve_checkpoint,
)
from sparse_ft.checkpoints.header import DTYPE_NAMES
from sparse_ft.deltas.checks import check_delta, check_scale
from sparse_ft.deltas.darex_moments import InputMoments
from sparse_ft.deltas.delta_header import Header, Part, drawn_positions
from sparse_ft.deltas.finetuned import open_finetuned
from sparse_ft.deltas.fingerprint import base_digest, too_large
from sparse_ft.deltas.magnitude import magnitude_keep
from sparse_ft.deltas.random_mask import check_density
from sparse_ft.deltas.scope import Entry, Scope, Selection, align, find_tied, headers_of
from sparse_ft.deltas.store import DeltaFile, DeltaWriter, write_record
from sparse_ft.deltas.wanda import wanda_keep
from sparse_ft.models import matrix_view
from sparse_ft.naming import check_choice

#: Methods, and whether kept entries are divided by a scale.
METHODS = {"dare": True, "darex_q": True, "structural": True, "magnitude": False, "wanda": False}
#: Dtypes that values can be stored in.
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Settings:
    """How a delta is pruned and stored.

    Attributes:
        method: a key of `METHODS`.
        density: share of the entries kept.
        seed: of random masks.
        role: tells masks of one seed apart.
        scale: q, what kept entries are divided by; None is the density, or 1 for methods without a rescale.
        selection: which tensors are pruned.
        dtype: of the stored values; None is the fine-tune's.
        moments: for `"wanda"`, of the layers' inputs by weight name; tensors without go by magnitude.
        slices: for `"structural"`, the mask's key and the axis of each tensor that is not dropped by its own rows.
    """

    method: str = "dare"
    density: float = 0.01
    seed: int = 0
    role: str = ""
    scale: float | None = None
    selection: Selection = field(default_factory=Selection)
    dtype: torch.dtype | None = None
    moments: Mapping[str, InputMoments] | None = None
    slices: Mapping[str, tuple[str, int]] | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_density(self.density)
        if self.dtype is not None and self.dtype not in VALUE_DTYPES:
            raise ValueError(f"Values can be stored as float32, bfloat16 or float16, not {self.dtype}.")
        if self.scale is not None:
            check_scale(self.scale)
            if not METHODS[self.method] and self.scale != 1.0:
                raise ValueError(
                    f"scale is {self.scale:g}, but the entries {self.method} keeps are the largest already: divided, "
                    f"they overshoot the fine-tune; leave the scale out, or use dare."
                )
        if self.method == "wanda" and self.moments is None:
            raise ValueError("wanda ranks by the inputs of each layer; give their moments, or use magnitude.")

    @property
    def divisor(self) -> float:
        """q of the delta; 1 where nothing is kept."""
        if self.scale is not None:
            return float(self.scale)
        return float(self.density) if METHODS[self.method] and self.density > 0 else 1.0

    @property
    def is_identity(self) -> bool:
        """Whether the result is the fine-tune itself."""
        return self.density == 1.0 and self.divisor == 1.0


@dataclass
class Summary:
    """What was found while a delta was made.

    Attributes:
        base: as it was given.
        finetuned: as it was given.
        mean_absolute_delta: over all entries of pruned tensors, before pruning.
        total: entries of pruned tensors.
        zeros: of them, how many the fine-tune did not change, or not by as much as its dtype can tell.
        kept: entries stored as deltas.
        whole: entries stored as they are.
    """

    base: str = ""
    finetuned: str = ""
    mean_absolute_delta: float = 0.0
    total: int = 0
    zeros: int = 0
    kept: int = 0
    whole: int = 0


def extract_delta(
    base: str | Path,
    finetuned: str | Path,
    output_dir: str | Path,
    settings: Settings | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> DeltaFile:
    """Prune a fine-tune's delta and save it as a directory, which appears when it is whole.

    Args:
        base: directory or Hub name of the base.
        finetuned: of the fine-tune, or the directory of a LoRA adapter of the base.
        output_dir: directory to make.
        settings: how; by default DARE at density 0.01.
        overwrite: replace a directory that is not empty.
        progress: show a progress bar.

    Returns:
        The delta.

    Raises:
        ValueError: if the two do not fit, a tensor holds NaN, or the output is one of the inputs.
        FileNotFoundError: if one of the inputs is not there.
        RuntimeError: if the disk is full; nothing is written then.

    Example:
        >>> delta = extract_delta("base", "finetuned", "delta", Settings(density=0.01))
    """
    output = check_output_dir(output_dir, inputs=[base, finetuned], overwrite=overwrite)
    settings = settings or Settings()
    with atomic_directory(output, overwrite=overwrite) as directory:
        write_delta(base, finetuned, directory, settings, progress=progress)
    return DeltaFile(output)


def write_delta(
    base: str | Path, finetuned: str | Path, directory: str | Path, settings: Settings, *, progress: bool = True
) -> Summary:
    """`extract_delta` into an existing directory."""
    source = resolve_checkpoint(base)
    _refuse_quantised(source)
    reader = CheckpointReader(source)
    tuned = open_finetuned(finetuned, reader)
    _refuse_quantised(tuned.directory)
    scope = align(
        headers_of(reader),
        tuned.headers(),
        selection=settings.selection,
        base_tied=find_tied(reader),
        finetuned_tied=tuned.tied(),
    )
    for sentence in scope.warnings:
        warnings.warn(sentence, stacklevel=3)
    job = _Extraction(reader, tuned, scope, settings)
    summary = job.run(Path(directory), progress)
    summary.base, summary.finetuned = str(base), str(finetuned)
    doubt = too_large(summary.mean_absolute_delta)
    if doubt:
        warnings.warn(doubt, stacklevel=3)
    _copy_what_differs(tuned.directory, source, Path(directory))
    write_record(directory, asdict(summary))
    return summary


class _Extraction:
    """One run: what is known before the work begins, and a method for each kind of tensor."""

    def __init__(self, base: CheckpointReader, tuned: Any, scope: Scope, settings: Settings) -> None:
        self._base, self._tuned, self._scope, self._settings = base, tuned, scope, settings
        self._summary = Summary()
        self._absolute = 0.0
        self._header = Header(
            method=settings.method,
            density=float(settings.density),
            scale=settings.divisor,
            seed=int(settings.seed),
            role=settings.role,
            base_digest="",
            selection=_selection(settings.selection),
            aliases=scope.aliases,
        )

    def run(self, directory: Path, progress: bool) -> Summary:
        with DeltaWriter(directory, self._header) as writer:
            for name, entry in tqdm(self._scope.entries.items(), desc="delta", unit="tensor", disable=not progress):
                if entry.kind == "base" or not self._tuned.changes(name):
                    writer.add(name, _part(entry, "base"))
                elif entry.kind == "finetuned":
                    self._keep_whole(writer, entry, self._tuned.whole(name))
                else:
                    self._prune(writer, entry)
            writer.header = replace(self._header, base_digest=base_digest(writer.parts, self._base))
        summary = self._summary
        summary.mean_absolute_delta = self._absolute / max(summary.total, 1)
        return summary

    def _keep_whole(self, writer: DeltaWriter, entry: Entry, tensor: Tensor) -> None:
        """Store the fine-tune's tensor, or nothing if it is the base's."""
        if tensor.is_floating_point():
            check_delta(tensor, entry.name)
        if entry.name in self._base and _same_bits(tensor, self._base.get(entry.name)):
            writer.add(entry.name, _part(entry, "base"))
            return
        self._summary.whole += tensor.numel()
        writer.add(entry.name, _part(entry, "finetuned"), whole=tensor)

    def _prune(self, writer: DeltaWriter, entry: Entry) -> None:
        name = entry.name
        base = self._base.get(name)
        rows: Tensor | None = None
        if entry.kind == "resized":
            base, rows = base[: entry.rows], self._tuned.whole(name)[entry.rows :]
        delta = self._tuned.delta(name, base)
        check_delta(delta, name)
        self._count(delta)
        if self._settings.is_identity:
            self._keep_whole(writer, replace(entry, kind="finetuned"), self._tuned.whole(name))
            return
        if rows is None and (self._settings.density == 0 or not bool(delta.any())):
            writer.add(name, _part(entry, "base"))
            return
        part = self._masked(entry)
        positions = self._positions(name, part, delta)
        values = delta.reshape(-1)[torch.from_numpy(positions)].to(self._settings.dtype or entry.dtype)
        check_delta(values, name)  # a cast to float16 can overflow
        self._summary.kept += len(positions)
        writer.add_delta(name, part, positions, values)
        if rows is not None:
            check_delta(rows, name)
            self._summary.whole += rows.numel()
            writer.add_rows(name, rows)

    def _masked(self, entry: Entry) -> Part:
        """The entry as a part whose mask is drawn again, or else is to be stored."""
        part = _part(entry, entry.kind)
        if self._settings.density == 1:
            return replace(part, mask="all")
        if self._settings.method in ("dare", "darex_q"):
            return replace(part, mask="random")
        if self._settings.method == "structural" and entry.shape:
            key, axis = (self._settings.slices or {}).get(entry.name, ("", 0))
            return replace(part, mask="slices", axis=axis, key=key)
        return replace(part, mask="random" if self._settings.method == "structural" else "bits")

    def _positions(self, name: str, part: Part, delta: Tensor) -> NDArray[np.int64]:
        if part.mask != "bits":
            return drawn_positions(self._header, name, part)
        density, moments = self._settings.density, (self._settings.moments or {}).get(name)
        if self._settings.method == "magnitude" or moments is None:
            keep = magnitude_keep(delta, density=density)
        else:
            view = matrix_view(delta, moments.input_dim)
            keep = wanda_keep(view, moments.norms(), density=density)
            keep = matrix_view(keep, moments.input_dim)
        return keep.reshape(-1).numpy().nonzero()[0]

    def _count(self, delta: Tensor) -> None:
        self._absolute += float(delta.abs().sum(dtype=torch.float64))
        self._summary.total += delta.numel()
        self._summary.zeros += delta.numel() - int(torch.count_nonzero(delta))


def _part(entry: Entry, kind: Any) -> Part:
    rows = entry.rows if kind == "resized" else 0
    return Part(kind, DTYPE_NAMES[entry.dtype], entry.shape, rows=rows)


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*flat)


def _selection(selection: Selection) -> dict[str, Any]:
    """As JSON has it, so that a header is the same before it is written and after it is read."""
    return {**asdict(selection), "exclude": list(selection.exclude)}


def _refuse_quantised(directory: Path) -> None:
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}); copy the model again.") from None
    if isinstance(config, dict) and config.get("quantization_config"):
        raise ValueError(f"'{directory}' holds quantised weights; give the dequantised model that is to be served.")


def _copy_what_differs(source: Path, base: Path, target: Path) -> None:
    """The fine-tune's config, tokenizer and the like, as far as they are not the base's."""
    for name in copy_side_files(source, target):
        if (base / name).is_file() and filecmp.cmp(base / name, target / name, shallow=False):
            (target / name).unlink()
