"""Base + delta as a new checkpoint, tensor by tensor: the shards of the base, the names and dtypes of the fine-tune."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparse_ft.checkpoints import (
    CheckpointReader,
    CheckpointWriter,
    atomic_directory,
    check_output_dir,
    copy_side_files,
    resolve_checkpoint,
)
from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.delta_header import Part
from sparse_ft.deltas.entries import add_kept
from sparse_ft.deltas.fingerprint import base_digest
from sparse_ft.deltas.store import RECORD_FILE, DeltaFile


def apply_checkpoint(
    base: str | Path,
    delta: str | Path,
    output_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    check_base: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the checkpoint that a delta makes of its base; it appears when it is whole.

    Args:
        base: directory or Hub name of the base.
        delta: delta directory.
        output_dir: directory to make, loadable by anything that loads the base.
        dtype: of floating point tensors; None is that of the fine-tune.
        scale: q to use in place of the stored ones.
        check_base: refuse a base other than the one the delta was taken from.
        overwrite: replace a directory that is not empty.
        progress: show a progress bar.

    Raises:
        ValueError: if the base is another one, the output is one of the inputs, or scale or dtype is none for weights.
        FileNotFoundError: if one of the inputs is not there.
        RuntimeError: if the disk is full; nothing is written then.

    Example:
        >>> apply_checkpoint("base", "delta", "restored")
    """
    if scale is not None:
        check_scale(scale)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, but weights are floating point; give float32, bfloat16 or float16.")
    output = check_output_dir(output_dir, inputs=[base, delta], overwrite=overwrite)
    source, file = resolve_checkpoint(base), DeltaFile(delta)
    reader = CheckpointReader(source)
    _check_base(reader, file, check_base)
    names = dict(file.header.tensors)
    names |= {alias: names[name] for alias, name in file.header.aliases.items()}
    with atomic_directory(output, overwrite=overwrite) as directory:
        shards = [(shard, {n: _planned(names[n], dtype) for n in members}) for shard, members in _layout(reader, names)]
        with CheckpointWriter(directory, shards) as writer:
            for name in tqdm(names, desc="apply", unit="tensor", disable=not progress):
                writer.write(name, restored(reader, file, file.header.aliases.get(name, name), dtype, scale))
        copy_side_files(file.directory, directory)
        (directory / RECORD_FILE).unlink(missing_ok=True)
        copy_side_files(source, directory)


@torch.no_grad()
def restored(
    base: CheckpointReader, file: DeltaFile, name: str, dtype: torch.dtype | None = None, scale: float | None = None
) -> Tensor:
    """One tensor of base + delta.

    Args:
        base: the base.
        file: the delta.
        name: a key of its header's tensors.
        dtype: of the result if it is floating point; None is that of the fine-tune.
        scale: q to use in place of the stored one.

    Raises:
        ValueError: if a weight becomes infinite, or is too large for float16.
    """
    part = file.header.tensors[name]
    dtype = _planned(part, dtype)[0]
    if part.kind == "finetuned":
        return _cast(name, file.whole(name), dtype)
    tensor = base.get(name)
    if part.kind == "base":
        return _cast(name, tensor, dtype)
    tensor = tensor[: part.rows] if part.kind == "resized" else tensor
    index = torch.from_numpy(file.positions(name))
    divisor = file.header.scale_of(name) if scale is None else scale
    result = _cast(name, tensor, dtype).clone(memory_format=torch.contiguous_format)
    result.view(-1)[index] = add_kept(tensor.reshape(-1)[index], file.values(name), divisor, dtype)
    return torch.cat([result, _cast(name, file.whole(name), dtype)]) if part.kind == "resized" else result


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    result = tensor.to(dtype)
    if dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"'{name}' has values beyond 65504, the largest of float16; use bfloat16 or float32.")
    return result


def _planned(part: Part, dtype: torch.dtype | None) -> tuple[torch.dtype, tuple[int, ...]]:
    return (dtype if dtype and part.torch_dtype.is_floating_point else part.torch_dtype), part.shape


def _layout(reader: CheckpointReader, names: dict[str, Part]) -> list[tuple[str, list[str]]]:
    """The base's files with the tensors that stay, those the base has not in the last file."""
    shards = [(file, [name for name in members if name in names]) for file, members in reader.shards]
    shards[-1][1].extend(name for name in names if name not in reader)
    return shards


def _check_base(reader: CheckpointReader, file: DeltaFile, check_digest: bool) -> None:
    header = file.header
    for name, part in header.tensors.items():
        if part.kind == "finetuned":
            continue
        shape = reader.shape(name) if name in reader else None
        if shape is None or (shape != part.shape if part.kind != "resized" else shape[1:] != part.shape[1:]):
            raise ValueError(
                f"'{name}' has shape {part.shape} in the delta '{file.directory}' but "
                f"{'is not in' if shape is None else f'{shape} in'} '{reader.path}'; give the base it was taken from."
            )
    strange = [name for name in reader if name not in header.tensors and name not in header.aliases]
    if strange:
        raise ValueError(
            f"'{reader.path}' has '{strange[0]}', which the delta '{file.directory}' does not know; give the base it "
            f"was taken from."
        )
    found = base_digest(header.tensors, reader)
    if check_digest and found != header.base_digest:
        raise ValueError(
            f"The delta '{file.directory}' belongs to a base with digest {header.base_digest[:12]} but '{reader.path}' "
            f"has {found[:12]}: it is another model or revision; give the right one, or turn "
            f"the check off (check_base=False, --no_check_base)."
        )
