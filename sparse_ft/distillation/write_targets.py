"""Make the targets of a data set once, with the teacher, so that training needs the files only (`cached_targets.py`).

    def predict(input_ids, attention_mask):
        out = teacher.model(input_ids.cuda(), attention_mask=attention_mask.cuda())
        return out.last_hidden_state, Head(teacher.lm_head.weight)

    write_targets("targets", dataset, predict, k=64, vocabulary=32000, teacher="llama-2-7b")

Sequences are read as a stream, a window at a time, and sorted by length within it, so that batches have little padding.
Memory is that of one shard and one batch, and about 100 bytes per sequence to know duplicates by. The directory
appears under its name when it is finished; until then an old one stays whole. Equal predictions in equal order give
equal bytes.

Limits: padding is on the right, which a decoder's predictions do not depend on but for rounding.
"""

from __future__ import annotations

import array
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_ft.checkpoints import atomic_directory, check_output_dir
from sparse_ft.checkpoints.header import build_header
from sparse_ft.checkpoints.writer import write_all
from sparse_ft.distillation.cached_targets import (
    DIGEST_BYTES,
    DTYPES,
    INDEX_FILE,
    TARGETS_FILE,
    Layout,
    Plan,
    digest,
    shard_name,
)
from sparse_ft.distillation.head import Head
from sparse_ft.distillation.head import vocabulary as logits_per_token
from sparse_ft.distillation.top_k import TopK, top_k_targets

# Batches that are sorted by length together.
BATCHES_PER_WINDOW = 64


@torch.no_grad()
def write_targets(
    directory: str | Path,
    sequences: Iterable[Any],
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Head | None]],
    *,
    k: int = 64,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 8,
    teacher: str = "",
    vocabulary: int,
    shard_bytes: int = 256 * 2**20,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the teacher's top k of every sequence.

    Args:
        directory: where to; it must be empty or new.
        sequences: token ids, (T,) each, as lists or tensors; or rows with `input_ids` and perhaps `attention_mask`,
            0 for padding, such as those of a `datasets.Dataset`. Rows are read once, in order. What occurs several
            times is written once, rows without a token not at all.
        predict: (input_ids (B, T), attention_mask (B, T)), int64, on the CPU, padded on the right with id 0, to the
            teacher's hidden states (B, T, h) and head, or to its logits (B, T, V) and None. The teacher has to be in
            eval mode; gradients are off.
        k: entries per token, 1 to V.
        temperature: what logits are divided by.
        dtype: of the stored log-probabilities: bfloat16, float16 or float32.
        batch_size: sequences per call of `predict`.
        teacher: its name, for people.
        vocabulary: V, the number of the teacher's logits.
        shard_bytes: size of a file, exceeded only by a sequence that is larger on its own.
        overwrite: replace a directory that is not empty, as a whole.
        progress: show a progress bar.

    Returns:
        The directory, for `CachedTargets.open`.

    Raises:
        ValueError: a setting is out of its range, a row is no list of token ids or holds one outside the vocabulary,
            there is no row, or `predict` returns other shapes.
        FileExistsError: the directory is not empty, without `overwrite`.
        RuntimeError: the teacher's logits are not finite, or the disk is full.

    Example:
        >>> write_targets("targets", [[1, 2, 3]], lambda ids, mask: (teacher(ids).logits, None), vocabulary=32000)

    Source: see `top_k.py`.
    """
    layout = Layout(k, float(temperature), dtype, vocabulary, teacher)
    _check_settings(layout, batch_size, shard_bytes)
    check_output_dir(directory, overwrite=overwrite)
    total = len(sequences) if isinstance(sequences, Sized) else None
    with (
        atomic_directory(directory, overwrite=overwrite) as partial,
        tqdm(total=total, desc="targets", unit="sequence", disable=not progress) as bar,
    ):
        writer = _Writer(partial, layout, shard_bytes)
        rows = _new_rows(sequences, vocabulary, bar)
        while window := list(itertools.islice(rows, batch_size * BATCHES_PER_WINDOW)):
            window.sort(key=lambda row: -len(row[1]))  # the largest batch first, which may not fit into memory
            for first in range(0, len(window), batch_size):
                batch = window[first : first + batch_size]
                ends = list(itertools.accumulate(len(tokens) for _, tokens in batch))
                top = _predicted(predict, [tokens for _, tokens in batch], layout)
                for (key, tokens), end in zip(batch, ends, strict=True):
                    writer.add(key, top, slice(end - len(tokens), end))
                bar.update(len(batch))
        writer.close()
    return Path(directory)


class _Writer:
    """Files that are filled sequence by sequence, and the index of them."""

    def __init__(self, directory: Path, layout: Layout, shard_bytes: int) -> None:
        self._directory, self._layout = directory, layout
        self._tokens_per_shard = max(1, shard_bytes // layout.bytes_per_token)
        self._parts: dict[str, list[Tensor]] = {name: [] for name in layout.shard_plan(0)}
        self._tokens = 0
        self._shards: list[int] = []
        self._digests, self._lengths = bytearray(), array.array("i")

    def add(self, key: bytes, top: TopK, rows: slice) -> None:
        """Note some rows of a batch, log_probs and indices (n, k) and tail (n,), as the targets of one sequence."""
        length = rows.stop - rows.start
        if self._tokens and self._tokens + length > self._tokens_per_shard:
            self._finish_shard()
        self._digests += key
        self._lengths.append(length)
        self._tokens += length
        for name, parts in self._parts.items():
            parts.append(getattr(top, name)[rows])

    def close(self) -> None:
        """Write the last file, the index and `targets.json`.

        Raises:
            ValueError: if there was no sequence.
        """
        if not self._digests:
            raise ValueError("There is no sequence with a token to make targets of: give at least one.")
        self._finish_shard()
        layout = replace(self._layout, sequences=len(self._lengths), shards=tuple(self._shards))
        order = np.frombuffer(self._digests, dtype=f"S{DIGEST_BYTES}").argsort()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        digests = np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        index = {"digests": digests, "starts": starts, "lengths": lengths}
        tensors = {name: [torch.from_numpy(values[order])] for name, values in index.items()}
        _write_file(self._directory / INDEX_FILE, layout.index_plan(), tensors)
        (self._directory / TARGETS_FILE).write_text(layout.to_json(), encoding="utf-8")

    def _finish_shard(self) -> None:
        file = self._directory / shard_name(len(self._shards))
        _write_file(file, self._layout.shard_plan(self._tokens), self._parts)
        self._shards.append(self._tokens)
        self._tokens = 0
        for parts in self._parts.values():
            parts.clear()


def _write_file(file: Path, plan: Plan, tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Write a safetensors file whose tensors come in parts, along the first dimension."""
    header, places = build_header(plan)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_all(descriptor, memoryview(header), 0)
        for name, parts in tensors.items():
            position = places[name].start
            for part in parts:
                data = part.contiguous().reshape(-1).view(torch.uint8).numpy()
                write_all(descriptor, data.data, position)
                position += data.nbytes
    finally:
        os.close(descriptor)


