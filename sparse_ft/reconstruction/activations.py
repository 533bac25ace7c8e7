"""Where activations wait: in memory, or in files that the system pages in and out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor


def keeper(device: torch.device | str, directory: str | Path | None = None) -> Callable[[Tensor], Tensor]:
    """A function that turns a tensor into the copy that is held: beside the CPU's memory if need be, never on a GPU.

    Args:
        device: where the tensors come from.
        directory: for files; None holds tensors in memory.
    """
    if directory is not None:
        return partial(in_file, directory=Path(directory))
    return torch.clone if torch.device(device).type == "cpu" else partial(torch.Tensor.to, device="cpu", copy=True)


def in_file(tensor: Tensor, *, directory: Path) -> Tensor:
    """A copy on the CPU whose memory is a file without a name: it is gone with the tensor, or with the process.

    Args:
        tensor: any shape and dtype.
        directory: made if needed.

    Raises:
        OSError: if the disk is full; the file's whole size is reserved before it is written.
    """
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor.to("cpu", copy=True)
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".activations-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        kept = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return kept.view(tensor.shape).copy_(tensor)
