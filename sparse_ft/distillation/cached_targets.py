"""Teacher targets on disk: the k largest log-probabilities of every training sequence, so that no teacher is in memory.

    targets = CachedTargets.open("targets")                                    # made once, see `write_targets.py`
    for batch in loader:
        wanted = targets.lookup(batch["input_ids"], batch["attention_mask"])
        kl_loss(student_hidden, wanted, batch["labels"], student_head=head).backward()

A row is found by its token ids alone: the key is a digest of the valid tokens in their order, so padding on either side
and the order of batches do not matter, and another tokenizer, sequence length or packing is an error and never a wrong
target.

The directory holds `targets.json` (what was made, from what), `index.safetensors` (digests of all sequences, sorted,
with the place of each) and `targets-00001.safetensors`, ... (`log_probs` and `indices`, (tokens, k), and `tail`,
(tokens,), sequence after sequence). All of it is memory-mapped: opening reads the JSON and the header of the index, a
lookup a few pages of the index and the rows it was asked for. Indices are uint16 where the vocabulary allows it: k = 64
in bf16 takes 258 bytes per token then, and 386 with int32, besides 28 bytes per sequence in the index.

Limits: a sequence is found as a whole only, so crops and augmentation need targets of their own. Ids and padding are
all the key knows: rows that differ in anything else the teacher sees (position ids, segments) are the same row, and
encoder-decoders, whose predictions depend on two sequences, are left out.

Source: the form of a target is that of `top_k.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from sparse_ft.checkpoints import recover_directory
from sparse_ft.checkpoints.header import build_header, read_header
from sparse_ft.checkpoints.resolve import member
from sparse_ft.distillation.top_k import TopK

TARGETS_FILE = "targets.json"
INDEX_FILE = "index.safetensors"
FORMAT_VERSION = 1
DIGEST_BYTES = 16
#: What log-probabilities may be stored in.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """What `targets.json` says.

    Attributes:
        k: entries per token.
        temperature: what the teacher's logits were divided by.
        dtype: of the log-probabilities.
        vocabulary: number of the teacher's logits per token.
        teacher: the name it was given.
        sequences: how many there are, all different.
        shards: tokens in each file, in the order of the files.
    """

    k: int
    temperature: float
    dtype: torch.dtype
    vocabulary: int
    teacher: str
    sequences: int = 0
    shards: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens in all files."""
        return sum(self.shards)

    @property
    def index_dtype(self) -> torch.dtype:
        """What indices are stored in."""
        return torch.uint16 if self.vocabulary <= 2**16 else torch.int32

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in a shard."""
        return self.k * (self.dtype.itemsize + self.index_dtype.itemsize) + self.dtype.itemsize

    def shard_plan(self, tokens: int) -> Plan:
        """The tensors of a file of so many tokens."""
        return {
            "log_probs": (self.dtype, (tokens, self.k)),
            "indices": (self.index_dtype, (tokens, self.k)),
            "tail": (self.dtype, (tokens,)),
        }

    def index_plan(self) -> Plan:
        """The tensors of the index: sorted digests; where a sequence starts, counted over all files; its length."""
        count = self.sequences
        return {
            "digests": (torch.uint8, (count, DIGEST_BYTES)),
            "starts": (torch.int64, (count,)),
            "lengths": (torch.int32, (count,)),
        }

    def to_json(self) -> str:
        """The content of `targets.json`, equal for equal layouts."""
        content = {
            "format": FORMAT_VERSION,
            "teacher": self.teacher,
            "k": self.k,
            "temperature": self.temperature,
            "dtype": str(self.dtype).removeprefix("torch."),
            "vocabulary": self.vocabulary,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "shards": list(self.shards),
        }
        return json.dumps(content, indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> Layout:
        """Read `targets.json`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged or of another format.
        """
        if not (directory / TARGETS_FILE).exists():
            raise FileNotFoundError(f"No {TARGETS_FILE} in '{directory}'; give a directory that write_targets made.")
        file = member(directory, TARGETS_FILE)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format"]
            if version == FORMAT_VERSION:
                return cls._from_json(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"'{file}' is damaged ({error!r}); copy it again, or make the targets again.") from None
        raise ValueError(
            f"'{file}' has format {version}, this version reads {FORMAT_VERSION}; upgrade sparse-ft, or make the "
            f"targets again."
        )

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Layout:
        counts = [content["k"], content["vocabulary"], content["sequences"], *content["shards"]]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("a count is not a positive number")
        layout = cls(
            k=content["k"],
            temperature=float(content["temperature"]),
            dtype=DTYPES[content["dtype"]],
            vocabulary=content["vocabulary"],
            teacher=str(content["teacher"]),
            sequences=content["sequences"],
            shards=tuple(content["shards"]),
        )
        if layout.k > layout.vocabulary or not layout.temperature > 0 or layout.tokens != content["tokens"]:
            raise ValueError("its numbers contradict each other")
        return layout


class CachedTargets:
    """A directory of targets, open for reading. Made by `CachedTargets.open`.

    It may be given to the workers of a data loader: in another process the directory is opened again, not copied.

    Attributes:
        directory: where it lies.
        layout: what `targets.json` says.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory = directory
        self.layout = layout
        self._ends = np.cumsum(layout.shards)
        self._stamps = [_check_size(directory, shard, layout) for shard in range(len(layout.shards))]
        self._shards: dict[int, dict[str, Tensor]] = {}
        index = _mapped(directory, INDEX_FILE, layout.index_plan())
        self._digests = index["digests"].numpy()
        self._starts, self._lengths = index["starts"].numpy(), index["lengths"].numpy()

    @classmethod
    def open(cls, directory: str | Path) -> CachedTargets:
        """Open a directory that `write_targets` made. No target is read.

        Raises:
            FileNotFoundError: if it is no such directory, or a file of it is gone.
            ValueError: if it is damaged or truncated, or of a newer format.

        Example:
            >>> targets = CachedTargets.open("targets")
        """
        path = Path(directory)
        if not path.exists():
            recover_directory(path)
        return cls(path, Layout.read(path))

    def __reduce__(self) -> tuple[Callable[[Path], CachedTargets], tuple[Path]]:
        """Pickle the place only."""
        return CachedTargets.open, (self.directory.absolute(),)

    def __len__(self) -> int:
        """Number of sequences."""
        return self.layout.sequences

    @property
    def k(self) -> int:
        """Entries per token."""
        return self.layout.k

    @property
    def temperature(self) -> float:
        """What the teacher's logits were divided by; the loss has to be asked for at the same."""
        return self.layout.temperature

    @property
    def vocabulary(self) -> int:
        """Number of the teacher's logits per token."""
        return self.layout.vocabulary

    @property
    def teacher(self) -> str:
        """The name the teacher was given."""
        return self.layout.teacher

    def lookup(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TopK:
        """The targets of a batch.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, T), 0 for padding; None: all tokens are valid. A row without a valid token has no
                targets and needs none.

        Returns:
            Log-probabilities (B, T, k) in the dtype they were stored in, indices (B, T, k) in int32 and tail (B, T), on
            the device of `input_ids`. At padding all of them are 0.

        Raises:
            ValueError: a row is not in the directory, shapes do not fit, or a file has changed since it was opened.

        Example:
            >>> kl_loss(student_logits, targets.lookup(ids, mask), labels, temperature=targets.temperature)
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}, but token ids of a batch are "
                f"integers (rows, tokens): give those the student is given."
            )
        ids, valid = input_ids.detach().cpu(), _valid(input_ids, attention_mask)
        rows = [ids[row][valid[row]] for row in range(len(ids))]
        parts = [self._read(*self._find(row, tokens)) for row, tokens in enumerate(rows) if len(tokens)]
        k, dtype, device = self.k, self.layout.dtype, input_ids.device

        def batch(name: str, width: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            values = [part[name].to(dtype) for part in parts]
            if len(parts) and valid.all():
                return torch.cat(values).view(*ids.shape, *width).to(device)
            out = torch.zeros(*ids.shape, *width, dtype=dtype)
            if len(parts):
                out[valid] = torch.cat(values)
            return out.to(device)

        return TopK(
            batch("log_probs", (k,), dtype), batch("indices", (k,), torch.int32), batch("tail", (), dtype),
            self.temperature,
        )  # fmt: skip

    def check_rows(self, rows: Iterable[Tensor]) -> None:
        """Refuse sequences that have no targets, before anything is trained on them. No target is read.

        Args:
            rows: token ids (T,) of each sequence, without padding.

        Raises:
            ValueError: one of them is not in the directory.
        """
        for number, tokens in enumerate(rows):
            self._find(number, tokens.cpu())

    def _find(self, row: int, tokens: Tensor) -> tuple[int, int]:
        """Where the targets of a row start, counted over all files, and how many tokens they have."""
        key = digest(tokens)
        digests = self._digests.view(f"S{DIGEST_BYTES}")[:, 0]
        at = int(np.searchsorted(digests, np.array(key, dtype=digests.dtype)))
        if at == len(digests) or self._digests[at].tobytes() != key:
            raise ValueError(
                f"Row {row}, with {len(tokens)} tokens, is not among the {len(self)} sequences of "
                f"'{self.directory}': make the targets with the tokenizer, sequence length and packing of the "
                f"training data, or train on the data they were made from."
            )
        start, length = int(self._starts[at]), int(self._lengths[at])
        if length != len(tokens) or not 0 <= start <= self.layout.tokens - length:
            raise ValueError(f"The index of '{self.directory}' is damaged; copy it again, or make the targets again.")
        return start, length

    def _read(self, start: int, length: int) -> Mapping[str, Tensor]:
        """Views of the mapped rows of one sequence."""
        shard = int(np.searchsorted(self._ends, start, side="right"))
        if shard not in self._shards:
            # The directory may have been replaced as a whole: the index in memory would point to others' targets.
            if _check_size(self.directory, shard, self.layout) != self._stamps[shard]:
                raise ValueError(f"'{self.directory}' was written again since it was opened: open it again.")
            plan = self.layout.shard_plan(self.layout.shards[shard])
            self._shards[shard] = _mapped(self.directory, shard_name(shard), plan)
        first = start - (int(self._ends[shard]) - self.layout.shards[shard])
        rows = {name: tensor[first : first + length] for name, tensor in self._shards[shard].items()}
        indices = rows["indices"].numpy()
        if first + length > self.layout.shards[shard] or (
            length and not 0 <= indices.min() <= indices.max() < self.vocabulary
        ):
            raise ValueError(f"'{shard_name(shard)}' in '{self.directory}' is damaged; make the targets again.")
        return rows


def shard_name(shard: int) -> str:
    """File name of a shard, counted from 0."""
    return f"targets-{shard + 1:05d}.safetensors"


def digest(tokens: Tensor) -> bytes:
    """The key of a sequence: BLAKE2b over its ids as little-endian int64.

    Args:
        tokens: (T,) integers on the CPU, without padding.

    Returns:
        16 bytes.
    """
    ids: NDArray[np.int64] = tokens.to(torch.int64).contiguous().numpy().astype("<i8", copy=False)
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST_BYTES).digest()


def _valid(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Bool (B, T) on the CPU."""
    if attention_mask is None:
        return torch.ones(input_ids.shape, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"The attention mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}: give "
            f"one number per token, 0 for padding."
        )
    return attention_mask.detach().cpu() != 0


def _check_size(directory: Path, shard: int, layout: Layout) -> tuple[int, int]:
    """Refuse a shard of another size than its content needs, from the file system alone; what tells it from another
    file of the same size."""
    file = member(directory, shard_name(shard))
    header, places = build_header(layout.shard_plan(layout.shards[shard]))
    expected, status = max([len(header), *(place.stop for place in places.values())]), os.stat(file)
    if status.st_size != expected:
        raise ValueError(
            f"'{file}' has {status.st_size} bytes but its targets need {expected}: it is truncated or another run's; "
            f"copy it again, or make the targets again."
        )
    return status.st_ino, status.st_mtime_ns


def _mapped(directory: Path, name: str, plan: Plan) -> dict[str, Tensor]:
    """The tensors of a file, mapped, after checking that they are those planned."""
    file = member(directory, name)
    infos, _ = read_header(file)
    if {name: (info.dtype, info.shape) for name, info in infos.items()} != plan:
        raise ValueError(
            f"'{file}' does not hold what {TARGETS_FILE} says; it is damaged or another run's: copy the directory "
            f"again, or make the targets again."
        )
    with safe_open(file, framework="pt", device="cpu") as handle:
        return {name: handle.get_tensor(name) for name in plan}
