"""Command lines and YAML recipes become dataclasses: TRL's parser, with errors a user can act on.

A recipe is a flat YAML mapping whose keys are the command-line options; what is typed on the command line wins.
Three things differ from `TrlParser` itself:

* a recipe is found by path or by bare name (`perp/llama_2of4`), also from an installed wheel;
* a value is read as it would be on the command line, so `pattern: 2:4` is the pattern 2:4 and not, as YAML 1.1 has
  it, the number 124 (four seconds past two minutes);
* every error is a `ValueError` of one sentence that names the nearest thing that exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from trl.scripts.utils import TrlParser

from sparse_ft.naming import did_you_mean

__all__ = ["ConfigParser", "find_recipe", "read_recipe", "recipe_roots", "suggest"]

T = TypeVar("T")

_RECIPE_SUFFIXES = (".yaml", ".yml")
# What the newest transformers that runs on Python 3.10 calls an option that recipes set.
_OLDER_NAMES = {"activation_checkpointing": "gradient_checkpointing"}


def suggest(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'nearest'?"` when something close exists, else the list of what does.

    Example:
        >>> suggest("magnitud", ["magnitude", "wanda"])
        " Did you mean 'magnitude'?"
    """
    known = list(known)
    return f" {did_you_mean(name, known, otherwise=None if len(known) <= 24 else 'See --help.')}"


def recipe_roots() -> list[Path]:
    """Directories that hold `perp/*.yaml`: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    return [root for root in (package / "recipes", package.parent / "recipes") if root.is_dir()]


def find_recipe(name: str) -> Path:
    """The recipe file meant by `name`: a path, or a bare name such as `perp/llama_2of4` of a shipped recipe.

    Raises:
        FileNotFoundError: There is no such file; the nearest shipped recipe is named.
    """
    bare = re.sub(r"^(\./)?recipes/", "", name)
    stem = Path(bare).with_suffix("").as_posix() if bare.endswith(_RECIPE_SUFFIXES) else bare
    places = [Path(name)] + [root / (stem + suffix) for root in recipe_roots() for suffix in _RECIPE_SUFFIXES]
    for place in places:
        if place.is_file():
            return place
    shipped = sorted(
        path.relative_to(root).with_suffix("").as_posix() for root in recipe_roots() for path in root.rglob("*.yaml")
    )
    raise FileNotFoundError(f"Recipe {name!r} is neither a file nor a shipped recipe.{suggest(stem, shipped)}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys and values of a flat YAML recipe; scalars stay the text that was written, except null.

    Raises:
        ValueError: The file is not YAML, is not a mapping, or repeats a key.
    """
    import yaml

    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"Recipe {str(path)!r} must be a YAML mapping of 'option: value' lines.")
    loader = yaml.SafeLoader("")
    recipe: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key in recipe:
            raise ValueError(f"Recipe {str(path)!r} gives {key!r} twice; keep one of the two lines.")
        if isinstance(value_node, yaml.SequenceNode):
            recipe[key] = [str(item.value) for item in value_node.value]
        elif isinstance(value_node, yaml.MappingNode):
            recipe[key] = loader.construct_mapping(value_node, deep=True)
        else:
            recipe[key] = None if value_node.tag.endswith(":null") else str(value_node.value)
    return recipe