def _new_rows(sequences: Iterable[Any], vocabulary: int, bar: Any) -> Iterator[tuple[bytes, Tensor]]:
    """Key and tokens of each row that has tokens and was not there before."""
    seen: set[bytes] = set()
    for number, row in enumerate(sequences):
        tokens = _tokens(row, number, vocabulary)
        key = digest(tokens)
        if key in seen or not len(tokens):
            bar.update(1)
            continue
        seen.add(key)
        yield key, tokens


def _tokens(row: Any, number: int, vocabulary: int) -> Tensor:
    """The valid token ids of a row, int64, (T,)."""
    mask = None
    if isinstance(row, Mapping):
        if "input_ids" not in row:
            raise ValueError(f"Sequence {number} has the columns {sorted(row)} but no 'input_ids': tokenise it first.")
        row, mask = row["input_ids"], row.get("attention_mask")
    try:
        ids = torch.as_tensor(row).cpu()
        valid = None if mask is None else torch.as_tensor(mask).cpu() != 0
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Sequence {number} is no list of token ids ({error}): tokenise it first.") from None
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(
            f"Sequence {number} is {ids.dtype} of shape {tuple(ids.shape)}, but token ids are integers (tokens,): give "
            f"one row at a time."
        )
    if valid is not None and valid.shape != ids.shape:
        raise ValueError(
            f"Sequence {number} has {len(ids)} token ids but an attention mask of shape {tuple(valid.shape)}: give one "
            f"number per token, 0 for padding."
        )
    ids = (ids if valid is None else ids[valid]).to(torch.int64)
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        stray = next(i for i in ids.tolist() if not 0 <= i < vocabulary)
        raise ValueError(
            f"Sequence {number} holds the token id {stray}, but a vocabulary of {vocabulary} has ids from 0 to "
            f"{vocabulary - 1}: tokenise with the teacher's tokenizer, or correct `vocabulary`."
        )
    return ids


def _predicted(
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Head | None]], rows: Sequence[Tensor], layout: Layout
) -> TopK:
    """The targets of all tokens of some rows, one row after the other, (tokens, k), as they are stored."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
    states, head = predict(ids, mask)
    if states.ndim != 3 or states.shape[:2] != ids.shape:
        raise ValueError(
            f"predict returned states of shape {tuple(states.shape)} for token ids of shape {tuple(ids.shape)}: return "
            f"hidden states (rows, tokens, channels) and a Head, or logits (rows, tokens, vocabulary) and None."
        )
    if logits_per_token(states, head) != layout.vocabulary:
        raise ValueError(
            f"The teacher has {logits_per_token(states, head)} logits per token but the vocabulary was given as "
            f"{layout.vocabulary}: give the teacher's."
        )
    valid = mask.bool().to(states.device)
    top = top_k_targets(states[valid], layout.k, head=head, temperature=layout.temperature, dtype=layout.dtype)
    log_probs = top.log_probs.cpu()
    if not log_probs[:, 0].isfinite().all():
        raise RuntimeError(
            f"The teacher's logits are not finite for {len(rows)} sequences of up to {ids.shape[1]} tokens: run it in "
            f"bfloat16 or float32."
        )
    return TopK(log_probs, top.indices.cpu().to(layout.index_dtype), top.tail.cpu(), layout.temperature)


def _check_settings(layout: Layout, batch_size: int, shard_bytes: int) -> None:
    """Raise ValueError for a setting out of its range."""
    if not 1 <= layout.k <= layout.vocabulary:
        raise ValueError(
            f"k is {layout.k} but the vocabulary has {layout.vocabulary} entries: give a number from 1 to "
            f"{layout.vocabulary}."
        )
    if not 0 < layout.temperature < float("inf"):
        raise ValueError(
            f"The temperature is {layout.temperature}, but logits are divided by it: give a positive number."
        )
    if layout.dtype not in DTYPES.values():
        raise ValueError(f"The dtype is {layout.dtype}, but targets are stored in one of {', '.join(DTYPES)}.")
    for name, value in (("batch_size", batch_size), ("shard_bytes", shard_bytes)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but it is a number of things: give at least 1.")
