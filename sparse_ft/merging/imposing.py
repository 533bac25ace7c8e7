"""Masks of the merged weights, made and imposed on files in place, piece by piece: no tensor is held whole.

An n:m mask is made from blocks of whole groups, an unstructured one from the exact threshold that `thresholds.py` finds
in chunks. Of a whole tensor there is only its mask, one bit per weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.checkpoints.header import TensorInfo
from sparse_ft.checkpoints.writer import write_all
from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.masks.bits import mask_, unpack_keep_bits
from sparse_ft.masks.blocks import BitWriter, group_blocks, ranges
from sparse_ft.masks.pattern import check_sparsity
from sparse_ft.masks.selection import keep_n_of_m
from sparse_ft.merging.chunks import Job, Workspace
from sparse_ft.merging.operands import StoredTensor
from sparse_ft.merging.preserving import PreserveMasks
from sparse_ft.merging.thresholds import Wanted, find_cuts


def impose(directory: Path, masks: MaskSet) -> None:
    """Zero every pruned weight in the files of a checkpoint, in place, and read back that all of them are zero.

    Args:
        directory: of the checkpoint.
        masks: of some of its tensors, in their layout.

    Raises:
        RuntimeError: if a weight is not zero after it was zeroed: the disk does not keep what is written.
    """
    reader = CheckpointReader(directory)
    for name in masks:
        with _opened(reader, name, os.O_RDWR) as stored:
            packed = masks.packed(name)
            for start, stop in ranges(stored.numel):
                values = mask_(stored.tensor.stored(start, stop), packed[start // 8 : -(-stop // 8)])
                data = values.view(torch.uint8).numpy().data.cast("B")
                write_all(stored.descriptor, data, stored.info.start + start * stored.info.dtype.itemsize)
            _check_zeros(name, stored, packed)


def reprune(directory: Path, how: PreserveMasks) -> MaskSet:
    """Masks that keep the largest of the merged weights of each prunable tensor in a pattern.

    Args:
        directory: of the merged checkpoint, its config included.
        how: the pattern, and the share to prune where it is unstructured.

    Returns:
        What `MaskSet.from_scores` makes of the absolute values, tensor by tensor.

    Raises:
        ValueError: if a prunable weight is not stored under its own name.
    """
    from sparse_ft.models import find_targets, load_skeleton

    reader, pattern = CheckpointReader(directory), Pattern.parse(how.pattern)
    packed: dict[str, Tensor] = {}
    dims: dict[str, int] = {}
    for target in find_targets(load_skeleton(directory)):
        if target.name not in reader:
            raise ValueError(f"'{target.name}' is not stored under its own name, so it cannot be pruned here.")
        dims[target.name] = target.input_dim
        with _opened(reader, target.name, os.O_RDONLY) as stored:
            if pattern.n is not None and pattern.m is not None:
                packed[target.name] = largest_of_groups(stored, target.input_dim, pattern.n, pattern.m)
            else:
                packed[target.name] = largest_of_tensor(stored, check_sparsity(pattern, how.sparsity))
    shapes: Mapping[str, tuple[int, ...]] = {name: reader.shape(name) for name in packed}
    return MaskSet.from_packed(packed, shapes, pattern=pattern, input_dims=dims)


class Stored:
    """A tensor in a file with what is known of it.

    Attributes:
        descriptor: of the open file.
        info: dtype, shape and place.
        tensor: reads pieces of it.
        workspace: buffers.
    """

    def __init__(self, descriptor: int, info: TensorInfo, where: str) -> None:
        self.descriptor, self.info, self.workspace = descriptor, info, Workspace()
        self.tensor = StoredTensor(descriptor, info, self.workspace, where)

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return torch.Size(self.info.shape).numel()


def largest_of_groups(stored: Stored, axis: int, n: int, m: int) -> Tensor:
    """The packed mask that keeps the n largest of every m inputs.

    Args:
        stored: the weight.
        axis: of its inputs.
        n: kept of each group.
        m: inputs of a group; inputs that fill no group are kept.

    Returns:
        (ceil(numel / 8),) uint8, see `pack_bits`.
    """
    bits = BitWriter()
    for start, (rows, width, inner) in group_blocks(stored.info.shape, axis, m):
        sizes = stored.workspace.get("sizes", rows * width * inner)
        stored.tensor.read(start, start + sizes.numel(), sizes)
        keep = keep_n_of_m(sizes.abs_().view(rows, width, inner).transpose(1, 2), n, m)
        bits.add(keep.transpose(1, 2).reshape(-1))
    return bits.packed()


def largest_of_tensor(stored: Stored, sparsity: float) -> Tensor:
    """The packed mask without the round(sparsity * numel) smallest entries, of equal ones without those of low index.

    Args:
        stored: the weight.
        sparsity: share that is pruned.

    Returns:
        (ceil(numel / 8),) uint8, see `pack_bits`.

    Raises:
        ValueError: if a weight is not finite.
    """
    job = Job("weight", (stored.numel,), None, [stored.tensor], weights=[1.0], workspace=stored.workspace)
    (cut,) = find_cuts(job, [Wanted(0, round(sparsity * stored.numel), False)])
    bits = BitWriter()
    for start, stop in job.ranges():
        sizes = job.read_delta(0, None, start, stop).abs_().numpy()
        dropped = np.empty(stop - start, dtype=np.bool_)
        cut.smallest(sizes, start, dropped)
        bits.add(torch.from_numpy(~dropped))
    return bits.packed()


@contextmanager
def _opened(reader: CheckpointReader, name: str, flags: int) -> Iterator[Stored]:
    file, info = reader.place(name)
    descriptor = os.open(file, flags)
    try:
        yield Stored(descriptor, info, f"'{file}'")
    finally:
        os.close(descriptor)


def _check_zeros(name: str, stored: Stored, packed: Tensor) -> None:
    for start, stop in ranges(stored.numel):
        values = stored.tensor.stored(start, stop)
        keep = unpack_keep_bits(packed[start // 8 : -(-stop // 8)], (stop - start,))
        revived = int(((values != 0) & (keep == 0)).sum())
        if revived:
            raise RuntimeError(f"{revived} pruned weights of '{name}' are not zero on disk; check the disk.")
