"""Commands that work but for one thing, damaged files, and the check that a command refuses without a trace."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cli.workspace import Result, tree
from safetensors.torch import load_file, save_file

Command = Callable[..., Result]


def refused(command: Command, place: Path, *words: object, naming: tuple[str, ...]) -> None:
    """The command fails with one sentence that holds every text in `naming`, and leaves the tree as it was."""
    before = tree(place)
    result = command(*words)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    for part in naming:
        assert part in result.complaint, f"{part!r} is not in: {result.complaint}"
    assert tree(place) == before, "something was written"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to one file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def prune_words(place: Path, **options: object) -> list[object]:
    """A prune command that works, but for the options given; None takes one out, True makes it a flag."""
    defaults = {"model_name_or_path": place / "dense", "sparsity": 0.5, "output_dir": place / "out"}
    return ["prune", *_words({**defaults, **options})]


def retrain_words(place: Path, **options: object) -> list[object]:
    """A retrain command that works, but for the options given."""
    defaults = {
        "model_name_or_path": place / "sparse",
        "output_dir": place / "out",
        "dataset": place / "text",
        "sequence_length": 16,
        "max_steps": 1,
    }
    return ["retrain", *_words({**defaults, **options})]


def _words(options: dict[str, object]) -> Iterator[object]:
    for name, value in options.items():
        if value is not None:
            yield f"--{name}"
            if value is not True:
                yield value


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the tensors of a checkpoint after `change` had them."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


QUERY = "model.layers.0.self_attn.q_proj.weight"


def _claims_too_much(file: Path) -> bytes:
    return struct.pack("<Q", 1 << 40) + file.read_bytes()[8:]


def _points_behind_the_end(file: Path) -> bytes:
    header = json.dumps({QUERY: {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 4 << 20]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(64)


def _overlaps(file: Path) -> bytes:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


DAMAGE: dict[str, Callable[[Path], bytes]] = {
    "truncated": lambda file: file.read_bytes()[:-1000],
    "truncated in the header": lambda file: file.read_bytes()[:100],
    "empty": lambda file: b"",
    "header larger than the file": _claims_too_much,
    "tensor behind the end": _points_behind_the_end,
    "tensors over each other": _overlaps,
    "no safetensors": lambda file: b"PK\x03\x04" + bytes(2000),
}
