"""Which tensors a masked adapter works on, checked before anything of the model is touched.

`prepare` turns `target_modules="pruned"` into the modules that have a mask, and checks that each target is a layer that
the method can handle and that masks, weights, ranks and, for a saved adapter, digests fit together.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from sparse_ft.adapters.base_digest import base_digest, bits_digest
from sparse_ft.adapters.masked_config import PRUNED, MaskedLoraConfig
from sparse_ft.adapters.masked_layer import MaskedLayer, MaskedLinear
from sparse_ft.adapters.quantised import check_biases, stored_shape, verify_zeros
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import canonical_name, find_targets, named_weights

LayerFor = Callable[..., type[MaskedLayer] | None]  # see `MaskedLoraModel.layer_for`


def prepare(config: MaskedLoraConfig, model: nn.Module, layer_for: LayerFor) -> None:
    """Resolve the targets of a config, check them, and record masks and digests of just these tensors in the config.

    Args:
        config: changed in place, as PEFT does: `target_modules`, `target_parameters`, `dense_modules`, `masks` and the
            digests.
        model: the model without `PeftModel` around it; it may have adapters already.
        layer_for: (module, weight, dense=...) to the class that adapts it, None if it cannot be adapted.

    Raises:
        ValueError: if a target has no mask, a wrong shape, an unsupported layer, shared weights or too small a rank, if
            adapters are merged, or if masks or weights are not those a saved adapter was made for.
        FileNotFoundError: if a saved adapter's masks cannot be found.
        RuntimeError: if a pruned weight is not zero.
    """
    parts = _Parts(model, config.METHOD, layer_for)
    _check_modules_to_save(config)
    dense = _dense_modules(config, parts)
    names = _masked_names(config) if config.target_modules == PRUNED else _listed_names(config, model, parts, dense)
    masks = config.masks if config.masks is not None else _find_masks(config, model, names)
    for name in names:
        _check_mask(name, masks, parts)
        parts.check(name, dense=False)
        _check_rank(config, name, masks.shape(name))
    for module in dense:
        if f"{module}.weight" in masks:
            raise ValueError(f"'{module}' has a mask, so it is no dense module; leave it out of dense_modules.")
        parts.check(f"{module}.weight", dense=True)
        _check_rank(config, f"{module}.weight", parts.shape(f"{module}.weight"))
    masks = _only(masks, names)
    _check_biases(config, names, dense, parts)
    if any(len(masks.shape(name)) == 3 for name in names) and config.lora_dropout:
        stacks = next(name for name in names if len(masks.shape(name)) == 3)
        raise ValueError(
            f"lora_dropout is {config.lora_dropout:g}, which does not work on fused experts such as '{stacks}'; "
            f"set it to 0, or name target_modules without them."
        )
    # first whether a saved adapter's masks and base are these: zeros that are missing would only be a symptom
    config.record(masks, bits_digest(masks), base_digest(masks, model, dense))
    verify_zeros(masks, model)
    _set_targets(config, masks, names, dense)


def _set_targets(config: MaskedLoraConfig, masks: MaskSet, names: list[str], dense: list[str]) -> None:
    """Tell PEFT what to adapt: names it matches, and stacks by parameter."""
    if config.target_modules == PRUNED:
        config.target_modules = {name.removesuffix(".weight") for name in names if len(masks.shape(name)) == 2}
    new = [name for name in dense if not config.target_modules or not check_target_module_exists(config, name)]
    if new and isinstance(config.target_modules, str):
        config.target_modules = "|".join([f"(?:{config.target_modules})", *(re.escape(name) for name in new)])
    elif new:
        config.target_modules = {*(config.target_modules or ()), *new}
    config.dense_modules = dense or None
    config.target_parameters = [name for name in names if len(masks.shape(name)) == 3] or None


class _Parts:
    """A model taken apart: plain modules and adapted layers by canonical name, and weights that modules share."""

    def __init__(self, model: nn.Module, method: str, layer_for: LayerFor) -> None:
        self.method, self.layer_for = method, layer_for
        self.modules: dict[str, nn.Module] = {}
        self.adapted: dict[str, BaseTunerLayer] = {}
        owners: Counter[int] = Counter()
        for key, module in model.named_modules():
            name = canonical_name(f"{key}.x")[:-2]
            self.modules[name] = module  # of an adapted layer the innermost, the base layer, comes last
            if isinstance(module, BaseTunerLayer):
                self.adapted[name] = module
            owners.update(id(parameter) for parameter in module.parameters(recurse=False))
        self.shared = {parameter for parameter, count in owners.items() if count > 1}

    def outside_adapters(self) -> Iterator[str]:
        """Names of modules that are not the inside of an adapted layer."""
        inside = tuple(f"{name}." for name in self.adapted)
        return (name for name in self.modules if name and not name.startswith(inside))

    def layer_of(self, name: str, *, dense: bool = False) -> type[MaskedLayer] | None:
        """The class of layer for a parameter, None if it cannot be adapted."""
        owner, _, attribute = name.rpartition(".")
        weight = getattr(self.modules[owner], attribute, None)
        return self.layer_for(self.modules[owner], weight, dense=dense) if isinstance(weight, Tensor) else None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter in the layout of its mask."""
        owner, _, attribute = name.rpartition(".")
        return stored_shape(self.modules[owner], getattr(self.modules[owner], attribute))

    def check(self, name: str, *, dense: bool) -> None:
        """Raise one sentence if the parameter cannot be adapted."""
        owner, _, attribute = name.rpartition(".")
        module, layer, wanted = self.modules[owner], self.adapted.get(owner), self.layer_of(name, dense=dense)
        weight = getattr(module, attribute, None)
        if wanted is None or weight is None:
            raise ValueError(
                f"{self.method} does not support '{owner}' of type {type(module).__name__} with "
                f"{getattr(weight, 'dtype', 'no')} weights, only floating point nn.Linear, Conv1D, fused experts "
                f"and linears of bitsandbytes; load the model in one of these forms, or exclude the module."
            )
        if weight.is_meta:
            raise ValueError(f"The weight of '{owner}' is on the meta device; load it into memory before adapting it.")
        if id(weight) in self.shared:
            raise ValueError(
                f"'{name}' is shared with another module, which merging the adapter would change too; untie the "
                f"weights, or leave '{owner}' out."
            )
        if layer is not None and type(layer) is not wanted:
            raise ValueError(
                f"'{owner}' has an adapter of another method ({type(layer).__name__}); merge or delete that one first."
            )
        if layer is not None and layer.merged:
            raise ValueError(f"Adapter {layer.merged_adapters} is merged into '{owner}'; unmerge it before adding one.")


