"""Training data for a causal language model: a text packed into full blocks, for `Trainer`.

    Trainer(model=model, train_dataset=training_dataset("wikitext", tokenizer, sequence_length=256), ...)

Every block is full, so there is no padding and every token is trained on. The tail that fills no block is dropped.

Limits: the whole text is held in memory as token ids (16 bytes a token with the labels); for a corpus larger than that,
give Trainer a dataset of your own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_ft.data.text import load_text
from sparse_ft.data.tokens import default_length, tokenize, windows

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

_PIECE_CHARACTERS = 65_536


def training_dataset(
    dataset: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    sequence_length: int | None = None,
    config: str | None = None,
    text_field: str = "text",
) -> datasets.Dataset:
    """Pack a text into blocks with labels.

    Args:
        dataset: what `load_text` reads; rows are joined by a blank line.
        tokenizer: the model's.
        split: of the dataset.
        sequence_length: tokens per block; by default the tokenizer's model length, at most 2048.
        config: of a `datasets` dataset.
        text_field: column that holds the text.

    Returns:
        Map-style dataset of torch tensors: `input_ids` and `labels`, equal, int64 `(sequence_length,)`. Models shift
        the labels themselves.

    Raises:
        FileNotFoundError: if there is no such dataset.
        ValueError: if the text is empty, binary or shorter than one block.
    """
    import datasets

    text = load_text(dataset, split=split, config=config, text_field=text_field)
    ids = tokenize(text, tokenizer, piece_characters=_PIECE_CHARACTERS)
    length = default_length(tokenizer) if sequence_length is None else sequence_length
    blocks = windows(ids, length, source=f"The training text '{dataset}'").numpy()
    return datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def tokens_digest(blocks: datasets.Dataset) -> str:
    """SHA-256 over the token ids of packed blocks, in order: two texts of one name are told apart.

    Args:
        blocks: from `training_dataset`.
    """
    sha = hashlib.sha256()
    for batch in blocks.with_format("arrow").iter(batch_size=1024):
        ids = batch.column("input_ids").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sha.update(ids.astype("<i8").tobytes())  # `datasets` stores them in fewer bits
    return sha.hexdigest()
