"""PERP: retrain a pruned model by a small part of its parameters, alone or joined with an adapter.

A method is written as its parts joined by "+": at most one adapter for the pruned weights (`mask_lora`, `scale_lora`,
`lora_prune`) and any of the groups

| group | what is trained |
|---|---|
| `biases` | every `bias` of every module, those of norms included |
| `norms` | weights and biases of norms: modules of a class called `...Norm...` with a 1-D weight, the final one too |
| `head` | ordinary LoRA beside the output embedding, which is not pruned |
| `embeddings` | the input embedding in full |

Groups by themselves are trained in the model as it is. Joined with an adapter (`head` is one) they travel with it:
norms and embeddings as PEFT's `modules_to_save`, biases as `bias="all"`, so saving, loading, merging and resuming are
PEFT's own. A weight that has a mask is in no group, so zeros are safe.

In a 16-bit model the trained parameters of the groups are held in fp32, for a step of 1e-4 on a norm weight of 1 is
lost in bf16; so are all norms, trained or not, for a layer norm takes one dtype only. Such a model runs under autocast
(`Trainer` with `bf16=True`). `merge_perp` casts everything back.

Example:
    >>> model = prepare_perp(model, "mask_lora+norms", masks)        # train it with Trainer
    >>> print(trainable_share(model).share)
    >>> model = merge_perp(model)                                    # plain, as sparse as before
    >>> masks.verify(model)

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from sparse_ft.adapters.lora_prune import LoraPruneConfig
from sparse_ft.adapters.mask_lora import MaskLoraConfig
from sparse_ft.adapters.masked_config import check_alpha
from sparse_ft.adapters.perp_groups import (
    ADAPTERS,
    GROUPS,
    PerpMethod,
    check_rank,
    group_parameters,
    own_parameters,
    parse_method,
    plain_name,
    resolve_groups,
)
from sparse_ft.adapters.quantised import check_biases, guard_layers
from sparse_ft.adapters.scale_lora import ScaleLoraConfig
from sparse_ft.masks import MaskSet
from sparse_ft.models import HALF_DTYPES

__all__ = [
    "ADAPTERS",
    "GROUPS",
    "PerpMethod",
    "TrainableShare",
    "check_rank",
    "group_parameters",
    "merge_perp",
    "parse_method",
    "prepare_perp",
    "resolve_groups",
    "share_by_part",
    "trainable_share",
]

_CONFIGS = {"mask_lora": MaskLoraConfig, "scale_lora": ScaleLoraConfig, "lora_prune": LoraPruneConfig}


@dataclass(frozen=True)
class TrainableShare:
    """How much of a model is trained.

    Attributes:
        trainable: number of trained parameters.
        total: number of parameters, adapters included; a weight of which PEFT trains a copy counts once.
        names: the trained tensors: parameters by canonical name, `"model.norm.weight"`.
    """

    trainable: int
    total: int
    names: Mapping[str, int]

    @property
    def share(self) -> float:
        """`trainable / total`."""
        return self.trainable / max(self.total, 1)


def prepare_perp(
    model: nn.Module,
    method: PerpMethod | str,
    masks: MaskSet | None = None,
    *,
    r: int = 16,
    lora_alpha: int | None = None,
    break_symmetry: bool = False,
    task_type: str | None = "CAUSAL_LM",
    **lora_options: Any,
) -> nn.Module:
    """Make exactly the parameters of a method trainable.

    Args:
        model: a plain pruned model, changed in place.
        method: as in `parse_method`.
        masks: its masks; only groups by themselves can do without.
        r: rank of the adapter, and of the head's LoRA.
        lora_alpha: their scale is lora_alpha / r; None is 2 r. Not for scale_lora.
        break_symmetry: scale_lora only.
        task_type: of PEFT; None for a model that PEFT has no class for.
        **lora_options: further fields of the adapter's config, for example `use_rslora` or `exclude_modules`.

    Returns:
        A `PeftModel` if there is an adapter, else the model itself.

    Raises:
        ValueError: if the model has an adapter already, nothing is left to train, or weights are tied where they may
            not be; and whatever the adapter refuses.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if getattr(model, "peft_config", None):
        raise ValueError(f"{type(model).__name__} has an adapter already; merge it before preparing {method}.")
    if break_symmetry and method.adapter != "scale_lora":
        raise ValueError(f"break_symmetry belongs to scale_lora, not to {method}; leave it out.")
    groups = resolve_groups(model, method, masks)
    guard_layers(model)
    if "biases" in groups and method.adapter is None:
        check_biases(dict(model.named_modules()))
    if method.adapter is None and "head" not in groups:
        if lora_alpha is not None or lora_options:
            given = ", ".join(["lora_alpha"] * (lora_alpha is not None) + sorted(lora_options))
            raise ValueError(f"{method} trains no adapter, so it does not take {given}; leave it out.")
        model.requires_grad_(False)
        trained = {name for names in groups.values() for name in names}
        for name, parameter in own_parameters(model):
            parameter.requires_grad_(name in trained)
    else:
        if method.adapter is None:
            check_rank(model, method, masks, r)
        if break_symmetry:
            lora_options["break_symmetry"] = True
        config = _config(method, groups, masks, dict(lora_options, r=r, task_type=task_type), lora_alpha)
        model = get_peft_model(model, config)
    if set(groups) - {"head"}:
        _widen(model, groups)
    return model