def _dense_modules(config: MaskedLoraConfig, parts: _Parts) -> list[str]:
    """Full names of what `dense_modules` selects, a name or the end of one, in order."""
    modules = set()
    for wanted in config.dense_modules or ():
        found = [name for name in parts.outside_adapters() if name == wanted or name.endswith(f".{wanted}")]
        if not found:
            raise ValueError(f"The model has no module '{wanted}', which dense_modules names; leave it out.")
        modules.update(found)
    for module in modules:
        if _is_excluded(config, module):
            raise ValueError(
                f"'{module}' is in dense_modules and in exclude_modules or modules_to_save; name it in one of them."
            )
    return sorted(modules)


def _check_modules_to_save(config: MaskedLoraConfig) -> None:
    """Raise one sentence if one of them holds a masked tensor, whose trained copy nothing would mask."""
    alone = SimpleNamespace(modules_to_save=config.modules_to_save, target_modules=None, target_parameters=[])
    for name in config.masks or () if config.modules_to_save else ():
        if check_target_module_exists(alone, name.rpartition(".")[0]) is not False:
            raise ValueError(
                f"modules_to_save={sorted(config.modules_to_save or ())} would train a copy of the pruned '{name}' "
                f"that loses its zeros; name modules without masks, or train it with MaskCallback."
            )


def _check_biases(config: MaskedLoraConfig, names: list[str], dense: list[str], parts: _Parts) -> None:
    """Raise one sentence if the forward of a layer that is not ours would spoil the biases that are to be trained."""
    owners = {name.rpartition(".")[0]: parts.layer_of(name) or MaskedLayer for name in names}
    adapted = {*owners, *dense} if config.bias != "none" else set()
    trained = adapted if config.bias != "all" else set(parts.modules)
    ours = {module for module, layer in owners.items() if issubclass(layer, MaskedLinear)}
    check_biases({module: parts.modules[module] for module in sorted(trained - ours)})


def _check_rank(config: MaskedLoraConfig, name: str, shape: tuple[int, ...]) -> None:
    """Raise one sentence if the rank exceeds what a matrix of this shape can have."""
    key = name if len(shape) == 3 else name.removesuffix(".weight")
    r, limit = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r), min(shape[-2:])
    if r > limit:
        raise ValueError(
            f"r={r} is more than the rank {limit} that '{key}' of shape {shape} can have; lower r, or give this module "
            f"its own in rank_pattern."
        )