class ConfigParser(TrlParser):
    """`TrlParser` whose recipes are found by name and whose every complaint is a one-sentence `ValueError`."""

    def __init__(self, dataclass_types: Sequence[type], *, prog: str, description: str) -> None:
        super().__init__(dataclass_types=dataclass_types, prog=prog, description=description, allow_abbrev=False)
        self._overrules: dict[str, tuple[str, Any]] = {}
        for action in self._actions:
            if action.nargs == 0 and action.const is False:  # --no_x, with the help of x
                action.help = f"turn off: {action.help}"
        self.add_argument("--config", metavar="RECIPE", help="YAML recipe: a file, or a shipped name (perp/llama_2of4)")

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving the process."""
        match = re.match(r"argument (?:[^:]*/)?(--[\w-]+)[^:]*: (.*)", message)
        if match is None:
            raise ValueError(f"{message[:1].upper()}{message[1:]}.")
        option, problem = "--" + match[1][2:].replace("-", "_"), match[2]
        choice = re.match(r"invalid choice: '(.*?)' \(choose from (.*)\)", problem)
        if choice is None:
            raise ValueError(f"{option}: {problem.rstrip('.')}.")
        known = choice[2].replace("'", "").split(", ")
        raise ValueError(f"Unknown {option} {choice[1]!r}.{suggest(choice[1], known)}")

    def options(self) -> list[str]:
        """Names of every option, without dashes: the keys a recipe may use."""
        return [action.dest for action in self._actions if action.dest not in ("help", "config")]

    def change(
        self, defaults: Mapping[str, Any], required: Sequence[str], overrules: Mapping[str, str] | None = None
    ) -> None:
        """Give options of somebody else's dataclass other defaults, or make them required.

        `overrules`: an option that is given, and the one it stands in for, whose default is then the dataclass's own.
        Given on the command line it also stands in for the other's line in the recipe.
        """
        self._overrules = {given: (other, self.get_default(other)) for given, other in (overrules or {}).items()}
        self.set_defaults(**defaults)
        for action in self._actions:
            action.required = action.required or action.dest in required
            if action.dest in self._overrules:
                action.help = f"{action.help} Given without --{self._overrules[action.dest][0]}, it decides."

    def parse(self, argv: Sequence[str], check: Callable[[Mapping[str, Any]], None] | None = None) -> tuple[Any, ...]:
        """Dataclasses in the order given at construction, filled from defaults, then the recipe, then `argv`.

        `check` sees the values by option before a dataclass is made of them, which may complain in its own words.

        Raises:
            ValueError: Unknown or missing option, value of the wrong type, unreadable recipe.
            FileNotFoundError: No such recipe.
        """
        remaining, config = _split_config(argv)
        for word in remaining:
            if word.startswith("--") and word.split("=", 1)[0] not in self._option_string_actions:
                self._unknown(word)
        tokens = self._without_overruled([] if config is None else self._recipe_tokens(config), remaining)
        namespace, unknown = self.parse_known_args(tokens + remaining)
        if unknown:
            self._unknown(unknown[0])
        values = vars(namespace)
        if check is not None:
            check(values)
        return tuple(
            dtype(**{field.name: values[field.name] for field in dataclasses.fields(dtype) if field.init})
            for dtype in self.dataclass_types
        )

    def _without_overruled(self, tokens: list[str], typed: Sequence[str]) -> list[str]:
        """The recipe's tokens without those `typed` stands in for; defaults are changed to match."""
        for given, (other, default) in self._overrules.items():
            if _gives(typed, given) and not _gives(typed, other):
                tokens = [token for token in tokens if not _gives([token], other)]
            words = [*tokens, *typed]
            if _gives(words, given) and not _gives(words, other):
                self.set_defaults(**{other: default})
        return tokens

    def _recipe_tokens(self, name: str) -> list[str]:
        """The recipe as command-line tokens, so that both are converted and checked by the same code."""
        path = find_recipe(name)
        known = self.options()
        tokens: list[str] = []
        for key, value in read_recipe(path).items():
            key = key if key in known else _OLDER_NAMES.get(key, key)
            if key not in known:
                raise ValueError(f"Unknown key {key!r} in recipe {str(path)!r}.{suggest(key, known)}")
            if value is None:
                self._forget(key, path)
            elif isinstance(value, list):
                self._check_list(key, value, path)
                tokens += [f"--{key}", *value]
            else:
                tokens.append(f"--{key}={json.dumps(value) if isinstance(value, Mapping) else value}")
        return tokens

    def _check_list(self, key: str, value: Sequence[str], path: Path) -> None:
        """More than one value is for options that take several."""
        several = any(action.dest == key and action.nargs in ("+", "*") for action in self._actions)
        if len(value) > 1 and not several:
            raise ValueError(f"Recipe {str(path)!r} gives {key!r} {len(value)} values, but it takes one; keep one.")

    def _forget(self, key: str, path: Path) -> None:
        """`key: null` in a recipe: the option's value is None unless the command line says otherwise."""
        hints = [get_type_hints(dtype) for dtype in self.dataclass_types]
        if not any(type(None) in get_args(hint[key]) for hint in hints if key in hint):
            raise ValueError(f"Recipe {str(path)!r} gives {key!r} no value; write one, or leave the line out.")
        for action in self._actions:
            if action.dest == key:
                action.default = None

    def _unknown(self, token: str) -> NoReturn:
        if not token.startswith("-"):
            raise ValueError(f"Unexpected argument {token!r}: options are written --name value.")
        name = token.lstrip("-").split("=", 1)[0].replace("-", "_")
        raise ValueError(f"Unknown option {token.split('=', 1)[0]!r}.{_dashed(suggest(name, self.options()))}")


def _gives(words: Sequence[str], option: str) -> bool:
    """Whether `--option` is among the words, spelt with underscores or dashes."""
    return any(w.startswith("--") and w[2:].split("=", 1)[0].replace("-", "_") == option for w in words)


def _dashed(hint: str) -> str:
    return re.sub(r"Did you mean '", "Did you mean '--", hint)


def _split_config(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """`argv` without its `--config`, and the recipe it names."""
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    pre.add_argument("--config", nargs="?", const="")
    found, remaining = pre.parse_known_args(list(argv))
    if found.config == "":
        raise ValueError("--config needs the name of a recipe, for example --config perp/llama_2of4.")
    return remaining, found.config
