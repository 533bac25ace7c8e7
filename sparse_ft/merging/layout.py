"""The tensors of the output by name, each with its slice, its position among the layers, and its name in every model.

Tensors before the layers belong to the first slice, those behind them to the last, both at position t = 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sparse_ft.merging.config import MergeConfig, Module, OutputSlice, SliceSource
from sparse_ft.merging.families import FAMILIES
from sparse_ft.merging.inputs import OpenModel
from sparse_ft.merging.settings import layer_position
from sparse_ft.merging.structure import Layer, is_head, layer_of, main_stack, stacks_of, stands_before_layers

Models = Mapping[str, OpenModel]


@dataclass(frozen=True)
class Slot:
    """One tensor of the output.

    Attributes:
        name: its name in the output.
        module: the part of the configuration it belongs to.
        part: its slice, the base among the sources where the method needs one.
        t: position of its layer in the slice.
        layer: where layers are numbered anew, its layer, counted from the beginning of the slice.
    """

    name: str
    module: Module
    part: OutputSlice
    t: float
    layer: Layer | None = None

    @property
    def is_head(self) -> bool:
        """Whether this is the language model's head."""
        return is_head(self.name)

    def name_in(self, source: SliceSource, models: Models) -> str | None:
        """The tensor's name in one model, or None; the token embedding stands in for a head that is tied to it."""
        model = models[source.model.text]
        if self.is_head and model.head is None:
            return model.embedding
        if self.layer is None or source.layers is None:
            return self.name if self.name in model.shapes else None
        name = self.layer.name(source.layers[0] + self.layer.index)
        return name if name in model.shapes else None


def base_of(part: OutputSlice, config: MergeConfig) -> str | None:
    """Label of a slice's base."""
    base = part.base_model or config.base_model
    return base.text if base else None


def slots_of(config: MergeConfig, models: Models) -> tuple[list[Slot], tuple[tuple[str, int], ...]]:
    """Every tensor of the output, in order.

    Returns:
        The tensors and, if layers are numbered anew, for each of them the model and number of its first source.

    Raises:
        ValueError: if a range of layers does not exist, or a module's name fits no tensor.
    """
    slots: list[Slot] = []
    origins: tuple[tuple[str, int], ...] = ()
    modules = [_with_base(module, config) for module in config.modules]
    for module in modules:
        names = [name for name in _names(module, models) if _module_of(name, modules) is module]
        if not names:
            raise ValueError(f"No tensor has '{module.name}' in its name; name a module by a part of the names.")
        if module.whole:
            slots += _whole(module, names)
        elif origins:
            raise ValueError("Only one of the modules may have 'slices'; give the others 'models'.")
        else:
            sliced, origins = _sliced(module, names, models)
            slots += sliced
    return slots, origins


def _names(module: Module, models: Models) -> list[str]:
    """Names of all tensors of a module's models, the first model's order first; no head if all are tied."""
    used = [models[source.model.text] for source in _sources(module)]
    names = dict.fromkeys(name for model in used for name in model.names)
    tied = all(model.head is None for model in used)
    return [name for name in names if not (tied and is_head(name) and any(model.embedding for model in used))]


def _sources(module: Module) -> list[SliceSource]:
    found = {source.model.text: source for part in module.slices for source in part.sources}
    return list(found.values())


def _module_of(name: str, modules: list[Module]) -> Module:
    """The module of a tensor: the first whose name is a part of the tensor's, else the first of all."""
    parts = name.split(".")
    return next((module for module in modules if module.name in parts), modules[0])


def _whole(module: Module, names: list[str]) -> Iterator[Slot]:
    """All layers, under their own numbers."""
    (part,) = module.slices
    counts = stacks_of(names)
    for name in names:
        layer = layer_of(name)
        t = layer_position(layer.index, counts[layer.stack]) if layer else 0.0
        yield Slot(name, module, part, t)


def _sliced(module: Module, names: list[str], models: Models) -> tuple[list[Slot], tuple[tuple[str, int], ...]]:
    """Layers put together anew: what stands before them, the slices in order, what stands behind them."""
    first = models[module.slices[0].sources[0].model.text]
    stack = main_stack(first.names, first.config, first.label)
    outside = [name for name in names if (layer := layer_of(name)) is None or layer.stack != stack]
    before = [Slot(name, module, module.slices[0], 0.0) for name in outside if stands_before_layers(name)]
    after = [Slot(name, module, module.slices[-1], 0.0) for name in outside if not stands_before_layers(name)]
    layers: list[Slot] = []
    origins: list[tuple[str, int]] = []
    for part in module.slices:
        ranges = [_checked_range(source, stack, models) for source in part.sources]
        inside = {source.model.text: _inside(models[source.model.text].names, stack) for source in part.sources}
        count = ranges[0][1] - ranges[0][0]
        for i in range(count):
            rests = dict.fromkeys(
                rest for source, (start, _) in zip(part.sources, ranges, strict=True)
                for rest in inside[source.model.text].get(start + i, ())
            )  # fmt: skip
            t, place = layer_position(i, count), len(origins)
            layers += [Slot(f"{stack}.{place}.{rest}", module, part, t, Layer(stack, i, rest)) for rest in rests]
            origins.append((part.sources[0].model.text, ranges[0][0] + i))
    return [*before, *layers, *after], tuple(origins)


def _inside(names: Iterable[str], stack: str) -> dict[int, list[str]]:
    """Names inside each layer of a stack."""
    found: dict[int, list[str]] = {}
    for layer in filter(None, map(layer_of, names)):
        if layer.stack == stack:
            found.setdefault(layer.index, []).append(layer.rest)
    return found


def _checked_range(source: SliceSource, stack: str, models: Models) -> tuple[int, int]:
    label = source.model.text
    count = stacks_of(models[label].names).get(stack, 0)
    assert source.layers is not None
    if source.layers[1] > count:
        raise ValueError(f"layer_range {list(source.layers)} of '{label}' ends behind its {count} layers.")
    return source.layers


def _with_base(module: Module, config: MergeConfig) -> Module:
    """The base among the sources of every slice, if the method needs one and it is not listed."""
    if not FAMILIES[config.method].needs_base:
        return module
    return replace(module, slices=tuple(_slice_with_base(part, config, module.whole) for part in module.slices))


def _slice_with_base(part: OutputSlice, config: MergeConfig, whole: bool) -> OutputSlice:
    base = part.base_model or config.base_model
    assert base is not None
    if base.text in {source.model.text for source in part.sources}:
        return part
    ranges = {source.layers for source in part.sources}
    if not whole and len(ranges) > 1:
        raise ValueError(
            f"A slice lists sources of different layers ({sorted(filter(None, ranges))}) and not the base "
            f"'{base.text}'; list the base with the layer_range that is meant."
        )
    return replace(part, sources=(*part.sources, SliceSource(base, ranges.pop())))
