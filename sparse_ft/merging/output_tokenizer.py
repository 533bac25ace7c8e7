"""The output's tokenizer: copied from a model, or the base's with the tokens of all models added.

transformers is loaded only where a configuration asks for a tokenizer; copying files needs none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import copy_side_files
from sparse_ft.merging.chat_templates import CHAT_TEMPLATES
from sparse_ft.merging.config import MergeConfig
from sparse_ft.merging.inputs import OpenModel, read_json
from sparse_ft.merging.token_config import TokenizerConfig
from sparse_ft.merging.vocabulary import Tokens, Vocabulary, match_rows
from sparse_ft.naming import did_you_mean

_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerPlan:
    """The output's tokenizer.

    Attributes:
        source: label of the model whose files are copied, and whose ids of special tokens the config takes.
        built: the tokenizer to be saved instead of a copy, if tokens were added.
        vocabulary: rows of the embeddings; None if no tokenizer was asked for.
        chat_template: the template to be written; None keeps the source's.
    """

    source: str
    built: Any = None
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None


def plan_tokenizer(config: MergeConfig, models: Mapping[str, OpenModel]) -> TokenizerPlan:
    """Decide on tokenizer, embedding rows and chat template.

    Raises:
        ValueError: if a tokenizer that is needed is missing or slow, or a token has no source.
    """
    base = config.base_model.text if config.base_model else config.modules[0].slices[0].sources[0].model.text
    template = _chat_template(config.chat_template, models)
    if config.tokenizer is None:
        return TokenizerPlan(base, chat_template=template)
    how = config.tokenizer
    source = base if isinstance(how.source, str) else how.source.text
    loaded = {label: _load(model) for label, model in models.items()}
    tokens = {label: Tokens(t.get_vocab(), models[label].vocabulary_rows or 0) for label, t in loaded.items()}
    added = _added(how, source, tokens)
    built = _with_tokens(loaded[source], added, loaded, source) if added else None
    ids = built.get_vocab() if built is not None else tokens[source].ids
    padding = loaded[source].pad_token or loaded[source].eos_token
    vocabulary = match_rows(
        ids,
        tokens,
        least_rows=tokens[source].rows,
        multiple=how.pad_to_multiple_of or 1,
        padding=padding,
        sources=how.tokens,
    )
    return TokenizerPlan(source, built, vocabulary, template)


def write_tokenizer(how: TokenizerPlan, models: Mapping[str, OpenModel], directory: Path) -> None:
    """Put the tokenizer's files into the output, and remove those of another tokenizer."""
    for path in [*directory.glob("*"), *directory.glob("additional_chat_templates/*")]:
        name = path.relative_to(directory).as_posix()
        if path.is_file() and any(fnmatchcase(name, pattern) for pattern in _FILES):
            path.unlink()
    if how.built is not None:
        how.built.save_pretrained(directory)
    else:
        copy_side_files(tokenizer_directory(models[how.source]), directory)
    if how.chat_template is not None:
        (directory / _TEMPLATE_FILE).write_text(how.chat_template, encoding="utf-8")
        settings = read_json(directory, _SETTINGS_FILE)
        if settings.pop("chat_template", None) is not None:
            (directory / _SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def tokenizer_directory(model: OpenModel) -> Path:
    """Where a model's tokenizer lies: beside an adapter that brought its own embeddings, else beside the model."""
    own = model.input.adapter
    if own is not None and model.adapter and model.adapter.whole and (own / _SETTINGS_FILE).is_file():
        return own
    return model.input.path


def read_template(model: OpenModel) -> str | None:
    """A model's chat template, if it has one."""
    directory = tokenizer_directory(model)
    if (directory / _TEMPLATE_FILE).is_file():
        return (directory / _TEMPLATE_FILE).read_text(encoding="utf-8")
    found = read_json(directory, _SETTINGS_FILE).get("chat_template")
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _chat_template(wanted: str | None, models: Mapping[str, OpenModel]) -> str | None:
    """The template a configuration means: a known name, the most common one of the models, or itself.

    Raises:
        ValueError: if it is neither a known name nor a template.
    """
    if wanted is None:
        return None
    if wanted == "auto":
        found = Counter(filter(None, map(read_template, models.values())))
        return found.most_common(1)[0][0] if found else None
    if wanted in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[wanted]
    if "{" not in wanted:
        raise ValueError(f"Unknown chat_template '{wanted}'. {did_you_mean(wanted, ('auto', *CHAT_TEMPLATES))}")
    return wanted


def _load(model: OpenModel) -> Any:
    from sparse_ft.models import load_tokenizer

    return load_tokenizer(tokenizer_directory(model))


def _added(how: TokenizerConfig, source: str, tokens: Mapping[str, Tokens]) -> list[str]:
    """Tokens the output has and the source's tokenizer has not: in order of the models and of their ids."""
    known = dict.fromkeys(tokens[source].ids)
    before = len(known)
    if how.source == "union":
        for mine in tokens.values():
            known.update(dict.fromkeys(sorted(mine.ids, key=mine.ids.__getitem__)))
    known.update(dict.fromkeys(how.tokens))
    return list(known)[before:]


def _with_tokens(tokenizer: Any, added: list[str], loaded: Mapping[str, Any], source: str) -> Any:
    """A tokenizer with more tokens, special ones as they were in the model they come from.

    Raises:
        ValueError: if it cannot take them.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Adding tokens needs a fast tokenizer, but '{source}' has no tokenizer.json; convert it first."
        )
    from transformers import AddedToken

    special: dict[str, Any] = {}
    for other in loaded.values():
        for token in other.added_tokens_decoder.values():
            special.setdefault(token.content, token)
    tokenizer.add_tokens([special.get(t) or AddedToken(t, normalized=False, special=False) for t in added])
    missing = [token for token in added if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"The tokenizer of '{source}' does not take the token {missing[0]!r}; use tokenizer_source: base."
        )
    return tokenizer