def _masked_names(config: MaskedLoraConfig) -> list[str]:
    """What `"pruned"` means: every tensor with a mask that keeps something, unless excluded."""
    if config.masks is None:
        raise ValueError(
            f"{type(config).__name__}(target_modules='pruned') needs the masks; pass masks=MaskSet.from_zeros(model), "
            f"or what sparse_ft.prune returned."
        )
    counts = config.masks.counts()
    empty = [name for name, (kept, _) in counts.items() if kept == 0]
    if empty:
        warnings.warn(f"{len(empty)} wholly pruned tensors get no adapter, among them '{empty[0]}'.", stacklevel=2)
    names = [name for name in counts if name not in empty and not _is_excluded(config, name.rpartition(".")[0])]
    if not names:
        raise ValueError(
            f"target_modules='pruned' leaves none of {len(counts)} masked tensors; check the masks and exclude_modules."
        )
    return names


def _is_excluded(config: MaskedLoraConfig, module: str) -> bool:
    """Whether `exclude_modules` or `modules_to_save` leave a module out, by PEFT's rule."""
    asked = SimpleNamespace(
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_modules={module},
        target_parameters=None,
    )
    return not check_target_module_exists(asked, module)


def _listed_names(config: MaskedLoraConfig, model: nn.Module, parts: _Parts, dense: list[str]) -> list[str]:
    """The parameters that listed `target_modules` and `target_parameters` select, matched as PEFT does."""
    if config.target_modules == "all-linear":
        raise ValueError(
            f"{config.METHOD} does not take target_modules='all-linear'; use 'pruned', or list the modules."
        )
    names = []
    if config.target_modules:
        outside = (name for name in parts.outside_adapters() if name not in dense)
        names = [f"{name}.weight" for name in outside if check_target_module_exists(config, name)]
    wanted = tuple(config.target_parameters or ())
    tails = tuple(f".{name}" for name in wanted)
    names += [name for name in named_weights(model) if name in wanted or name.endswith(tails)]
    if not names:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches no module of {type(model).__name__}; use 'pruned', or "
            f"names such as '{find_targets(model)[0].module}'."
        )
    return names


def _check_mask(name: str, masks: MaskSet, parts: _Parts) -> None:
    """Raise one sentence if a target has no mask, or its mask no tensor of the same shape."""
    if name not in masks:
        raise ValueError(
            f"Target '{name.removesuffix('.weight')}' has no mask; list pruned layers only, use "
            f"target_modules='pruned', or name it in dense_modules."
        )
    owner, _, attribute = name.rpartition(".")
    weight = getattr(parts.modules.get(owner), attribute, None)
    if weight is None:
        raise ValueError(f"The model has no tensor '{name}' but there is a mask for it. Another model's masks?")
    if parts.shape(name) != masks.shape(name) and parts.layer_of(name) is not None:
        raise ValueError(
            f"Mask for '{name}' has shape {masks.shape(name)} but the weight has {parts.shape(name)}. Was it made for "
            f"another model?"
        )


def _only(masks: MaskSet, names: list[str]) -> MaskSet:
    """The masks of these tensors."""
    if set(names) == set(masks):
        return masks
    patterns, input_dims = masks.patterns, masks.input_dims
    return MaskSet(
        {name: masks[name] for name in names},
        pattern={name: patterns[name] for name in names},
        input_dims={name: input_dims[name] for name in names},
    )


def _find_masks(config: MaskedLoraConfig, model: nn.Module, names: list[str]) -> MaskSet:
    """Masks of a saved adapter whose directory is not known here (transformers' `load_adapter`), found by their digest.

    Raises:
        ValueError: if the config is not a saved adapter's.
        FileNotFoundError: if neither the base model's directory nor its zeros give these masks.
    """
    config_name = type(config).__name__
    if config.masks_digest is None:
        raise ValueError(
            f"{config_name} needs the masks; pass masks=MaskSet.from_zeros(model), or what prune returned."
        )
    for candidate in _candidates(model, names):
        if all(name in candidate for name in names):
            masks = _only(candidate, names)
            if bits_digest(masks) == config.masks_digest:
                return masks
    raise FileNotFoundError(
        f"The adapter's masks ({config.masks_digest[:12]}) are neither beside the base model nor its zeros; load the "
        f"config with {config_name}.from_pretrained(<adapter directory>) and pass it as peft_config."
    )


def _candidates(model: nn.Module, names: list[str]) -> Iterator[MaskSet]:
    directory = Path(getattr(model, "name_or_path", None) or ".")
    if (directory / MASKS_FILE).is_file():
        yield MaskSet.load(directory)
    targets = [target for target in find_targets(model) if target.name in names]
    if targets:
        yield MaskSet.from_zeros(model, targets=targets, min_sparsity=0)
