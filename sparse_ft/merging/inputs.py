"""The models of a merge, opened: headers, config and adapter, no weight read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.checkpoints.resolve import CONFIG_FILE, member
from sparse_ft.deltas.lora import LoraAdapter, load_lora
from sparse_ft.merging.plan import MergeInput
from sparse_ft.merging.references import ModelRef, locate
from sparse_ft.merging.structure import input_embedding, is_head

_QUANTISED = (".qweight", ".weight_packed", ".absmax", ".SCB", ".quant_state", "_scale_inv", ".qzeros", ".weight_scale")


@dataclass(frozen=True)
class OpenModel:
    """A model that takes part.

    Attributes:
        input: its places.
        reader: its headers.
        config: config.json.
        adapter: the adapter added to it.
    """

    input: MergeInput
    reader: CheckpointReader
    config: Mapping[str, Any]
    adapter: LoraAdapter | None = None

    @property
    def label(self) -> str:
        """How the configuration names it."""
        return self.input.label

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every tensor, those that only the adapter has included."""
        return tuple(dict.fromkeys([*self.reader.names(), *(self.adapter.whole if self.adapter else ())]))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        whole = self.adapter.whole if self.adapter else {}
        return {
            name: self.adapter.shape(name) if self.adapter and name in whole else self.reader.shape(name)
            for name in self.names
        }

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        if self.adapter and name in self.adapter.whole:
            return self.adapter.dtype(name)
        return self.reader.dtype(name)

    @cached_property
    def embedding(self) -> str | None:
        """Name of the token embedding."""
        return input_embedding(self.shapes)

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the token embedding."""
        return self.shapes[self.embedding][0] if self.embedding else None

    @property
    def declared_tied(self) -> bool | None:
        """What config.json says about tied weights; None if nothing."""
        value = self.config.get("tie_word_embeddings")
        return value if isinstance(value, bool) else None

    @cached_property
    def head(self) -> str | None:
        """Name of the language model's head, if it is stored and not a second copy of the embedding."""
        stored = next((name for name in self.names if is_head(name)), None)
        return None if self.declared_tied and self.embedding else stored


def open_models(refs: Iterable[ModelRef]) -> dict[str, OpenModel]:
    """Find and open every model, by label.

    Raises:
        FileNotFoundError: if one cannot be found.
        ValueError: if one is damaged or quantised, or two are the same directory.
    """
    opened: dict[str, OpenModel] = {}
    places: dict[tuple[str, str], str] = {}
    for ref in refs:
        found = locate(ref)
        place = (os.path.realpath(found.path), os.path.realpath(found.adapter) if found.adapter else "")
        if place in places:
            raise ValueError(f"'{ref.text}' and '{places[place]}' are the same model; name it the same way, once.")
        places[place] = ref.text
        opened[ref.text] = _open(found)
    return opened


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model directory, empty if there is no such file.

    Raises:
        ValueError: if it is not valid.
    """
    if not (directory / name).is_file():
        return {}
    try:
        content = json.loads(member(directory, name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{directory / name}' is not valid JSON ({error}); copy it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"'{directory / name}' must hold a JSON object, got {type(content).__name__}; copy it again.")
    return content


def _open(found: MergeInput) -> OpenModel:
    config = read_json(found.path, CONFIG_FILE)
    reader = CheckpointReader(found.path)
    _refuse_quantised(found, config, reader)
    adapter = load_lora(found.adapter) if found.adapter else None
    model = OpenModel(found, reader, config, adapter)
    if adapter is not None:
        adapter.check_base(reader.names())
        for name, target in adapter.items():
            if reader.shape(name) != target.shape:
                raise ValueError(
                    f"The adapter of '{found.label}' is for '{name}' of shape {target.shape} but the model has "
                    f"{reader.shape(name)}; give the base it was trained on."
                )
    return model


def _refuse_quantised(found: MergeInput, config: Mapping[str, Any], reader: CheckpointReader) -> None:
    how = config.get("quantization_config")
    stored = next((name for name in reader.names() if name.endswith(_QUANTISED)), None)
    small = next(
        (
            name
            for name in reader.names()
            if len(reader.shape(name)) > 1 and name.endswith("weight") and reader.dtype(name).itemsize < 2
        ),
        None,
    )
    if how or stored or small:
        kind = how.get("quant_method") if isinstance(how, dict) else None
        reason = f"quantization_config {kind or 'set'}" if how else f"tensor '{stored or small}'"
        raise ValueError(
            f"'{found.label}' is quantised ({reason}) and cannot be merged; give the 16 or 32 bit model it was made of."
        )
