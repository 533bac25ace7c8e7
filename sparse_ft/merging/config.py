"""mergekit's YAML as frozen dataclasses, checked: the reader's only, nothing is opened or downloaded here.

Beside mergekit's keys there are `compat: mergekit` (its formulas where they differ from the papers'), `seed`,
`preserve_masks` (what happens to the zeros of sparse models) and `trim: model` (ties cuts each delta as one vector).
All are optional, so a file for mergekit is read unchanged.

Example:
    >>> config = parse_config(read_yaml("merge_method: linear\\nmodels: [{model: a, parameters: {weight: 1}}]", "x"))
    >>> config.method, config.modules[0].models[0].model.text
    ('linear', 'a')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sparse_ft.merging.families import FAMILIES, PARAMETERS, REFUSED
from sparse_ft.merging.plan import Compatibility
from sparse_ft.merging.preserving import PreserveMasks, parse_preserve_masks
from sparse_ft.merging.references import ModelRef
from sparse_ft.merging.settings import Settings, parse_setting
from sparse_ft.merging.token_config import TokenizerConfig, parse_tokenizer
from sparse_ft.merging.yaml_text import read_yaml
from sparse_ft.naming import did_you_mean

__all__ = ["MergeConfig", "Module", "OutputSlice", "SliceSource", "parse_config", "read_yaml"]

_KEYS = (
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "parameters", "compat", "seed", "preserve_masks", "trim",
)  # fmt: skip
#: What ties takes the largest entries of: each tensor of a delta, or the delta as one vector.
Trim = Literal["tensor", "model"]
_DTYPES = {
    name: getattr(torch, dtype)
    for dtype, names in {
        "float32": ("float32", "fp32", "float"),
        "float16": ("float16", "fp16", "half"),
        "bfloat16": ("bfloat16", "bf16"),
        "float64": ("float64", "double"),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class SliceSource:
    """One model of an output slice.

    Attributes:
        model: which.
        layers: [first, last) of its layers; None for all.
        parameters: settings of this model here.
    """

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output and the models they are made of."""

    sources: tuple[SliceSource, ...]
    parameters: Settings = field(default_factory=dict)
    base_model: ModelRef | None = None


@dataclass(frozen=True)
class Module:
    """A part of the output model: all of it (`name` None), or the tensors under one name.

    Attributes:
        name: a component of the tensors' names.
        slices: the output's layers, in order. A list of `models` is one slice over all layers.
        whole: it was given as `models`, so the base may be added to it.
        parameters: settings of the part.
    """

    name: str | None
    slices: tuple[OutputSlice, ...]
    whole: bool
    parameters: Settings = field(default_factory=dict)

    @property
    def models(self) -> tuple[SliceSource, ...]:
        """The sources of a module given as `models`."""
        return self.slices[0].sources


@dataclass(frozen=True)
class MergeConfig:
    """A whole merge as configured; see the YAML's keys."""

    method: str
    modules: tuple[Module, ...]
    base_model: ModelRef | None = None
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    parameters: Settings = field(default_factory=dict)
    compat: Compatibility = "paper"
    seed: int = 0
    preserve_masks: PreserveMasks = field(default_factory=PreserveMasks)
    trim: Trim = "tensor"
    notes: tuple[str, ...] = ()

    def references(self) -> tuple[ModelRef, ...]:
        """Every model named, base first, each once."""
        found = [self.base_model] if self.base_model else []
        for module in self.modules:
            for part in module.slices:
                found += [part.base_model] if part.base_model else []
                found += [source.model for source in part.sources]
        found += list(self.tokenizer.models()) if self.tokenizer else []
        return tuple({ref.text: ref for ref in found}.values())


def parse_config(content: Mapping[str, Any]) -> MergeConfig:
    """Check a configuration and put it into dataclasses.

    Args:
        content: what `read_yaml` returned.

    Raises:
        ValueError: naming the key, what it has and what it should have.
    """
    _check_keys(content, _KEYS, "The configuration")
    method = _method(content.get("merge_method"))
    notes: list[str] = []
    base = None if content.get("base_model") is None else ModelRef.parse(content["base_model"], "base_model")
    modules = _modules(content, notes)
    config = MergeConfig(
        method=method,
        modules=modules,
        base_model=base,
        dtype=_dtype(content, "dtype"),
        out_dtype=_dtype(content, "out_dtype"),
        tokenizer=parse_tokenizer(content),
        chat_template=_text(content, "chat_template"),
        parameters=_settings(content.get("parameters"), "parameters"),
        compat=_compat(content.get("compat", "paper")),
        seed=_seed(content.get("seed", 0)),
        preserve_masks=parse_preserve_masks(content.get("preserve_masks")),
        trim=_trim(content.get("trim", "tensor")),
        notes=tuple(notes),
    )
    _check_inputs(config)
    return config


def _check_keys(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key in known:
            continue
        if key in PARAMETERS and "parameters" in known:
            raise ValueError(f"{where} has the unknown key '{key}'; it is a parameter, put it under 'parameters:'.")
        raise ValueError(f"{where} has the unknown key '{key}'. {did_you_mean(str(key), known)}")


def _method(name: object) -> str:
    if name is None:
        raise ValueError(f"The configuration has no 'merge_method'; give one of {', '.join(FAMILIES)}.")
    if name in REFUSED:
        raise ValueError(f"merge_method '{name}' is not supported; {REFUSED[str(name)]}.")
    if name not in FAMILIES:
        raise ValueError(f"Unknown merge_method '{name}'. {did_you_mean(str(name), FAMILIES)}")
    return str(name)


def _modules(content: Mapping[str, Any], notes: list[str]) -> tuple[Module, ...]:
    given = [key for key in ("models", "slices", "modules") if content.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"Exactly one of 'models', 'slices' and 'modules' is needed, got {' and '.join(given) or 'none'}."
        )
    if given != ["modules"]:
        return (_module(None, content, "", notes),)
    modules = content["modules"]
    if not isinstance(modules, Mapping) or not modules:
        raise ValueError("'modules' must be a mapping from a module's name to its 'models' or 'slices'.")
    parts = []
    for name, entry in modules.items():
        _check_keys(_mapping(entry, f"modules.{name}"), ("models", "slices", "parameters"), f"modules.{name}")
        if (entry.get("models") is None) == (entry.get("slices") is None):
            raise ValueError(f"modules.{name} needs exactly one of 'models' and 'slices'.")
        part = _module(str(name), entry, f"modules.{name}.", notes)
        settings = _settings(entry.get("parameters"), f"modules.{name}.parameters")
        parts.append(Module(part.name, part.slices, part.whole, settings))
    return tuple(parts)


def _module(name: str | None, content: Mapping[str, Any], where: str, notes: list[str]) -> Module:
    if content.get("models") is not None:
        entries = _list(content["models"], f"{where}models")
        sources = tuple(_model(entry, f"{where}models[{i}]") for i, entry in enumerate(entries))
        slices: tuple[OutputSlice, ...] = (OutputSlice(sources),)
    else:
        entries = _list(content["slices"], f"{where}slices")
        slices = tuple(_slice(entry, f"{where}slices[{i}]", notes) for i, entry in enumerate(entries))
    for i, part in enumerate(slices):
        _check_duplicates(part, f"{where}models" if content.get("models") is not None else f"{where}slices[{i}]")
    return Module(name, slices, content.get("models") is not None)


def _check_duplicates(part: OutputSlice, where: str) -> None:
    names = [source.model.text for source in part.sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where} lists the model '{name}' {names.count(name)} times; list it once.")


def _model(entry: object, where: str) -> SliceSource:
    if isinstance(entry, str):
        return SliceSource(ModelRef.parse(entry, where))
    content = _mapping(entry, where)
    _check_keys(content, ("model", "parameters"), where)
    if content.get("model") is None:
        raise ValueError(f"{where} names no model; add 'model: ...'.")
    settings = _settings(content.get("parameters"), f"{where}.parameters")
    return SliceSource(ModelRef.parse(content["model"], f"{where}.model"), None, settings)


def _slice(entry: object, where: str, notes: list[str]) -> OutputSlice:
    content = _mapping(entry, where)
    _check_keys(content, ("sources", "parameters", "base_model", "residual_weight"), where)
    if content.get("residual_weight") is not None:
        notes.append(f"{where}.residual_weight changes nothing, as in mergekit.")
    sources = []
    for i, source in enumerate(_list(content.get("sources"), f"{where}.sources")):
        place = f"{where}.sources[{i}]"
        source = _mapping(source, place)
        _check_keys(source, ("model", "layer_range", "parameters"), place)
        if source.get("model") is None:
            raise ValueError(f"{place} names no model; add 'model: ...'.")
        layers = _layers(source.get("layer_range"), f"{place}.layer_range")
        settings = _settings(source.get("parameters"), f"{place}.parameters")
        sources.append(SliceSource(ModelRef.parse(source["model"], f"{place}.model"), layers, settings))
    counts = {source.layers[1] - source.layers[0] for source in sources if source.layers}
    if len(counts) > 1:
        spans = ", ".join(f"'{s.model.text}' {list(s.layers)}" for s in sources if s.layers)
        raise ValueError(f"{where}: all sources must span equally many layers, got {spans}.")
    base = content.get("base_model")
    settings = _settings(content.get("parameters"), f"{where}.parameters")
    return OutputSlice(tuple(sources), settings, ModelRef.parse(base, f"{where}.base_model") if base else None)


def _layers(raw: object, where: str) -> tuple[int, int]:
    whole = isinstance(raw, list) and len(raw) == 2 and all(type(value) is int for value in raw)
    if not whole:
        raise ValueError(f"{where} must be two layer numbers [first, one past the last], got {raw!r:.60}.")
    assert isinstance(raw, list)
    if not 0 <= raw[0] < raw[1]:
        raise ValueError(f"{where} is {raw}; its first number must be at least 0 and below the second.")
    return raw[0], raw[1]


def _settings(raw: object, where: str) -> Settings:
    if raw is None:
        return {}
    for name in _mapping(raw, where):
        if name not in PARAMETERS:
            raise ValueError(f"{where} has the unknown parameter '{name}'. {did_you_mean(str(name), PARAMETERS)}")
    return {name: parse_setting(value, f"{where}.{name}") for name, value in _mapping(raw, where).items()}


def _check_inputs(config: MergeConfig) -> None:
    family = FAMILIES[config.method]
    for module in config.modules:
        for part in module.slices:
            base = part.base_model or config.base_model
            if family.needs_base and base is None:
                raise ValueError(
                    f"merge_method '{config.method}' works on differences to a base; add 'base_model: ...'."
                )
            others = [source for source in part.sources if base is None or source.model.text != base.text]
            if family.models is not None and len(others) != family.models:
                raise ValueError(
                    f"merge_method '{config.method}' takes the base and {family.models} other model, "
                    f"got {len(others)} others; list one."
                )
            if not (others if family.needs_base else part.sources):
                raise ValueError("There is no model to merge besides the base; add one.")


def _mapping(raw: object, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where} must be a mapping of 'key: value' lines, got {raw!r:.60}.")
    return raw


def _list(raw: object, where: str) -> list[Any]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"{where} must be a list with at least one entry, got {raw!r:.60}.")
    return raw


def _dtype(content: Mapping[str, Any], key: str) -> torch.dtype | None:
    name = content.get(key)
    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"Unknown {key} '{name}'. {did_you_mean(str(name), _DTYPES)}")
    return _DTYPES[name]


def _text(content: Mapping[str, Any], key: str) -> str | None:
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"'{key}' must be text, got {value!r:.60}.")
    return value


def _compat(value: object) -> Compatibility:
    if value not in ("paper", "mergekit"):
        raise ValueError(
            f"Unknown compat {value!r}; give 'mergekit' for its formulas, or leave it out for the papers'."
        )
    return "mergekit" if value == "mergekit" else "paper"


def _trim(value: object) -> Trim:
    if value not in ("tensor", "model"):
        raise ValueError(f"Unknown trim {value!r}; give 'model' to cut each delta as one vector, or leave it out.")
    return "model" if value == "model" else "tensor"


def _seed(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"'seed' must be a whole number, got {value!r:.60}.")
    return value
