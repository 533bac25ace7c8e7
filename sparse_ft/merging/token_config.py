"""What a merge configuration says about the output's vocabulary: `tokenizer_source`, or `tokenizer` in detail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.merging.references import ModelRef
from sparse_ft.naming import did_you_mean

_KEYS = ("source", "tokens", "pad_to_multiple_of")


@dataclass(frozen=True)
class TokenSource:
    """Where one token's embedding comes from.

    Attributes:
        model: the model whose row is taken; None for zeros.
        token: the token in that model, if it is another one; text, or its id.
        force: also for models that have the token.
    """

    model: ModelRef | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """The output's vocabulary.

    Attributes:
        source: `"union"`, `"base"`, or the model whose tokenizer is used.
        tokens: where the embeddings of some tokens come from.
        pad_to_multiple_of: the number of embedding rows is rounded up to a multiple of it.
    """

    source: ModelRef | str = "base"
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    def models(self) -> Iterator[ModelRef]:
        """Models it names."""
        if isinstance(self.source, ModelRef):
            yield self.source
        yield from (entry.model for entry in self.tokens.values() if entry.model is not None)


def parse_tokenizer(content: Mapping[str, Any]) -> TokenizerConfig | None:
    """`tokenizer_source` or `tokenizer` of a configuration; None if it has neither.

    Raises:
        ValueError: if it has both, or one is malformed.
    """
    simple, full = content.get("tokenizer_source"), content.get("tokenizer")
    if simple is not None and full is not None:
        raise ValueError("Both 'tokenizer_source' and 'tokenizer' are given; keep one of the two.")
    if simple is not None:
        return TokenizerConfig(_source(simple, "tokenizer_source"))
    if full is None:
        return None
    if not isinstance(full, Mapping):
        raise ValueError(f"'tokenizer' must be a mapping with 'source', got {full!r:.60}; or use 'tokenizer_source'.")
    for key in full:
        if key not in _KEYS:
            raise ValueError(f"'tokenizer' has the unknown key '{key}'. {did_you_mean(str(key), _KEYS)}")
    multiple = full.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise ValueError(f"tokenizer.pad_to_multiple_of must be a whole number above 0, got {multiple!r}.")
    tokens = full.get("tokens") or {}
    if not isinstance(tokens, Mapping):
        raise ValueError(f"tokenizer.tokens must be a mapping from tokens to sources, got {tokens!r:.60}.")
    sources = {str(token): _token(entry, f"tokenizer.tokens['{token}']") for token, entry in tokens.items()}
    return TokenizerConfig(_source(full.get("source") or "union", "tokenizer.source"), sources, multiple)


def _source(raw: object, where: str) -> ModelRef | str:
    return raw if raw in ("union", "base") and isinstance(raw, str) else ModelRef.parse(raw, where)


def _token(raw: object, where: str) -> TokenSource:
    content: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {"source": raw}
    for key in content:
        if key not in ("source", "force"):
            raise ValueError(f"{where} has the unknown key '{key}'. {did_you_mean(str(key), ('source', 'force'))}")
    force, source = content.get("force", False), content.get("source")
    if not isinstance(force, bool):
        raise ValueError(f"{where}.force must be true or false, got {force!r}.")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or (kind is None and "model" in source and "token" not in source):
        return TokenSource(ModelRef.parse(source, f"{where}.source"), None, force)
    if kind == "zero":
        return TokenSource(None, None, force)
    if kind != "model_token":
        raise ValueError(f"{where}.source has kind {kind!r}; known are 'zero' and 'model_token'.")
    given = [source[key] for key in ("token", "token_id") if source.get(key) is not None]
    if len(given) != 1 or not isinstance(given[0], (str, int)) or source.get("model") is None:
        raise ValueError(f"{where}.source of kind model_token needs 'model' and one of 'token' and 'token_id'.")
    return TokenSource(ModelRef.parse(source["model"], f"{where}.source.model"), given[0], force)
