"""Read YAML as its writer meant it: no key twice, and `2:4` is a pattern, not the number 124."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without silently lost keys and without numbers to the base of 60."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if name in seen and name != "<<":
            raise ValueError(f"The key '{name}' stands twice in line {key.start_mark.line + 1}; keep one of the two.")
        seen.add(name)
    loader.flatten_mapping(node)
    return {loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
            for key, value in node.value}  # fmt: skip


def _number(loader: _Loader, node: yaml.ScalarNode) -> object:
    if ":" in node.value:
        return str(node.value)
    kind = node.tag.rsplit(":", 1)[-1]
    return loader.construct_yaml_int(node) if kind == "int" else loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """A YAML mapping as plain Python.

    Args:
        text: the YAML.
        source: its name, for errors.

    Raises:
        ValueError: if it is not YAML, no mapping, or a key stands twice.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} must be a YAML mapping with 'merge_method: ...', got {type(content).__name__}.")
    return content


def read_yaml_file(path: str | Path) -> tuple[dict[str, Any], str]:
    """A YAML file's content as plain Python, and its text.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a directory, not UTF-8, or as `read_yaml`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"'{path}' is a directory; give the YAML file of the merge.")
    if not path.is_file():
        raise FileNotFoundError(f"No merge configuration '{path}'; give a YAML file as mergekit reads it.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not a text file in UTF-8 ({error}).") from None
    return read_yaml(text, f"'{path}'"), text
