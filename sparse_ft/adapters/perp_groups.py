"""The parts of a PERP method: its name taken apart, and the parameters of each group, found by structure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name
from sparse_ft.naming import check_choice, did_you_mean

ADAPTERS = ("mask_lora", "scale_lora", "lora_prune")
GROUPS = ("biases", "norms", "head", "embeddings")
_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)(?=\.)")  # what PEFT adds to names of its trained copies


@dataclass(frozen=True)
class PerpMethod:
    """What is trained.

    Attributes:
        adapter: one of `ADAPTERS`, or None.
        groups: some of `GROUPS`, in that order.
    """

    adapter: str | None
    groups: tuple[str, ...]

    @property
    def uses_peft(self) -> bool:
        """Whether there is an adapter that can be saved by itself: one of `ADAPTERS`, or the head's LoRA."""
        return self.adapter is not None or "head" in self.groups

    def __str__(self) -> str:
        return "+".join(([self.adapter] if self.adapter else []) + list(self.groups))


def parse_method(text: str) -> PerpMethod:
    """Read `"mask_lora+norms"`; the order does not matter.

    Raises:
        ValueError: for an unknown part (the nearest is named), a part given twice, or two adapters.

    Example:
        >>> parse_method("norms+biases+scale_lora")
        PerpMethod(adapter='scale_lora', groups=('biases', 'norms'))
    """
    parts = [part.strip() for part in text.split("+")]
    known = [*ADAPTERS, *GROUPS]
    if "" in parts and len(parts) > 1:
        raise ValueError(f"Method {text!r} has a + with nothing on one side; name a part there, or leave it out.")
    for part in parts:
        if part not in known:
            raise ValueError(f"Unknown part {part!r} in method {text!r}. {did_you_mean(part, known)}")
        if parts.count(part) > 1:
            raise ValueError(f"Method {text!r} names {part!r} {parts.count(part)} times; once is enough.")
    adapters = [part for part in parts if part in ADAPTERS]
    if len(adapters) > 1:
        raise ValueError(f"Method {text!r} has two adapters, {' and '.join(adapters)}; choose one.")
    return PerpMethod(adapters[0] if adapters else None, tuple(group for group in GROUPS if group in parts))


def group_parameters(model: nn.Module, group: str) -> list[str]:
    """The parameters of a group by canonical name, in the order of the model; empty if it has none.

    For `head` it is the weight that LoRA is put beside. A shared parameter is listed under its first name. `biases` and
    `norms` both hold the biases of norms.

    Args:
        model: a transformers model, plain or prepared.
        group: one of `GROUPS`.

    Example:
        >>> group_parameters(llama, "norms")[-1]
        'model.norm.weight'
    """
    check_choice("group", group, GROUPS)
    if group in ("head", "embeddings"):
        weight = _embedding_weight(model, group)
        return [] if weight is None else [name for name, parameter in own_parameters(model) if parameter is weight][:1]
    if group == "biases":
        return list(dict.fromkeys(name for name, _ in own_parameters(model) if name.rpartition(".")[2] == "bias"))
    members = {id(parameter) for module in _norms(model) for parameter in module.parameters(recurse=False)}
    return list(dict.fromkeys(name for name, parameter in own_parameters(model) if id(parameter) in members))


def resolve_groups(
    model: nn.Module, method: PerpMethod, masks: MaskSet | None, *, warn: bool = True
) -> dict[str, list[str]]:
    """The groups of a method that this model has, with their parameters; changes nothing.

    Warns, unless `warn` is off, of a group that is empty beside others, and of embeddings that are tied to the head.

    Raises:
        ValueError: if there is nothing to train, or the weights of head or embeddings are shared where that is wrong.
    """
    found: dict[str, list[str]] = {}
    missing: list[str] = []
    for group in method.groups:
        named = group_parameters(model, group)
        names = [name for name in named if masks is None or name not in masks]
        if names:
            found[group] = names
        else:
            why = f"has no {group} to train" if not named else f"has no {group} to train that are not pruned"
            missing.append(f"{type(model).__name__} {why}")
    if not found and method.adapter is None:
        raise ValueError(f"{'; '.join(missing)}; use another group, or an adapter such as mask_lora.")
    doubts = [f"{sentence}; the rest of {method} is trained." for sentence in missing]
    for group in ("head", "embeddings"):
        if group in found:
            doubts += _check_shared(model, group, method)
    for doubt in doubts if warn else []:
        warnings.warn(doubt, stacklevel=2)
    return found


def check_rank(model: nn.Module, method: PerpMethod, masks: MaskSet | None, r: int) -> None:
    """Refuse a rank that a weight adapted with it cannot have.

    Args:
        model: a plain model.
        method: whose adapter, or head, is meant; without either every rank passes.
        masks: of the model; wholly pruned tensors get no adapter.
        r: the rank.

    Raises:
        ValueError: if it is below 1, or above the shorter side of an adapted weight.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    if method.adapter is not None and masks is not None:
        shapes = {name: masks.shape(name)[-2:] for name, (kept, _) in masks.counts().items() if kept}
    weight = _embedding_weight(model, "head")
    if "head" in method.groups and weight is not None:
        shapes["the head's weight"] = tuple(weight.shape)
    for name, shape in shapes.items():
        if not 1 <= r <= min(shape):
            raise ValueError(f"r={r} is not between 1 and {min(shape)}, the rank that {name} {shape} can have.")


def _check_shared(model: nn.Module, group: str, method: PerpMethod) -> list[str]:
    """Refuse, or warnings, where training the weight of head or embeddings means training another module's."""
    weight = _embedding_weight(model, group)
    owners = [name for name, module in model.named_modules() if any(p is weight for p in module._parameters.values())]
    if len(owners) < 2:
        return []
    sharers = " and ".join(f"'{name}'" for name in owners)
    if group == "head":
        raise ValueError(
            f"{sharers} share their weight, so merging LoRA into the head would change the input embedding too; untie "
            f"them (config.tie_word_embeddings = False and a copy of the weight for the head), or leave out head."
        )
    if method.uses_peft:
        raise ValueError(
            f"{sharers} share their weight, but with an adapter only a copy for '{owners[0]}' would be trained; untie "
            f"them (config.tie_word_embeddings = False and a copy of the weight for each), or leave out embeddings."
        )
    return [f"{sharers} share their weight, so training the embeddings changes both."]


def _embedding_weight(model: nn.Module, group: str) -> Tensor | None:
    """The weight of the output (`head`) or input (`embeddings`) embedding, of a trained copy the original."""
    getter = getattr(model, "get_output_embeddings" if group == "head" else "get_input_embeddings", None)
    try:
        module = None if getter is None else getter()
    except NotImplementedError:
        return None
    weight: Tensor | None = getattr(getattr(module, "original_module", module), "weight", None)
    return weight


def _norms(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        weight = module._parameters.get("weight")
        if "Norm" in type(module).__name__ and weight is not None and weight.ndim == 1:
            yield module


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters by canonical name, without an adapter's factors."""
    return ((plain_name(name), p) for name, p in model.named_parameters() if ".lora_" not in name)


def plain_name(name: str) -> str:
    """Canonical name, also of PEFT's trained copies."""
    return _COPY.sub("", canonical_name(name))
