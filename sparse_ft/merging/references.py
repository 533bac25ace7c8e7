"""How a merge configuration names a model, `path_or_repo[@revision][+lora[@revision]]`, and the directory meant.

Example:
    >>> ref = ModelRef.parse("org/base@main+org/lora")
    >>> ref.model, ref.revision, ref.adapter
    ('org/base', 'main', 'org/lora')
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sparse_ft.checkpoints import resolve_checkpoint
from sparse_ft.checkpoints.resolve import (
    ADAPTER_CONFIG_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_INDEX_FILE,
    WEIGHTS_FILE,
    download_adapter,
    weights_file,
)
from sparse_ft.merging.plan import MergeInput
from sparse_ft.naming import did_you_mean


@dataclass(frozen=True)
class ModelRef:
    """A model as the configuration names it.

    Attributes:
        text: as written; how errors and reports call it.
        model: local directory or Hub name.
        revision: of a Hub name.
        adapter: local directory or Hub name of a LoRA adapter added to the model first.
        adapter_revision: of its Hub name.
    """

    text: str
    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, raw: object, where: str = "A model") -> ModelRef:
        """Read a name, or mergekit's mapping `{model: {path, revision}, lora: {path, revision}}`.

        Raises:
            ValueError: if it is neither.
        """
        if isinstance(raw, Mapping):
            return _from_mapping(raw, where)
        if not isinstance(raw, str) or not raw.strip():
            raise ValueError(f"{where} must be a directory or a Hub name, got {raw!r:.60}.")
        text = raw.strip()
        model, _, adapter = (text, "", "") if Path(text).is_dir() else text.partition("+")
        if "+" in adapter and not Path(adapter).is_dir():
            raise ValueError(f"{where} '{text}' names more than one adapter; add one, and list the other as a model.")
        if not model or ("+" in text and not adapter and not Path(text).is_dir()):
            raise ValueError(f"{where} '{text}' has nothing on one side of '+'; write model+adapter.")
        (name, revision), (lora, lora_revision) = _split_revision(model), _split_revision(adapter)
        return cls(text, name, revision, lora or None, lora_revision)


def locate(ref: ModelRef) -> MergeInput:
    """Find a model's files, on disk or on the Hub.

    A directory that holds a LoRA adapter and no model stands for the adapter on the base its config names.

    Raises:
        FileNotFoundError: if there is no such directory or repository, or it lacks config or weights.
        ValueError: if it holds only pickled weights, or an adapter without a known base.
    """
    if ref.adapter is None and _holds_adapter_only(Path(ref.model)):
        base = _base_of_adapter(Path(ref.model), ref.text)
        return MergeInput(ref.text, _checkpoint(base, None), Path(ref.model))
    path = _checkpoint(ref.model, ref.revision)
    return MergeInput(ref.text, path, _locate_adapter(ref) if ref.adapter else None)


def _checkpoint(name: str, revision: str | None) -> Path:
    """A directory with safetensors weights: pickled ones cannot be read piece by piece."""
    path = resolve_checkpoint(name, revision=revision, needs_weights=False)
    pickled = [file for file in (PICKLE_FILE, PICKLE_INDEX_FILE) if (path / file).exists()]
    if pickled and not any((path / file).exists() for file in (WEIGHTS_FILE, INDEX_FILE)):
        raise ValueError(f"'{name}' holds only pickled weights ({pickled[0]}); convert them to safetensors first.")
    weights_file(path)
    return path


def _locate_adapter(ref: ModelRef) -> Path:
    name = str(ref.adapter)
    path = Path(name)
    if not path.is_dir():
        path = download_adapter(name, revision=ref.adapter_revision)
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        raise FileNotFoundError(f"'{name}' in '{ref.text}' has no {ADAPTER_CONFIG_FILE}; give a directory PEFT wrote.")
    return path


def _holds_adapter_only(path: Path) -> bool:
    return (path / ADAPTER_CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file()


def _base_of_adapter(path: Path, text: str) -> str:
    try:
        content = json.loads((path / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path / ADAPTER_CONFIG_FILE}' is not valid JSON ({error}); copy it again.") from None
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"'{text}' is an adapter that names no base model; write base+{text}.")
    return base


def _from_mapping(raw: Mapping[object, object], where: str) -> ModelRef:
    parts: dict[str, tuple[str, str | None]] = {}
    for key, value in raw.items():
        if key == "override_architecture" and value is not None:
            raise ValueError(f"{where}.override_architecture is not supported: layers are found from tensor names.")
        if key not in ("model", "lora", "override_architecture"):
            raise ValueError(f"{where} has the unknown key '{key}'. {did_you_mean(str(key), ('model', 'lora'))}")
        if value is None:
            continue
        if isinstance(value, str):
            parts[str(key)] = _split_revision(value)
        elif isinstance(value, Mapping) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
            parts[str(key)] = (value["path"], None if value.get("revision") is None else str(value["revision"]))
        else:
            raise ValueError(f"{where}.{key} must be a name or have 'path' and 'revision', got {value!r:.60}.")
    if "model" not in parts:
        raise ValueError(f"{where} names no model; add 'model: ...'.")
    model, adapter = parts["model"], parts.get("lora", (None, None))
    text = "+".join(f"{name}@{rev}" if rev else name for name, rev in (model, adapter) if name)
    return ModelRef(text, *model, *adapter)


def _split_revision(text: str) -> tuple[str, str | None]:
    if "@" not in text or Path(text).is_dir():
        return text, None
    name, _, revision = text.rpartition("@")
    return name, revision
