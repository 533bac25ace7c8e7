"""From a configuration and the headers of its models to a `MergePlan`: names, settings, rows, dtypes, files.

Tensors are matched by name; with `slices` the number of the layer is exchanged. What only one model has is copied, what
one lacks the others merge without it, and every such decision is noted.

    planned = plan_merge(config, open_models(config.references()))
    execute(planned.plan, directory)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from sparse_ft.checkpoints.header import tensor_bytes
from sparse_ft.checkpoints.resolve import WEIGHTS_FILE
from sparse_ft.deltas.scope import is_table
from sparse_ft.merging.config import MergeConfig, SliceSource
from sparse_ft.merging.families import FAMILIES, REQUIRED, check_value, check_window, default_of
from sparse_ft.merging.inputs import OpenModel
from sparse_ft.merging.layout import Slot, base_of, slots_of
from sparse_ft.merging.plan import MergePlan, Source, TensorPlan
from sparse_ft.merging.settings import resolve
from sparse_ft.merging.structure import is_vocabulary
from sparse_ft.merging.vocabulary import Vocabulary, leading_rows

#: Size of an output file, as transformers has it.
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Planned:
    """A plan and what else follows from the configuration.

    Attributes:
        plan: what the engine does.
        reference: the model whose config, dtype and order of tensors the output has.
        base: index of the base among the plan's models, or None.
        layer_origins: if layers are numbered anew, for each the label and layer of its first source; else empty.
        tied: whether the output's head is its token embedding.
        rows: rows of the output's token embedding.
        notes: what the user should know; warnings begin with "warning: ".
    """

    plan: MergePlan
    reference: OpenModel
    base: int | None
    layer_origins: tuple[tuple[str, int], ...]
    tied: bool
    rows: int | None
    notes: tuple[str, ...]


@dataclass
class _Work:
    """What is needed for every tensor."""

    config: MergeConfig
    models: Mapping[str, OpenModel]
    index: Mapping[str, int]
    reference: OpenModel
    vocabulary: Vocabulary | None
    truncate: bool
    rows: int | None
    copied: dict[str, list[str]] = field(default_factory=dict)
    lacking: dict[str, list[str]] = field(default_factory=dict)


def plan_merge(
    config: MergeConfig,
    models: Mapping[str, OpenModel],
    *,
    vocabulary: Vocabulary | None = None,
    truncate_embeddings: bool = False,
    max_shard_size: int = SHARD_BYTES,
) -> Planned:
    """Decide what every tensor of the output is made of.

    Args:
        config: the configuration.
        models: every model it names, opened, by label.
        vocabulary: rows of the output's embeddings; None takes them as they are.
        truncate_embeddings: without a vocabulary, embeddings of different length are cut to the shortest.
        max_shard_size: bytes of an output file at most, unless one tensor alone is larger.

    Raises:
        ValueError: if the models do not fit each other, or a setting is missing or out of range.
    """
    base = config.base_model.text if config.base_model else None
    reference = models[base or config.modules[0].slices[0].sources[0].model.text]
    index = {label: i for i, label in enumerate(models)}
    rows = _output_rows(models, vocabulary, truncate_embeddings, reference)
    work = _Work(config, models, index, reference, vocabulary, truncate_embeddings, rows)
    slots, origins = slots_of(config, models)
    tied = reference.embedding is not None and not any(slot.is_head for slot in slots)
    tensors = tuple(tensor for slot in slots if (tensor := _tensor(work, slot)) is not None)
    if not tensors:
        raise ValueError("The models have no tensor in common, so there is nothing to merge.")
    plan = MergePlan(
        config.method,
        tuple(model.input for model in models.values()),
        tensors,
        shard_layout(tensors, max_shard_size),
        config.seed,
        config.compat,
    )
    return Planned(plan, reference, index.get(base or ""), origins, tied, rows, (*config.notes, *_notes(work)))


def shard_layout(tensors: Sequence[TensorPlan], most: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Files of at most `most` bytes, filled in order, named as transformers does."""
    groups: list[list[str]] = [[]]
    size = 0
    for tensor in tensors:
        own = tensor_bytes(tensor.dtype, tensor.shape)
        if groups[-1] and size + own > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor.name)
        size += own
    if len(groups) == 1:
        return ((WEIGHTS_FILE, tuple(groups[0])),)
    stem, suffix = Path(WEIGHTS_FILE).stem, Path(WEIGHTS_FILE).suffix
    return tuple((f"{stem}-{i:05d}-of-{len(groups):05d}{suffix}", tuple(g)) for i, g in enumerate(groups, 1))


