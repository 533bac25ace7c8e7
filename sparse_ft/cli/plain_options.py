"""Options of verbs that need no model library: the same dataclasses and complaints as `cli.parser`, without TRL.

TRL's parser imports transformers, which costs seconds; a merge or a delta of files needs neither. Arguments without
dashes fill the fields named as such, in order.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from sparse_ft.naming import check_choice, did_you_mean

__all__ = ["dtype_called", "option", "parse_plain"]

T = TypeVar("T")


def option(default: Any, help: str, *, choices: Sequence[str] = ()) -> Any:
    """A dataclass field with a default and the text `--help` shows."""
    metadata = {"help": help, "choices": tuple(choices)} if choices else {"help": help}
    return dataclasses.field(default=default, metadata=metadata)


def parse_plain(
    argv: Sequence[str],
    group: type[T],
    *,
    verb: str,
    description: str,
    words: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Fill a dataclass from the words after the verb.

    Args:
        argv: words after the verb.
        group: its fields are the options; a field without a default has to be given.
        verb: name for `--help`.
        description: first paragraph of `--help`.
        words: fields that arguments without dashes fill, in order; they are options as well.
        aliases: other names of options.

    Raises:
        ValueError: for an unknown or missing option, or a value of the wrong type.

    Example:
        >>> parse_plain(["a.yaml"], MergeArguments, verb="merge", description="Merge.", words=["yaml"]).yaml
        'a.yaml'
    """
    parser = _Parser(prog=f"sparse-ft {verb}", description=description, allow_abbrev=False)
    hints = get_type_hints(group)
    fields = {entry.name: entry for entry in dataclasses.fields(group)}  # type: ignore[arg-type]
    for name in words:
        parser.add_argument(f"_{name}", nargs="?", metavar=name.upper(), help=fields[name].metadata["help"])
    for name, entry in fields.items():
        _add(parser, name, hints[name], entry.metadata, [a for a, full in (aliases or {}).items() if full == name])
    typed = {name: value for name, value in vars(parser.parse_args(list(argv))).items() if value is not None}
    values = {name: typed[name] for name in fields if name in typed}
    for name in words:
        if f"_{name}" in typed and name in values:
            raise ValueError(f"{name} is given twice, as '{typed[f'_{name}']}' and as '{values[name]}'; keep one.")
        values |= {name: typed[f"_{name}"]} if f"_{name}" in typed else {}
    for name, entry in fields.items():
        if name not in values and entry.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing; {entry.metadata['help']}.")
    return group(**values)


def dtype_called(name: str) -> Any:
    """The torch dtype of an option, None for auto.

    Raises:
        ValueError: if it is none of float32, bfloat16, float16.
    """
    import torch

    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known[check_choice("dtype", name, known)]


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors of one sentence."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown is None:
            match = re.match(r"argument (?:[^:]*/)?(-*[\w-]+)[^:]*: (.*)", message)
            raise ValueError(f"{match[1]}: {match[2].rstrip('.')}." if match else f"{message.capitalize()}.")
        word = unknown[1]
        if not word.startswith("-"):
            raise ValueError(f"Unexpected argument '{word}'; options are written --name value.")
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        spelt = word.split("=")[0].replace("-", "_").replace("__", "--", 1)
        raise ValueError(f"Unknown option '{word}'. {did_you_mean(spelt, known, otherwise='See --help.')}")


def _add(
    parser: argparse.ArgumentParser, name: str, kind: Any, metadata: Mapping[str, Any], aliases: list[str]
) -> None:
    spellings = [
        f"--{spelling}" for one in (name, *aliases) for spelling in dict.fromkeys((one, one.replace("_", "-")))
    ]
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind is bool:
        flags = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(*spellings, dest=name, default=None, help=metadata["help"], **flags)  # type: ignore[arg-type]
        return
    choices = metadata.get("choices")
    parser.add_argument(*spellings, dest=name, type=kind, choices=choices, default=None, help=metadata["help"])