def trainable_share(model: nn.Module) -> TrainableShare:
    """Count the parameters that are trained.

    Example:
        >>> f"{trainable_share(model).share:.4%}"
        '0.5898%'
    """
    names: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        total += _count(parameter)
        if parameter.requires_grad:
            names[plain_name(name)] = _count(parameter)
    return TrainableShare(sum(names.values()), total, names)


def share_by_part(model: nn.Module, method: PerpMethod) -> dict[str, TrainableShare]:
    """`trainable_share` of a prepared model, split by the parts of its method.

    Biases of norms are counted with the norms where those are trained.
    """
    share = trainable_share(model)
    of_group: dict[str, str] = {}
    for group in ("biases", "norms", "embeddings"):
        if group in method.groups:
            of_group.update(dict.fromkeys(group_parameters(model, group), group))
    heads = {name.rpartition(".")[0] for name in group_parameters(model, "head")} if "head" in method.groups else set()
    parts: dict[str, dict[str, int]] = {part: {} for part in str(method).split("+")}
    for name, count in share.names.items():
        of_adapter = "head" if name.partition(".lora_")[0] in heads else str(method.adapter)
        part = of_adapter if ".lora_" in name else of_group.get(name, of_adapter)
        parts.setdefault(part, {})[name] = count
    return {part: TrainableShare(sum(names.values()), share.total, names) for part, names in parts.items()}


@torch.no_grad()
def merge_perp(model: nn.Module) -> nn.Module:
    """The trained model as a plain one: adapters merged, parameters that were widened to fp32 in their own dtype.

    Args:
        model: what `prepare_perp` returned; changed in place.
    """
    dtypes: dict[str, torch.dtype] = {}
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _NeedsAutocast):
                dtypes = hook.dtypes
                del module._forward_pre_hooks[key]
    plain: nn.Module = model.merge_and_unload() if isinstance(model, PeftModel) else model
    for name, parameter in own_parameters(plain):
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
    return plain


def _config(
    method: PerpMethod,
    groups: Mapping[str, list[str]],
    masks: MaskSet | None,
    options: dict[str, Any],
    lora_alpha: int | None,
) -> LoraConfig:
    """The PEFT config of an adapter with its groups."""
    copied = [name.rpartition(".")[0] for group in ("norms", "embeddings") for name in groups.get(group, [])]
    copied += options.pop("modules_to_save", None) or []
    options["modules_to_save"] = list(dict.fromkeys(copied)) or None
    if "biases" in groups:
        options["bias"] = "all"
    heads = [name.rpartition(".")[0] for name in groups.get("head", [])]
    if method.adapter is None:
        alpha = 2 * options["r"] if lora_alpha is None else lora_alpha
        check_alpha("The head's LoRA", "lora_alpha", alpha)
        return LoraConfig(target_modules=heads, lora_alpha=alpha, **options)
    if lora_alpha is not None:
        options["lora_alpha"] = lora_alpha
    if heads:
        options["dense_modules"] = heads
    return _CONFIGS[method.adapter](masks=masks, **options)


def _widen(model: nn.Module, groups: Mapping[str, list[str]]) -> None:
    """Put the parameters of the groups, and all norms, into fp32 if they are in 16 bits, and ask for autocast then."""
    wide = {name for names in groups.values() for name in names} - set(groups.get("head", []))
    wide.update(group_parameters(model, "norms"))
    dtypes: dict[str, torch.dtype] = {}
    for name, parameter in model.named_parameters():
        if ".original_module." not in name and plain_name(name) in wide and parameter.dtype in HALF_DTYPES:
            dtypes[plain_name(name)] = parameter.dtype
            parameter.data = parameter.data.float()
    if dtypes:
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        embedding.register_forward_pre_hook(_NeedsAutocast(dtypes))


class _NeedsAutocast:
    """Forward pre-hook of the input embedding: one sentence in place of an error about dtypes somewhere below.

    Args:
        dtypes: what the widened parameters were, by canonical name.
    """

    def __init__(self, dtypes: dict[str, torch.dtype]) -> None:
        self.dtypes = dtypes

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        kind = next(module.parameters()).device.type
        if not torch.is_autocast_enabled(kind):
            raise RuntimeError(
                f"{len(self.dtypes)} parameters are trained in float32 in a {_of(self.dtypes)} model, which runs under "
                f"autocast only; train with bf16=True or fp16=True, use torch.autocast, or load the model in float32."
            )


def _of(dtypes: Mapping[str, torch.dtype]) -> str:
    return "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}))


def _count(parameter: Tensor) -> int:
    """Number of weights; a packed 4-bit weight knows its own shape."""
    shape: torch.Size = getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape)
    return shape.numel()
