"""What `--method` of `retrain` means: the parts it is joined from, the options each of them has, what is trained.

`full` trains every weight and joins with nothing. Everything else is PERP: one adapter, groups of parameters, or both,
joined with "+" in any order: `mask_lora`, `norms`, `biases+norms`, `mask_lora+norms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from sparse_ft.adapters.perp import (
    ADAPTERS,
    GROUPS,
    PerpMethod,
    check_rank,
    merge_perp,
    parse_method,
    prepare_perp,
    resolve_groups,
    share_by_part,
    trainable_share,
)
from sparse_ft.cli.arguments import RetrainArguments
from sparse_ft.masks import MaskSet
from sparse_ft.models import HALF_DTYPES
from sparse_ft.naming import check_choice

__all__ = ["DEFAULT_RANK", "Method", "check_settings", "choose_method", "print_trainable"]

DEFAULT_RANK = 16
_ALONE = ("full", "reconstruct")  # methods that join with nothing; `cli.reconstruct` is the second
# option -> adapters that have it; an ordinary LoRA on the head, where it is the only one, counts as lora
_ADAPTERS_WITH = {
    "r": (*ADAPTERS, "lora"),
    "lora_alpha": ("mask_lora", "lora_prune", "lora"),
    "use_rslora": ("mask_lora", "lora_prune", "lora"),
    "lora_dropout": ("lora_prune",),
    "break_symmetry": ("scale_lora",),
}


@dataclass(frozen=True)
class Method:
    """A way to retrain.

    Attributes:
        name: as given.
        perp: its parts; None trains every weight.
    """

    name: str
    perp: PerpMethod | None

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter for `--save_adapter`."""
        return self.perp is not None and self.perp.uses_peft

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype in training when `--dtype` is auto; `"auto"` is the stored one."""
        return "float32" if self.perp is None else "auto"

    def has_option(self, name: str) -> bool:
        """Whether an option that only some adapters have belongs to this method."""
        if self.perp is None:
            return False
        adapter = self.perp.adapter or ("lora" if "head" in self.perp.groups else "none")
        return adapter in _ADAPTERS_WITH[name]

    def check(self, model: PreTrainedModel, masks: MaskSet, how: RetrainArguments, training: TrainingArguments) -> None:
        """What can be refused once the model is read, before any work.

        Raises:
            ValueError: if there is nothing to train, weights are tied, the rank is too large, or fp32 parameters would
                be trained in a 16-bit model without autocast.
        """
        if self.perp is None:
            return
        groups = resolve_groups(model, self.perp, masks, warn=False)  # prepare() does
        if how.save_adapter is not None and self.perp.adapter is None and "head" not in groups:
            raise ValueError(f"Method {self.name!r} leaves no adapter to save in this model; leave out --save_adapter.")
        if how.r is not None:
            check_rank(model, self.perp, masks, how.r)
        dtype = model.get_parameter(next(iter(masks))).dtype if how.dtype == "auto" else getattr(torch, how.dtype)
        wide = "+".join(group for group in groups if group != "head")
        if wide and dtype in HALF_DTYPES and not (training.bf16 or training.fp16):
            stored = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"Method {self.name!r} trains {wide} in float32 inside a {stored} model, which needs autocast; add "
                f"--bf16, or train in --dtype float32."
            )

    def prepare(self, model: PreTrainedModel, masks: MaskSet, how: RetrainArguments) -> nn.Module:
        """The model to train: exactly the method's parameters are trainable."""
        if self.perp is None:
            return model
        if self.perp.adapter or self.perp.groups != ("head",):
            # the embedding is frozen, and a checkpointed block needs an input with gradient; a head needs no gradient
            # from the blocks at all
            model.enable_input_require_grads()
        options = {
            name: value
            for name in ("lora_alpha", "use_rslora", "lora_dropout", "break_symmetry")
            if (value := getattr(how, name)) and self.has_option(name)
        }
        return prepare_perp(model, self.perp, masks, r=how.r or DEFAULT_RANK, task_type="CAUSAL_LM", **options)

    def finish(self, trained: nn.Module) -> PreTrainedModel:
        """The trained model as a plain one."""
        return cast(PreTrainedModel, trained if self.perp is None else merge_perp(trained))

    def trainable(self, prepared: nn.Module) -> dict[str, Any]:
        """How many weights are trained: `trainable` of `total`, and by part the number of `tensors` and `weights`."""
        share = trainable_share(prepared)
        parts = {self.name: share} if self.perp is None else share_by_part(prepared, self.perp)
        groups = {name: {"tensors": len(part.names), "weights": part.trainable} for name, part in parts.items()}
        return {"trainable": share.trainable, "total": share.total, "groups": groups}


def choose_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: if a part is unknown (the nearest is named) or given twice, if there are two adapters, or if `full`
            is joined with something.
    """
    parts = [part.strip() for part in name.split("+")]
    if "" in parts and len(parts) > 1:
        raise ValueError(f"Method {name!r} has a + with nothing on one side; name a part there, or leave it out.")
    for part in parts:
        check_choice("method", part, [*_ALONE, *ADAPTERS, *GROUPS])
        if part in _ALONE and len(parts) > 1:
            raise ValueError(f"Method {part!r} joins with nothing, got {name!r}; give one of its parts alone.")
    return Method(name, None if name in _ALONE else parse_method(name))


def check_settings(method: Method, how: RetrainArguments) -> None:
    """What can be refused without reading a model; the rank gets its default where the method has one.

    Raises:
        ValueError: for an option that the method does not use.
    """
    for option in _ADAPTERS_WITH:
        value = getattr(how, option)
        if value is not None and value is not False and not method.has_option(option):
            raise ValueError(f"Method {method.name!r} does not use --{option}; leave it out, of the recipe too.")
    if how.save_adapter is not None and not method.has_adapter:
        raise ValueError(f"Method {method.name!r} has no adapter to save; leave out --save_adapter.")
    if how.r is None and method.has_option("r"):
        how.r = DEFAULT_RANK


def print_trainable(counts: dict[str, Any]) -> None:
    """What `Method.trainable` counted, on standard output."""
    share = counts["trainable"] / max(counts["total"], 1)
    print(f"\ntraining {counts['trainable']:,} of {counts['total']:,} parameters ({share:.4%})")
    width = max(map(len, counts["groups"]))
    for name, group in counts["groups"].items():
        print(f"  {name:<{width}}  {group['tensors']:>6,} tensors{group['weights']:>17,} parameters")
