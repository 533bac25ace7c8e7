"""A directory that is filled over several runs and appears at its name only when it is whole.

`atomic_directory` throws away what an interrupted run wrote. Where that is hours of work, this keeps it: the directory
is filled beside its target under a fixed hidden name, with a key that says what it is going to be. A run with the same
key goes on where the last one ended; with another key it begins again.

    with resumable_directory("out", key=digest) as directory:
        for file in missing(directory):
            write(directory / file)          # a kill here loses this file only
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparse_ft.checkpoints import directories

#: Folder inside the unfinished directory for what a later run must know; it is gone from the finished one.
NOTES = ".resume"
_KEY_FILE = "key"


@contextlib.contextmanager
def resumable_directory(target: str | Path, *, key: str, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `target` that becomes `target` when the block ends without an error.

    After an error, an interrupt or a kill it stays for the next call; only a ValueError, which would come again, and a
    call with another key remove it.

    Args:
        target: the directory to make; it may exist if it is empty.
        key: names the content, for instance a digest of everything it is made from.
        overwrite: replace a directory that is not empty, as a whole.

    Yields:
        The directory to write into; what an earlier run with this key wrote is there. Its folder `NOTES` is for the
        caller's notes to later runs.

    Raises:
        FileExistsError: if the target is a file, or not empty without `overwrite`.
        RuntimeError: if another process is writing it, or the disk is full.
    """
    target = Path(os.path.realpath(target))
    directories.recover_directory(target)
    directories._check_replaceable(target, overwrite)
    directories._make_parents(target.parent)
    unfinished = target.with_name(f".{target.name}.unfinished")
    lock = _enter(unfinished, key, target)
    try:
        with directories._one_sentence_if_full(target):
            yield unfinished
            directories._flush_tree(unfinished)
            shutil.rmtree(unfinished / NOTES)
            directories._publish(unfinished, target, overwrite)
        shutil.rmtree(unfinished, ignore_errors=True)  # after an exchange this name holds the old directory
    except ValueError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _enter(unfinished: Path, key: str, target: Path) -> int | None:
    """Make or go on with the directory; returns what keeps others out."""
    unfinished.mkdir(exist_ok=True)
    if directories._is_locked(unfinished):
        raise RuntimeError(f"Another process is writing '{target}'; wait for it, or give another --output_dir.")
    lock = directories._lock(unfinished)
    key_file = unfinished / NOTES / _KEY_FILE
    if not key_file.is_file() or key_file.read_text(encoding="utf-8") != key:
        for entry in unfinished.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        key_file.parent.mkdir()
        directories.atomic_write(key_file, key)
    return lock
