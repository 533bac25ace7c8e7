"""Batches of tokens to calibrate a pruning method on.

    batches = calibration_batches("wikitext", tokenizer, samples=128, sequence_length=2048)
    masks = sparse_ft.prune(model, method="wanda", pattern="2:4", calibration=batches)

As in the pruning papers, samples are random windows of a long text, so none is padded.

Source: Frantar & Alistarh 2023, "SparseGPT" (arXiv 2301.00774), section 4: 128 windows of the model's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_ft.data.text import load_text
from sparse_ft.data.tokens import default_length, random_windows, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Of a larger corpus only the beginning is read: a web crawl need not be downloaded for 128 windows.
MAX_CHARACTERS = 16_000_000
_PIECE_CHARACTERS = 65_536


class TooFewSequencesError(ValueError):
    """More calibration windows are asked for than a text has different ones.

    Attributes:
        found: number of windows, one from each token on.
    """

    def __init__(self, source: str, found: int, length: int, samples: int) -> None:
        super().__init__(
            f"{source} has {found} different sequences of {length} tokens but {samples} samples are asked for; lower "
            f"samples or sequence_length, or give a longer text."
        )
        self.found = found


def calibration_batches(
    dataset: str | Path | Iterable[Tensor | Mapping[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    split: str = "train",
    config: str | None = None,
    text_field: str = "text",
) -> list[dict[str, Tensor]]:
    """Random windows of a text, or the user's own batches, as keyword arguments for the model.

    Args:
        dataset: what `load_text` reads (the first 16 million characters of it), or token batches: int `(b, T)` tensors,
            or mappings with `input_ids` and whatever else the model takes. Batches are used as they are, and the
            settings below do not apply; without an `attention_mask` they are taken to have no padding.
        tokenizer: needed for text.
        samples: number of windows; at most as many as the text has without overlap.
        sequence_length: tokens per window; by default the tokenizer's model length, at most 2048.
        seed: of the windows' places.
        batch_size: windows per batch; the last batch may have fewer.
        split: of the dataset.
        config: of a `datasets` dataset.
        text_field: column that holds the text.

    Returns:
        Batches with `input_ids` and `attention_mask`, int64 `(b, T)`.

    Raises:
        FileNotFoundError: if there is no such dataset.
        ValueError: if the text is empty, binary or shorter than a window, or a batch is not one of token ids.
        TooFewSequencesError: a ValueError, if the text has fewer different windows than `samples`.
    """
    if not isinstance(dataset, (str, Path)):
        return [_checked(batch, number) for number, batch in enumerate(_non_empty(dataset), 1)]
    if tokenizer is None:
        raise ValueError(f"Calibration on the text '{dataset}' needs a tokenizer; pass the model's.")
    if batch_size < 1:
        raise ValueError(f"The calibration batch size must be at least 1, got {batch_size}.")
    text = load_text(dataset, split=split, config=config, text_field=text_field, max_characters=MAX_CHARACTERS)
    ids = tokenize(text, tokenizer, piece_characters=_PIECE_CHARACTERS)
    length = default_length(tokenizer) if sequence_length is None else sequence_length
    source = f"The calibration text '{dataset}'"
    windows = len(ids) - length + 1
    if 0 < length and 0 < windows < samples:
        raise TooFewSequencesError(source, windows, length, samples)
    drawn = random_windows(ids, count=samples, length=length, seed=seed, source=source)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in drawn.split(batch_size)]


def _non_empty(batches: Iterable[Tensor | Mapping[str, Tensor]]) -> list[Tensor | Mapping[str, Tensor]]:
    if isinstance(batches, (Tensor, Mapping)):
        kind = type(batches).__name__
        raise ValueError(f"Calibration batches must be a list, got one {kind}; put it in a list.")
    found = list(batches)
    if not found:
        raise ValueError("The list of calibration batches is empty; give at least one batch of token ids.")
    return found


def _checked(batch: Tensor | Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    whole = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    ids = whole.get("input_ids")
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"Calibration batch {number} has no tensor input_ids (got {type(batch).__name__}); "
            f"give int tensors of shape (batch, tokens), mappings with input_ids, or the name of a text."
        )
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"Calibration batch {number} has input_ids of shape {tuple(ids.shape)} and {ids.dtype}; "
            f"they must be token ids of shape (batch, tokens)."
        )
    mask = whole.setdefault("attention_mask", torch.ones_like(ids))
    if mask.shape[:1] != ids.shape[:1] or mask.shape[-1:] != ids.shape[-1:]:
        raise ValueError(
            f"Calibration batch {number} has input_ids of shape {tuple(ids.shape)} but an attention_mask of "
            f"{tuple(mask.shape)}; they must agree."
        )
    return whole