def _tensor(work: _Work, slot: Slot) -> TensorPlan | None:
    """One output tensor, or None if no model has it."""
    base = base_of(slot.part, work.config)
    needs_base = FAMILIES[work.config.method].needs_base
    found = {s.model.text: name for s in slot.part.sources if (name := slot.name_in(s, work.models)) is not None}
    if not found:
        return None
    lacking = [s.model.text for s in slot.part.sources if s.model.text not in found]
    first = base if base in found else next(iter(found))
    assert first is not None
    shape, dtype = _shape(work, slot, found, first), _dtype(work, first, found[first])
    only = _to_copy(work, slot, found, base if needs_base else None, first)
    if only is not None:
        if len(slot.part.sources) > 1 and lacking:
            work.copied.setdefault(only, []).append(slot.name)
        source = Source(work.index[only], found[only], {}, _rows(work, only, found[only]))
        return TensorPlan(slot.name, shape, dtype, None, (), {}, source, _fallbacks(work, only, found[only]))
    for label in lacking:
        work.lacking.setdefault(label, []).append(slot.name)
    others = [s for s in slot.part.sources if s.model.text in found and not (needs_base and s.model.text == base)]
    sources = tuple(_source(work, slot, s, found[s.model.text]) for s in others)
    own = Source(work.index[base], found[base], {}, _rows(work, base, found[base])) if needs_base and base else None
    fallbacks = _fallbacks(work, first, found[first])
    return TensorPlan(slot.name, shape, dtype, own, sources, _of_tensor(work, slot), None, fallbacks)


def _to_copy(work: _Work, slot: Slot, found: Mapping[str, str], base: str | None, first: str) -> str | None:
    """The model a tensor is copied from, or None if it is merged.

    Raises:
        ValueError: if a method that needs the base's tensor lacks it and several models have one.
    """
    if not work.models[first].dtype(found[first]).is_floating_point or is_table(found[first]):
        return first
    if len(found) == 1 and (len(slot.part.sources) > 1 or base is not None):
        return first
    if base is not None and base not in found:
        labels = " and ".join(f"'{label}'" for label in found)
        raise ValueError(
            f"Tensor '{slot.name}' is in {labels} but not in the base '{base}', so there is no difference to merge; "
            f"give the base those models come from, or use merge_method 'linear'."
        )
    return None


def _source(work: _Work, slot: Slot, source: SliceSource, name: str) -> Source:
    label = source.model.text
    levels = (source.parameters, slot.part.parameters, slot.module.parameters, work.config.parameters)
    settings: dict[str, float] = {}
    for parameter in FAMILIES[work.config.method].of_models:
        value = resolve(parameter, levels, name, slot.t)
        value = default_of(work.config.method, parameter, work.config.compat) if value is None else value
        where = f"Parameter '{parameter}' of '{label}' for tensor '{name}'"
        if value is REQUIRED:
            raise ValueError(f"{where} is not given, and '{work.config.method}' has no default; add it.")
        settings[parameter] = float(check_value(parameter, value, where))
    if "epsilon" in settings:
        check_window(settings["density"], settings["epsilon"], f"'{label}', tensor '{name}'")
    return Source(work.index[label], name, settings, _rows(work, label, name))


def _of_tensor(work: _Work, slot: Slot) -> dict[str, Any]:
    levels = (slot.part.parameters, slot.module.parameters, work.config.parameters)
    settings: dict[str, Any] = {}
    for parameter in FAMILIES[work.config.method].of_tensor:
        value = resolve(parameter, levels, slot.name, slot.t)
        value = default_of(work.config.method, parameter, work.config.compat) if value is None else value
        where = f"Parameter '{parameter}' for tensor '{slot.name}'"
        if value is REQUIRED:
            raise ValueError(f"{where} is not given, and '{work.config.method}' has no default; add it.")
        settings[parameter] = check_value(parameter, value, where)
    return settings


