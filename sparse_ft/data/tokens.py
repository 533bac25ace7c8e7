"""From text to windows of token ids: tokenised once as a whole, then cut, so that no window is padded.

ids = tokenize(load_text("wikitext", split="test"), tokenizer)     # (T,)
windows(ids, 256)                                                  # (N, 256), one after the other
random_windows(ids, count=128, length=256, seed=0)                 # (128, 256), for calibration
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LINE_END = re.compile(r"\n(?= ?\S)")
_PIECES_PER_CALL = 16
_LONGEST_DEFAULT = 2048


def tokenize(
    text: str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool = False,
    piece_characters: int | None = None,
) -> Tensor:
    """Token ids of a whole text, in one run.

    Several documents are joined by a blank line. No special token is added anywhere, except one BOS at the very start
    on request. The text may be of any length; the tokenizer's warning about its model's length does not apply.

    Args:
        text: text, or documents.
        tokenizer: a transformers tokenizer.
        add_bos: put the tokenizer's BOS token in front.
        piece_characters: tokenise pieces of about this many characters, cut at line ends, instead of all at once: less
            memory and several times faster on long texts. Byte-level tokenizers (GPT-2, Llama 3, Qwen) give the same
            ids; those that put a space in front of a text (Llama 2, T5) one token more per piece.

    Returns:
        int64 `(T,)`.

    Raises:
        ValueError: if `add_bos` is set and the tokenizer has no BOS token.
    """
    if add_bos and tokenizer.bos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no BOS token; leave out add_bos.")
    whole = text if isinstance(text, str) else "\n\n".join(text)
    pieces = [whole] if piece_characters is None else _cut(whole, piece_characters)
    parts = [torch.tensor([tokenizer.bos_token_id] if add_bos else [], dtype=torch.int64)]
    for first in range(0, len(pieces), _PIECES_PER_CALL):
        encoded = tokenizer(
            pieces[first : first + _PIECES_PER_CALL],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        parts.extend(torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"])
    return torch.cat(parts)


def windows(ids: Tensor, length: int, *, source: str = "The text") -> Tensor:
    """Cut token ids into consecutive windows; what is left at the end is dropped.

    Args:
        ids: int64 `(T,)`.
        length: tokens per window.
        source: where the text came from, for the error.

    Returns:
        int64 `(T // length, length)`, a view of `ids`.

    Raises:
        ValueError: if the text is shorter than one window.
    """
    _check_length(ids, length, source)
    count = len(ids) // length
    return ids[: count * length].view(count, length)


def random_windows(ids: Tensor, *, count: int, length: int, seed: int, source: str = "The text") -> Tensor:
    """Windows at random places of a text.

    The starts are drawn without replacement among all `T - length + 1`; windows may overlap, none occurs twice. Only
    when the text has fewer than `count` windows are starts drawn with replacement. With the same seed a larger `count`
    gives the same windows first, then more.

    Args:
        ids: int64 `(T,)`.
        count: number of windows.
        length: tokens per window.
        seed: of the generator that the starts are drawn from.
        source: where the text came from, for the error.

    Returns:
        int64 `(count, length)`.

    Raises:
        ValueError: if `count` is not positive, or the text is shorter than one window.
    """
    _check_length(ids, length, source)
    if count < 1:
        raise ValueError(f"The number of windows must be at least 1, got {count}.")
    places = len(ids) - length + 1
    generator = torch.Generator().manual_seed(seed)
    if count <= places:
        starts = torch.randperm(places, generator=generator)[:count]
    else:
        starts = torch.randint(places, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(length)]


def default_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """The sequence length to use when none was given: what the tokenizer says its model takes, at most 2048."""
    return min(int(tokenizer.model_max_length), _LONGEST_DEFAULT)


def _check_length(ids: Tensor, length: int, source: str) -> None:
    if length < 1:
        raise ValueError(f"The sequence length must be at least 1 token, got {length}.")
    if ids.ndim != 1:
        raise ValueError(f"Token ids must have shape (tokens,), got {tuple(ids.shape)}; tokenise one text at a time.")
    if len(ids) < length:
        raise ValueError(
            f"{source} has {len(ids)} tokens, too few for one window of {length}; "
            f"give a longer text or a smaller --sequence_length."
        )


def _cut(text: str, size: int) -> list[str]:
    """Pieces of at least `size` characters that end after a line break with text behind it."""
    if size < 1:
        raise ValueError(f"piece_characters must be at least 1, got {size}.")
    pieces, start = [], 0
    while start < len(text):
        end = _LINE_END.search(text, start + size)
        stop = end.end() if end else len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces
