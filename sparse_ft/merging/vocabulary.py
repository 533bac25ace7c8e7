"""The output's vocabulary, and for each model the row of its embeddings that each token has there.

A token that a model lacks takes, in this model, the row the configuration names for it, else the base's, else that of
the one model that has it, else the mean of those that have it: so a model that does not know a token has no say in it.
Rows behind the last token (padding to a multiple) repeat the row of the padding token, so their logit never exceeds it.

Only ids and names are handled here; `output_tokenizer.py` reads and writes tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_ft.merging.plan import NO_ROW, ZERO_ROW
from sparse_ft.merging.token_config import TokenSource

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """What one model knows.

    Attributes:
        ids: id of every token.
        rows: rows of its token embedding; a token whose id is not below has none.
    """

    ids: Mapping[str, int]
    rows: int


@dataclass(frozen=True)
class Vocabulary:
    """The output's embedding rows.

    Attributes:
        size: their number.
        rows: for each model by label the row of its own that each output row is, or `NO_ROW`, `ZERO_ROW`. A model
            whose rows are the output's, in order, is left out.
        fallbacks: by label of the model they come from, rows for tokens other models lack, `NO_ROW` for the rest.
        notes: what the user should know.
    """

    size: int
    rows: Mapping[str, Rows]
    fallbacks: tuple[tuple[str, Rows], ...] = ()
    notes: tuple[str, ...] = ()


def match_rows(
    ids: Mapping[str, int],
    models: Mapping[str, Tokens],
    *,
    least_rows: int = 0,
    multiple: int = 1,
    padding: str | None = None,
    sources: Mapping[str, TokenSource] | None = None,
) -> Vocabulary:
    """Match every model's rows to the output's by token.

    Args:
        ids: id of every token of the output.
        models: what each model knows, by label.
        least_rows: rows the output has at least: those of the model its tokenizer comes from, padding included.
        multiple: the number of rows is rounded up to a multiple of it.
        padding: token whose row stands for rows without a token that a model does not have.
        sources: where the rows of some tokens come from.

    Raises:
        ValueError: if a token or model of `sources` does not exist.

    Example:
        >>> match_rows({"a": 0, "b": 1}, {"m": Tokens({"b": 0, "a": 1}, 2)}).rows["m"]
        array([1, 0])
    """
    size = max(least_rows, 1 + max(ids.values(), default=-1))
    size = -(-size // multiple) * multiple
    rows = {label: _rows_of(tokens, ids, size, padding) for label, tokens in models.items()}
    notes = [_note(label, mine, ids) for label, mine in rows.items() if _lacks(mine, ids)]
    notes += [note for label, tokens in models.items() if (note := _left_out(label, tokens, ids)) is not None]
    fallbacks: dict[str, Rows] = {}
    for token, source in (sources or {}).items():
        _follow(token, source, ids, models, rows, fallbacks)
    kept = {label: mine for label, mine in rows.items() if not _is_identity(mine, models[label].rows)}
    return Vocabulary(size, kept, tuple(fallbacks.items()), tuple(notes))


def leading_rows(count: int) -> Rows:
    """The first rows, in order."""
    return np.arange(count, dtype=np.int64)


def _rows_of(tokens: Tokens, ids: Mapping[str, int], size: int, padding: str | None) -> Rows:
    """Row of each output row in one model."""
    rows = np.full(size, NO_ROW, dtype=np.int64)
    free = np.ones(size, dtype=np.bool_)
    for token, place in ids.items():
        free[place] = False
        own = tokens.ids.get(token, NO_ROW)
        rows[place] = own if own < tokens.rows else NO_ROW
    taken = np.zeros(max(size, tokens.rows), dtype=np.bool_)
    taken[[own for own in tokens.ids.values() if own < len(taken)]] = True
    same = free & ~taken[:size] & (np.arange(size) < tokens.rows)
    rows[same] = np.flatnonzero(same)
    stand_in = tokens.ids.get(padding, 0) if padding is not None else 0
    rows[free & ~same] = stand_in if stand_in < tokens.rows else 0
    return rows


def _follow(
    token: str,
    source: TokenSource,
    ids: Mapping[str, int],
    models: Mapping[str, Tokens],
    rows: Mapping[str, Rows],
    fallbacks: dict[str, Rows],
) -> None:
    """Take the row of one token from where the configuration says."""
    if token not in ids:
        raise ValueError(f"tokenizer.tokens has '{token}', which the output's vocabulary does not; check its spelling.")
    place = ids[token]
    for mine in rows.values():
        if source.force or mine[place] == NO_ROW:
            mine[place] = ZERO_ROW if source.model is None else NO_ROW
    if source.model is None:
        return
    label = source.model.text
    tokens = models[label]
    wanted: Any = token if source.token is None else source.token
    row = wanted if isinstance(wanted, int) else tokens.ids.get(wanted, NO_ROW)
    if not 0 <= row < tokens.rows:
        raise ValueError(f"tokenizer.tokens['{token}'] takes {wanted!r} of '{label}', which does not have it.")
    fallbacks.setdefault(label, np.full(len(next(iter(rows.values()))), NO_ROW, dtype=np.int64))[place] = row


def _is_identity(rows: Rows, own: int) -> bool:
    return len(rows) == own and bool((rows == np.arange(own)).all())


def _lacks(rows: Rows, ids: Mapping[str, int]) -> int:
    places: Sequence[int] = list(ids.values())
    return int((rows[places] == NO_ROW).sum())


def _note(label: str, rows: Rows, ids: Mapping[str, int]) -> str:
    first = next(token for token, place in ids.items() if rows[place] == NO_ROW)
    return (
        f"'{label}' lacks {_lacks(rows, ids)} of {len(ids)} tokens, the first {first!r}: other models give their rows."
    )


def _left_out(label: str, tokens: Tokens, ids: Mapping[str, int]) -> str | None:
    """What is said of rows that no output row takes."""
    lost = [token for token, row in tokens.ids.items() if token not in ids and row < tokens.rows]
    if not lost:
        return None
    return f"'{label}' has {len(lost)} tokens that the output lacks, the first {lost[0]!r}: their rows are left out."