def _shape(work: _Work, slot: Slot, found: Mapping[str, str], first: str) -> tuple[int, ...]:
    """The output's shape, after a look at every model's.

    Raises:
        ValueError: if they differ.
    """
    shape = work.models[first].shapes[found[first]]
    for label, name in found.items():
        other = work.models[label].shapes[name]
        vocabulary = _counts_tokens(work, label, name) and _counts_tokens(work, first, found[first])
        if other == shape or (vocabulary and other[1:] == shape[1:]):
            continue
        raise ValueError(
            f"Tensor '{slot.name}' has shape {shape} in '{first}' but {other} in '{label}'; "
            f"only models of one architecture and size can be merged."
        )
    return (work.rows, *shape[1:]) if work.rows is not None and _counts_tokens(work, first, found[first]) else shape


def _dtype(work: _Work, label: str, name: str) -> torch.dtype:
    stored = work.models[label].dtype(name)
    if not stored.is_floating_point:
        return stored
    return work.config.out_dtype or work.config.dtype or stored


def _counts_tokens(work: _Work, label: str, name: str) -> bool:
    model = work.models[label]
    return is_vocabulary(name, model.shapes[name], model.vocabulary_rows)


def _rows(work: _Work, label: str, name: str) -> NDArray[Any] | None:
    """Rows of a source, None where the tensor is taken as it is."""
    if not _counts_tokens(work, label, name):
        return None
    if work.vocabulary is not None:
        return work.vocabulary.rows.get(label)
    rows = work.models[label].vocabulary_rows
    return leading_rows(work.rows) if work.rows is not None and work.rows != rows else None


def _fallbacks(work: _Work, label: str, name: str) -> tuple[Source, ...]:
    """Sources of single tokens, as the configuration names them."""
    if work.vocabulary is None or not _counts_tokens(work, label, name):
        return ()
    found = []
    for other, rows in work.vocabulary.fallbacks:
        model = work.models[other]
        theirs = name if name in model.shapes else model.embedding
        if theirs is not None:
            found.append(Source(work.index[other], theirs, {}, rows))
    return tuple(found)


def _output_rows(
    models: Mapping[str, OpenModel], vocabulary: Vocabulary | None, truncate: bool, reference: OpenModel
) -> int | None:
    """Rows of the output's embeddings.

    Raises:
        ValueError: if the models have different numbers of rows and nothing says what to do.
    """
    if vocabulary is not None:
        return vocabulary.size
    counts = {label: m.vocabulary_rows for label, m in models.items() if m.vocabulary_rows is not None}
    if len(set(counts.values())) <= 1:
        return reference.vocabulary_rows
    if truncate:
        return min(counts.values())
    (low, high) = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    raise ValueError(
        f"'{low}' has {counts[low]} embedding rows but '{high}' has {counts[high]}: give tokenizer_source (base or "
        f"union) to match rows by token, or --truncate_embeddings to keep the first {counts[low]}."
    )


def _notes(work: _Work) -> list[str]:
    notes = []
    for label, names in work.copied.items():
        notes.append(f"Copied from '{label}', the only model that has it: {_listing(names)}.")
    for label, names in work.lacking.items():
        notes.append(f"'{label}' lacks {_listing(names)}: merged without it.")
    family = FAMILIES[work.config.method]
    known = {*family.of_models, *family.of_tensor, "int8_mask"}
    given = {name for settings in _all_settings(work.config) for name in settings}
    for name in sorted(given - known):
        notes.append(f"Parameter '{name}' is not used by '{work.config.method}'.")
    if work.truncate and work.vocabulary is None:
        for label, model in work.models.items():
            extra = (model.vocabulary_rows or 0) - (work.rows or 0)
            if extra > 0:
                notes.append(f"warning: the last {extra} embedding rows of '{label}' are left out.")
    return notes


def _all_settings(config: MergeConfig) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = [config.parameters]
    for module in config.modules:
        found.append(module.parameters)
        for part in module.slices:
            found += [part.parameters, *(source.parameters for source in part.sources)]
    return found


def _listing(names: Sequence[str]) -> str:
    return f"'{names[0]}'" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
