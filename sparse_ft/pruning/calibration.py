"""Calibration batches as pruning uses them: without padding, in one fixed order, in forwards of a few thousand tokens.

Whatever batches come in, each row is cut down to its real tokens (`attention_mask` 1), rows of equal shape are put
together, and the order is that of their content. So padding cannot enter any statistic, in any layer of any
architecture, and the result does not depend on how the caller batched, padded or ordered the rows.

Left-padded rows start at position 0 once the padding is gone, as the same text would unpadded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Tokens per forward: enough to keep matrix products busy, little enough for the activations of one block.
TOKENS_PER_FORWARD = 4096

_IGNORED_LABEL = -100
# Mask of a sequence -> the tensors that run along it.
_SEQUENCES = {
    "attention_mask": ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
}

Batch = dict[str, Any]


def prepare_calibration(
    model: nn.Module, calibration: Iterable[Any] | None, method: str, *, rows_per_batch: int | None = None
) -> list[Batch]:
    """Check calibration data and turn it into batches without padding.

    Args:
        model: the model they are for.
        calibration: an iterable of keyword dictionaries for the model's forward, or of token ids `(B, T)` or `(T,)`.
        method: name of the method, for the message.
        rows_per_batch: sequences of a batch; by default as many as give `TOKENS_PER_FORWARD`. Batches that cannot be
            taken apart stay as they are.

    Returns:
        Keyword dictionaries for the model's forward, on the CPU, labels taken out. A model with a decoder of its own
        gets decoder inputs: those given, else made from `labels`, else from `input_ids`, the way the model makes them.

    Raises:
        ValueError: if there are none, a batch lacks the model's input, or token ids are no integers, lie outside the
            vocabulary or beyond the positions of the model.
    """
    if calibration is None:
        raise ValueError(
            f"method '{method}' needs calibration data; pass calibration=[batches of token ids], for example from "
            f"sparse_ft.data.calibration_batches, or use method='magnitude'."
        )
    if isinstance(calibration, (str, bytes)):
        raise ValueError(
            f"calibration is the text {str(calibration)[:40]!r}; pass batches of token ids, for example from "
            f"sparse_ft.data.calibration_batches(dataset, tokenizer)."
        )
    if isinstance(calibration, (Tensor, Mapping)):
        calibration = [calibration]
    batches: list[Batch] = []
    rows: dict[Any, list[Batch]] = defaultdict(list)
    for given in calibration:
        batch = _as_batch(given)
        _check_input(model, batch)
        _check_ids(model, batch)
        if not _has_rows(batch):
            batches.append(_with_decoder_inputs(model, _unsplit(batch)))
            continue
        for row in _rows(batch):
            row = _with_decoder_inputs(model, row)
            rows[_signature(row)].append(row)
    for signature in sorted(rows, key=repr):
        batches.extend(_join(rows[signature], rows_per_batch))
    if not batches:
        raise ValueError(f"calibration holds no tokens; method '{method}' needs at least one batch with some.")
    return batches


def _as_batch(given: Any) -> Batch:
    if isinstance(given, Mapping):
        batch = {key: value for key, value in given.items() if value is not None}
    elif isinstance(given, Tensor):
        batch = {"input_ids": given}
    elif isinstance(given, (list, tuple)) and given and isinstance(given[0], Tensor):
        batch = {"input_ids": given[0]}  # what a DataLoader over a TensorDataset yields
    else:
        raise ValueError(
            f"A calibration batch is {type(given).__name__}; pass token ids (B, T), or a dictionary with input_ids."
        )
    ids = batch.get("input_ids")
    if isinstance(ids, (list, tuple)):
        raise ValueError('A calibration batch has a list as input_ids; tokenise with return_tensors="pt".')
    if isinstance(ids, Tensor) and ids.ndim == 1:
        batch = {k: v[None] if isinstance(v, Tensor) and v.shape == ids.shape else v for k, v in batch.items()}
    return batch


def _check_input(model: Any, batch: Batch) -> None:
    """transformers says what a model's main input is called; of other models nothing is known."""
    main = getattr(model, "main_input_name", None)
    if main is None or batch.keys() & {main, "input_ids", "inputs_embeds", "encoder_outputs"}:
        return
    found = f"only {', '.join(map(repr, sorted(map(str, batch))))}" if batch else "nothing"
    raise ValueError(
        f"A calibration batch for {type(model).__name__} has no '{main}', {found}; rename its keys to those of the "
        f"model's forward, or pass token ids (B, T)."
    )


