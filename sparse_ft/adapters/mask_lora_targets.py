"""Which tensors a MaskLoRA adapter works on, checked before anything of the model is touched.

`prepare` turns `target_modules="pruned"` into the modules that have a mask, and checks that each target is a layer that
MaskLoRA can handle and that masks, weights and, for a saved adapter, digests fit together.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters.mask_lora_layer import MaskLoraExperts, MaskLoraLinear
from sparse_ft.masks import MASKS_FILE, MaskSet, pack_bits
from sparse_ft.models import canonical_name, find_targets, named_weights

if TYPE_CHECKING:
    from sparse_ft.adapters.mask_lora import MaskLoraConfig

PRUNED = "pruned"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prepare(config: MaskLoraConfig, model: nn.Module) -> None:
    """Resolve the targets of a config, check them, and record masks and digests of just these tensors in the config.

    Args:
        config: changed in place, as PEFT does: `target_modules`, `target_parameters`, `masks` and the digests.
        model: the model without `PeftModel` around it; it may have adapters already.

    Raises:
        ValueError: if a target has no mask, a wrong shape, an unsupported layer or shared weights, if adapters are
            merged, or if masks or weights are not those a saved adapter was made for.
        FileNotFoundError: if a saved adapter's masks cannot be found.
        RuntimeError: if a pruned weight is not zero.
    """
    parts = _Parts(model)
    names = _masked_names(config) if config.target_modules == PRUNED else _listed_names(config, model, parts)
    masks = config.masks if config.masks is not None else _find_masks(config, model, names)
    for name in names:
        _check_mask(name, masks, parts)
        parts.check(name, is_stack=len(masks.shape(name)) == 3)
    masks = _only(masks, names)
    masks.verify(model)
    config.record(masks, bits_digest(masks), masks.weights_digest(model))
    if config.target_modules == PRUNED:
        config.target_modules = {name.removesuffix(".weight") for name in names if len(masks.shape(name)) == 2}
    config.target_parameters = [name for name in names if len(masks.shape(name)) == 3] or None


def bits_digest(masks: MaskSet) -> str:
    """SHA-256 over names, shapes and bits, whatever patterns the set declares."""
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(f"{name}|{masks.shape(name)}|".encode() + pack_bits(masks[name]).numpy().tobytes())
    return sha.hexdigest()


class _Parts:
    """A model taken apart: plain modules and adapted layers by canonical name, and weights that modules share."""

    def __init__(self, model: nn.Module) -> None:
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

    def check(self, name: str, *, is_stack: bool) -> None:
        """Raise one sentence if the parameter cannot be adapted."""
        owner, _, attribute = name.rpartition(".")
        module, layer = self.modules[owner], self.adapted.get(owner)
        weight: torch.Tensor = getattr(module, attribute)
        runs_as_linear = type(module).forward in (nn.Linear.forward, Conv1D.forward)
        if weight.dtype not in _FLOATS or not (is_stack or runs_as_linear):
            raise ValueError(
                f"MaskLoRA does not support '{owner}' of type {type(module).__name__} with {weight.dtype} weights, "
                f"only floating point nn.Linear, Conv1D and fused experts; load the model without quantization, or "
                f"exclude the module."
            )
        if weight.is_meta:
            raise ValueError(f"The weight of '{owner}' is on the meta device; load it into memory before adapting it.")
        if id(weight) in self.shared:
            raise ValueError(
                f"'{name}' is shared with another module, which merging the adapter would change too; untie the "
                f"weights, or exclude '{owner}'."
            )
        if layer is not None and not isinstance(layer, (MaskLoraLinear, MaskLoraExperts)):
            raise ValueError(
                f"'{owner}' has an adapter of another method ({type(layer).__name__}); merge or delete that one first."
            )
        if layer is not None and layer.merged:
            raise ValueError(f"Adapter {layer.merged_adapters} is merged into '{owner}'; unmerge it before adding one.")


def _masked_names(config: MaskLoraConfig) -> list[str]:
    """What `"pruned"` means: every tensor with a mask that keeps something, unless excluded."""
    if config.masks is None:
        raise ValueError(
            "MaskLoraConfig(target_modules='pruned') needs the masks; pass masks=MaskSet.from_zeros(model), or what "
            "sparse_ft.prune returned."
        )
    counts = config.masks.counts()
    empty = [name for name, (kept, _) in counts.items() if kept == 0]
    if empty:
        warnings.warn(f"{len(empty)} wholly pruned tensors get no adapter, among them '{empty[0]}'.", stacklevel=2)
    names = [name for name in counts if name not in empty and not _is_excluded(config, name.rpartition(".")[0])]
    if not names:
        raise ValueError(
            f"target_modules='pruned' leaves none of {len(counts)} masked tensors; check the masks, exclude_modules "
            f"and modules_to_save."
        )
    return names


def _is_excluded(config: MaskLoraConfig, module: str) -> bool:
    """PEFT's rule for `exclude_modules` and `modules_to_save`, asked with this module as the only target."""
    asked = SimpleNamespace(
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
        target_modules={module},
        target_parameters=None,
    )
    return not check_target_module_exists(asked, module)


def _listed_names(config: MaskLoraConfig, model: nn.Module, parts: _Parts) -> list[str]:
    """The parameters that listed `target_modules` and `target_parameters` select, matched as PEFT does."""
    if config.target_modules == "all-linear":
        raise ValueError("MaskLoRA does not take target_modules='all-linear'; use 'pruned', or list the modules.")
    names = []
    if config.target_modules:
        matching = (name for name in parts.outside_adapters() if check_target_module_exists(config, name))
        names = [f"{name}.weight" for name in matching]
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
            f"target_modules='pruned', or give a dense layer a mask that is True everywhere."
        )
    owner, _, attribute = name.rpartition(".")
    weight = getattr(parts.modules.get(owner), attribute, None)
    if weight is None:
        raise ValueError(f"The model has no tensor '{name}' but there is a mask for it. Another model's masks?")
    quantised = weight.dtype not in _FLOATS  # packed: `check` says so
    if not quantised and tuple(weight.shape) != masks.shape(name):
        raise ValueError(
            f"Mask for '{name}' has shape {masks.shape(name)} but the weight has {tuple(weight.shape)}. Was it made "
            f"for another model?"
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


def _find_masks(config: MaskLoraConfig, model: nn.Module, names: list[str]) -> MaskSet:
    """Masks of a saved adapter whose directory is not known here (transformers' `load_adapter`), found by their digest.

    Raises:
        ValueError: if the config is not a saved adapter's.
        FileNotFoundError: if neither the base model's directory nor its zeros give these masks.
    """
    if config.masks_digest is None:
        raise ValueError(
            "MaskLoraConfig needs the masks; pass masks=MaskSet.from_zeros(model), or what prune returned."
        )
    for candidate in _candidates(model, names):
        if all(name in candidate for name in names):
            masks = _only(candidate, names)
            if bits_digest(masks) == config.masks_digest:
                return masks
    raise FileNotFoundError(
        f"The adapter's masks ({config.masks_digest[:12]}) are neither beside the base model nor its zeros; load the "
        f"config with MaskLoraConfig.from_pretrained(<adapter directory>) and pass it as peft_config."
    )


def _candidates(model: nn.Module, names: list[str]) -> Iterator[MaskSet]:
    directory = Path(getattr(model, "name_or_path", None) or ".")
    if (directory / MASKS_FILE).is_file():
        yield MaskSet.load(directory)
    targets = [target for target in find_targets(model) if target.name in names]
    if targets:
        yield MaskSet.from_zeros(model, targets=targets, min_sparsity=0)
