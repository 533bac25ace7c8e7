"""Run as a program under a limit on file sizes: try to write more than fits in every way, and print the errors.

python full_disk.py TARGET
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparse_ft.checkpoints import CheckpointWriter, atomic_directory, atomic_write

LIMIT = 1_000_000  # bytes a file may have; Python ignores SIGXFSZ, so the write fails as on a full disk


def write(directory: Path, how: str) -> None:
    if how == "plain":
        (directory / "big.bin").write_bytes(bytes(2 * LIMIT))
    elif how == "library":
        save_file({"t": torch.zeros(LIMIT)}, directory / "model.safetensors")
    else:
        with CheckpointWriter(directory, [("model.safetensors", {"t": (torch.float32, (LIMIT,))})]) as writer:
            writer.write("t", torch.zeros(LIMIT))


def attempt(target: Path, how: str) -> None:
    if how == "file":
        atomic_write(target / "old.txt", bytes(2 * LIMIT))
        return
    with atomic_directory(target, overwrite=True) as directory:
        (directory / "first.txt").write_text("fits")
        write(directory, how)


def main(target: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    for how in ("writer", "plain", "library", "file"):
        try:
            attempt(target, how)
        except RuntimeError as error:
            print(f"{how}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
