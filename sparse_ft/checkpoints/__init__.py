"""Checkpoints as files: streaming reads and writes, atomic directories, and the sidecars of a sparse checkpoint."""

from sparse_ft.checkpoints.directories import atomic_directory, atomic_write, check_output_dir, recover_directory
from sparse_ft.checkpoints.reader import CheckpointReader
from sparse_ft.checkpoints.record import Record, make_record, versions
from sparse_ft.checkpoints.resolve import resolve_checkpoint
from sparse_ft.checkpoints.resumable import resumable_directory
from sparse_ft.checkpoints.side_files import copy_side_files
from sparse_ft.checkpoints.sidecars import RECORD_FILE, check_weights, read_sidecars, write_sidecars
from sparse_ft.checkpoints.writer import CheckpointWriter

__all__ = [
    "RECORD_FILE",
    "CheckpointReader",
    "CheckpointWriter",
    "Record",
    "atomic_directory",
    "atomic_write",
    "check_output_dir",
    "check_weights",
    "copy_side_files",
    "make_record",
    "read_sidecars",
    "recover_directory",
    "resolve_checkpoint",
    "resumable_directory",
    "versions",
    "write_sidecars",
]