def _with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    labels = batch.get("labels")
    batch = {key: value for key, value in batch.items() if key != "labels"}
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return batch
    if labels is None or labels.ndim != 2 or labels.numel() == 0:
        labels = batch.get("input_ids")
    if labels is None or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(f"{type(model).__name__} has a decoder; give decoder_input_ids in each calibration batch.")
    return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}


def _check_ids(model: Any, batch: Batch) -> None:
    vocabulary = _vocabulary(model)
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for key in ("input_ids", "decoder_input_ids"):
        ids = batch.get(key)
        if ids is None or ids.numel() == 0:
            continue
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.ndim != 2:
            raise ValueError(f"Calibration {key} are {ids.dtype} {tuple(ids.shape)}; they must be integers (B, T).")
        low, high = int(ids.min()), int(ids.max())
        if vocabulary is not None and not 0 <= low <= high < vocabulary:
            raise ValueError(
                f"Calibration {key} run from {low} to {high} but the model's vocabulary has {vocabulary} entries; "
                f"tokenise the text with this model's own tokenizer."
            )
        if positions is not None and 0 < positions < ids.shape[1]:  # XLNet says -1: no limit
            raise ValueError(
                f"Calibration {key} are {ids.shape[1]} tokens long but the model has {positions} positions; cut them."
            )


def _vocabulary(model: Any) -> int | None:
    """Number of token embeddings; None for a model of images or sound, or without such a thing."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (AttributeError, NotImplementedError):  # transformers raises the latter
        return None


def _has_rows(batch: Batch) -> bool:
    """True if the first dimension of every tensor is that of the batch."""
    sizes = {value.shape[0] if value.ndim else None for value in batch.values() if isinstance(value, Tensor)}
    return len(sizes) == 1 and None not in sizes


def _unsplit(batch: Batch) -> Batch:
    for key in _SEQUENCES:
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            others = sorted(k for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] != mask.shape[:1])
            raise ValueError(
                f"Padding cannot be taken out of a calibration batch with {others}, which have no row per sequence; "
                f"pass batches in which {key} is 1 everywhere, for example of one sequence each."
            )
    return batch


def _rows(batch: Batch) -> list[Batch]:
    count = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    rows = []
    for index in range(count):
        row = {k: v[index : index + 1].cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}
        for mask_key, keys in _SEQUENCES.items():
            mask = row.get(mask_key)
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
                real = mask[0].bool()
                row.update({k: row[k][:, real] for k in keys if k in row and row[k].shape[1:2] == mask.shape[1:2]})
        labels = row.get("labels")
        if isinstance(labels, Tensor) and labels.ndim == 2:
            row["labels"] = labels[:, labels[0] != _IGNORED_LABEL]
        if all(v.numel() for k, v in row.items() if isinstance(v, Tensor) and k != "labels"):
            rows.append(row)
    return rows


def _signature(row: Batch) -> tuple[Any, ...]:
    """What rows of one forward have in common: shapes and dtypes of tensors, values of everything else."""
    return tuple(
        (key, tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else (key, repr(value))
        for key, value in sorted(row.items())
    )


def _content(row: Batch) -> tuple[bytes, ...]:
    tensors = [value for _, value in sorted(row.items()) if isinstance(value, Tensor)]
    return tuple(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def _join(rows: list[Batch], size: int | None) -> list[Batch]:
    rows = sorted(rows, key=_content)
    length = max(v.shape[1] if v.ndim > 1 else 1 for v in rows[0].values() if isinstance(v, Tensor))
    size = max(1, TOKENS_PER_FORWARD // length) if size is None else size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [
        {k: torch.cat([row[k] for row in chunk]) if isinstance(v, Tensor) else v for k, v in chunk[0].items()}
        for chunk in chunks
    ]
