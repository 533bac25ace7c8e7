"""What is trained in a window: kept weights under their mask, an adapter, groups of small parameters, or several.

`train` names the parts, joined by "+": `full` (every kept weight of the masked matrices) or one adapter of
`adapters.perp`, and any of the groups `norms` and `biases`.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3, for the groups and adapters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.adapters.perp import (
    ADAPTERS,
    PerpMethod,
    group_parameters,
    merge_perp,
    parse_method,
    prepare_perp,
)
from sparse_ft.masks import MaskSet, keep_bits, mask_
from sparse_ft.naming import check_choice

FULL = "full"
GROUPS = ("norms", "biases")
PARTS = (FULL, *ADAPTERS, *GROUPS)
_OUTSIDE = ("head", "embeddings")

#: Peak learning rate of adapters and groups: that of PERP's released configuration.
LEARNING_RATE = 5e-4
#: Peak learning rate of kept weights times the inputs of a matrix. The rate that suits Adam falls with the width of a
#: layer (Yang et al. 2022, arXiv 2203.03466, table 3); between what suits a model that lost much (three times as
#: high, docs/results/perp/llama_wt2.json) and one that lost little (a third of it, docs/results/perp/encoder.json).
LEARNING_RATE_TIMES_WIDTH = 0.8


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        weights: `"full"`, one of `ADAPTERS`, or None.
        groups: some of `GROUPS`.
    """

    weights: str | None
    groups: tuple[str, ...]

    def __str__(self) -> str:
        return "+".join(([self.weights] if self.weights else []) + list(self.groups))

    def learning_rate(self, masks: MaskSet) -> float:
        """The default for the matrices of these masks; for kept weights by the least number of inputs."""
        if self.weights != FULL:
            return LEARNING_RATE
        return LEARNING_RATE_TIMES_WIDTH / min(masks.shape(name)[masks.input_dims[name]] for name in masks)


def parse_training(text: str) -> Training:
    """Read `"full"`, `"mask_lora+norms"`, `"full+norms+biases"`; the order does not matter.

    Raises:
        ValueError: for an unknown part (the nearest is named), one outside the blocks, one given twice, or two ways to
            train the weights.

    Example:
        >>> parse_training("norms+full")
        Training(weights='full', groups=('norms',))
    """
    parts = [part.strip() for part in str(text).split("+")]
    for part in parts:
        if part in _OUTSIDE:
            raise ValueError(
                f"Reconstruction cannot train {part!r}: it works block by block, and {part} lie outside the blocks; "
                f"leave it out of train (--reconstruct_with) {text!r}."
            )
        check_choice("part of train", part, PARTS)
    if FULL not in parts:
        method = parse_method(text)
        return Training(method.adapter, tuple(group for group in GROUPS if group in method.groups))
    twice = next((part for part in parts if parts.count(part) > 1), None)
    if twice is not None:
        raise ValueError(
            f"train (--reconstruct_with) {text!r} names {twice!r} {parts.count(twice)} times; once is enough."
        )
    adapter = next((part for part in parts if part in ADAPTERS), None)
    if adapter is not None:
        raise ValueError(
            f"train (--reconstruct_with) {text!r} trains all kept weights and an adapter {adapter!r} on them; choose "
            f"one."
        )
    return Training(FULL, tuple(group for group in GROUPS if group in parts))


def grouped_names(model: nn.Module, training: Training, masks: MaskSet, blocks: Sequence[str]) -> frozenset[str]:
    """Canonical names of the parameters of a training's groups inside the blocks, those with a mask left out.

    Warns of a group that this model has not, if there is something else to train.

    Raises:
        ValueError: if nothing is left to train.
    """
    found: set[str] = set()
    missing: list[str] = []
    inside = tuple(f"{block}." for block in blocks)
    for group in training.groups:
        names = {n for n in group_parameters(model, group) if n.startswith(inside) and n not in masks}
        found |= names
        if not names:
            missing.append(f"The blocks of {type(model).__name__} have no {group} to train")
    if missing and not found and training.weights is None:
        raise ValueError(f"{'; '.join(missing)}; use another group, full, or an adapter such as mask_lora.")
    for sentence in missing:
        warnings.warn(f"{sentence}; the rest of {training} is trained.", stacklevel=5)
    return frozenset(found)


class TrainedWindow:
    """The parameters of one window in training: gradients on and masked, adapters attached.

    Args:
        module: holds the window's weights in fp32; changed.
        weights: `Training.weights`.
        masks: bool, by parameter name in the module: the window's matrices.
        groups: names of other parameters to train.
        r: rank of an adapter; a matrix with a shorter side below r gets that as its rank.
        lora_alpha: of an adapter: its scale is lora_alpha / r, None for 2, whatever a matrix's own rank.
        seed: of an adapter's random factors.

    Attributes:
        parameters: what an optimizer gets.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: str | None,
        masks: Mapping[str, Tensor],
        groups: Sequence[str],
        *,
        r: int = 16,
        lora_alpha: int | None = None,
        seed: int = 0,
    ) -> None:
        module.requires_grad_(False)
        own = dict(module.named_parameters())
        self._names = [*(masks if weights else ()), *groups]
        self._hooks: list[Any] = []
        self._module = module
        if weights == FULL:
            for name, mask in masks.items():
                own[name].requires_grad_(True)
                hook = partial(_mask_gradient, keep_bits(mask.to(own[name].device)))
                self._hooks.append(own[name].register_post_accumulate_grad_hook(hook))
        elif weights is not None:
            kept = {name: mask for name, mask in masks.items() if bool(mask.any())}
            if kept:
                self._module = _adapted(module, weights, kept, r, lora_alpha, seed)
        for name in groups:
            own[name].requires_grad_(True)
        self.parameters = [p for p in self._module.parameters() if p.requires_grad]

    def finish(self) -> dict[str, Tensor]:
        """The trained values by name in the module, adapters merged, in fp32. The module is plain again."""
        for hook in self._hooks:
            hook.remove()
        plain = dict(merge_perp(self._module).named_parameters())
        return {name: plain[name].detach() for name in self._names}


def _mask_gradient(keep: Tensor, parameter: Tensor) -> None:
    """Pruned weights get a gradient of exactly 0, so that AdamW never moves them."""
    assert parameter.grad is not None
    mask_(parameter.grad, keep)


def _adapted(
    module: nn.Module, adapter: str, masks: Mapping[str, Tensor], r: int, lora_alpha: int | None, seed: int
) -> nn.Module:
    """Attach an adapter, of a lower rank but the same scale where a matrix is narrower than r."""
    limits = {name: min(mask.shape[-2:]) for name, mask in masks.items()}
    # PEFT takes these keys for the ends of names unless they say where a name begins.
    cut = {f"^{re.escape(_key(masks, name))}": limit for name, limit in limits.items() if limit < r}
    options: dict[str, Any] = {"rank_pattern": cut}
    if adapter != "scale_lora":
        scale = 2.0 if lora_alpha is None else lora_alpha / r
        options["alpha_pattern"] = {key: scale * limit for key, limit in cut.items()}
    devices = [p.device for p in list(module.parameters())[:1] if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return prepare_perp(
            module, PerpMethod(adapter, ()), MaskSet(masks), r=r, lora_alpha=lora_alpha, task_type=None, **options
        )


def _key(masks: Mapping[str, Tensor], name: str) -> str:
    """What PEFT calls a parameter: by its module, or fused experts by their own name."""
    return name if masks[name].ndim == 3 else name.removesuffix(".weight")
