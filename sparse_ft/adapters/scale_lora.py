"""ScaleLoRA: rescale each kept weight of a pruned model by a low-rank factor, as a PEFT method of its own.

    W_eff = W ∘ (B A),   B (out, r), A (r, in), W frozen and sparse.

A product keeps every zero by construction, so merged and unmerged model agree and pruned weights stay zero. It also
keeps a zero among the kept weights, and a factor that reaches 0 makes a weight stand still. There is no scale c and no
alpha. B A = 1 at the start: A = B = 1 / sqrt(r) in every entry.

Example:
    >>> config = ScaleLoraConfig(r=16, target_modules="pruned", masks=masks, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)            # train it with Trainer or SFTTrainer
    >>> model.save_pretrained("adapter")                 # PEFT's files and sparse_masks.safetensors
    >>> model = model.merge_and_unload()                 # as sparse as before

To load a saved adapter, this module has to be imported (`import sparse_ft.adapters`); without it PEFT stops at the
unknown type SCALELORA.

Limits: with the published start all components of B A are equal and get equal gradients, so B A keeps rank 1 for ever,
whatever r is; `break_symmetry` is the way out. No dropout, no scale, none of LoRA's variants.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (ScaleLoRA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from torch import Tensor, nn

from sparse_ft.adapters.combining import Factors, concatenated
from sparse_ft.adapters.effective_weight import ordered_factors
from sparse_ft.adapters.masked_config import REFUSED, MaskedLoraConfig
from sparse_ft.adapters.masked_layer import MaskedExperts, MaskedLayer, MaskedLinear
from sparse_ft.adapters.masked_model import MaskedLoraModel
from sparse_ft.adapters.peft_type import add_peft_type
from sparse_ft.adapters.quantised import QuantisedMaskedLinear
from sparse_ft.adapters.scale_lora_function import scale_lora_linear, scale_lora_weight
from sparse_ft.masks import mask_

SCALELORA = add_peft_type("SCALELORA")
_NO_SCALE = "the factor B A replaces the weight's scale and has none of its own"


@dataclass
class ScaleLoraConfig(MaskedLoraConfig):
    """Configuration of ScaleLoRA; see `MaskedLoraConfig` for the other fields.

    `init_lora_weights` True starts at B A = 1, the pruned model; False draws A and B at random, as PEFT does for its
    tests, which is another model from the start.

    Args:
        break_symmetry: A deviation from the paper. The published start gives every component of B A the same values and
            so the same gradients: they stay equal, and B A has rank 1 for ever, a factor per row times one per column.
            With True one component starts at 1 in A and B, the other rows of A as in LoRA and the other columns of B
            at zero: B A = 1 exactly, for every r, and rank r can be learned.

    Raises:
        ValueError: for an option of LoraConfig that ScaleLoRA cannot honour, `lora_alpha` and `use_rslora` among them.

    Example:
        >>> ScaleLoraConfig(r=16, masks=masks, task_type="CAUSAL_LM", break_symmetry=True)
    """

    METHOD: ClassVar[str] = "ScaleLoRA"
    TYPE: ClassVar[PeftType] = SCALELORA
    REFUSED: ClassVar[dict[str, str]] = {
        **REFUSED,
        "lora_alpha": _NO_SCALE,
        "alpha_pattern": _NO_SCALE,
        "use_rslora": _NO_SCALE,
    }
    INITS: ClassVar[tuple[bool | str, ...]] = (True, False)

    break_symmetry: bool = field(
        default=False, metadata={"help": "Start so that more than rank 1 can be learned; not in the paper."}
    )

    def _set_alpha(self) -> None:
        """There is none, not even 0."""
        if self.lora_alpha is not None:
            raise ValueError(f"{self.METHOD} does not support lora_alpha={self.lora_alpha!r}: {_NO_SCALE}.")


class _ScaleLayer(MaskedLayer):
    """What linears and stacks share: the start, and merging by multiplication."""

    method = "ScaleLoRA"

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int | None, config: Any, **kwargs: Any) -> None:
        """Add an adapter with B A = 1; its mask follows by `set_mask`."""
        super().update_layer(adapter_name, r, r, config=config, **kwargs)
        if isinstance(config, ScaleLoraConfig) and config.init_lora_weights:
            self._start(adapter_name, r, config.break_symmetry)

    @torch.no_grad()
    def _start(self, adapter_name: str, r: int, break_symmetry: bool) -> None:
        """In fp32 whatever the base, for 1 / sqrt(r) in bf16 would be 0.4 percent off."""
        A, B = self.lora_A[adapter_name], self.lora_B[adapter_name]
        wide_A, wide_B = self._wide(adapter_name)
        # stored as (E·r, in) and (out, r·E), see `factors`
        first, last = wide_A.view(self.num_experts, r, -1), wide_B.view(-1, r, self.num_experts)
        if break_symmetry:
            first[:, 0], last[:, 0] = 1, 1  # the rest is LoRA's own start: Kaiming and zero
        else:
            first.fill_(1 / math.sqrt(r))
            last.fill_(1 / math.sqrt(r))
        A.weight.data, B.weight.data = wide_A, wide_B

    def set_scale(self, adapter: str, scale: float) -> None:
        """Not supported, as in `scale_layer`."""
        self.scale_layer(scale)

    def scale_layer(self, scale: float) -> None:
        """Not supported.

        Raises:
            ValueError: unless the scale is 1.
        """
        if scale != 1:
            raise ValueError(f"ScaleLoRA cannot be scaled by {scale}: {_NO_SCALE}.")

    @torch.no_grad()
    def combination(self, adapters: dict[str, float], how: str, r: int | None) -> Factors:
        """W ∘ (Σ w (B A - 1)) is W ∘ (Σ w B A - Σ w): exact with one more component, the constant 1 - Σ w."""
        both = super().combination(adapters, how, r)
        rest = 1 - sum(weight for name, weight in adapters.items() if name in self.lora_A)
        constant = Factors(torch.ones_like(both.A[:, :1]), torch.ones_like(both.B[:, :, :1]), rest)
        return concatenated([both, constant])

    def _factor(self, adapter: str) -> Tensor:
        """B A in the layout of the weight, in fp32 (fp64 for fp64 factors)."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """W ∘ (B A - 1) with the W from before any merge, in its layout and in fp32 (fp64 for fp64 factors)."""
        return mask_(self._unmerged() * (self._factor(adapter) - 1), self._bits(adapter))

    def _total(self, weight: Tensor, adapters: list[str]) -> Tensor:
        """W ∘ (B A) for one adapter, W ∘ (Σ B A - (n - 1)) for n."""
        factor = self._factor(adapters[0])
        for name in adapters[1:]:
            factor += self._factor(name) - 1
        return mask_(weight * factor, self._bits(adapters[0]))


class ScaleLoraLinear(_ScaleLayer, MaskedLinear):
    """ScaleLoRA around `nn.Linear`, weight (out, in), or GPT-2's Conv1D, weight (in, out)."""

    def _factor(self, adapter: str) -> Tensor:
        A, B = self._wide(adapter)
        left, right = ordered_factors(A, B, A.dtype, self.fan_in_fan_out)
        return left @ right

    def _total(self, weight: Tensor, adapters: list[str]) -> Tensor:
        if len(adapters) > 1:
            return super()._total(weight, adapters)
        total = scale_lora_weight(weight, *self._wide(adapters[0]), fan_in_fan_out=self.fan_in_fan_out)
        return mask_(total, self._bits(adapters[0]))

    def _fused(self, x: Tensor, adapter: str, bias: Tensor | None) -> Tensor:
        return self._scaled(x, adapter, bias, change_only=False)

    def _addition(self, x: Tensor, adapter: str) -> Tensor:
        return self._scaled(x, adapter, None, change_only=True)

    def _scaled(self, x: Tensor, adapter: str, bias: Tensor | None, *, change_only: bool) -> Tensor:
        self._bits(adapter)  # raises if A and B were trained for another mask or base
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        weight = self._base_weight()
        return scale_lora_linear(x, weight, bias, A, B, change_only=change_only, fan_in_fan_out=self.fan_in_fan_out)


class ScaleLoraQuantised(QuantisedMaskedLinear, ScaleLoraLinear):
    """ScaleLoRA around a 4-bit or 8-bit linear of bitsandbytes, see `quantised`."""


class ParamWrapper(_ScaleLayer, MaskedExperts):
    """ScaleLoRA on a stack of fused experts: one pair A, B per expert."""

    def _factor(self, adapter: str) -> Tensor:
        with torch.autocast(self._parameter().device.type, enabled=False):
            return self._product(*self._wide(adapter))

    def _change(self, adapters: list[str]) -> nn.Module:
        for name in adapters:
            self._bits(name)  # raises if A and B were trained for another mask or base
        factors = [self._factor(name) for name in adapters]
        return Scaled(sum((factor - 1 for factor in factors[1:]), factors[0]).to(self._parameter().dtype))


ScaleLoraExperts = ParamWrapper


class Scaled(nn.Module):
    """Parametrization W ∘ F."""

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        """The stack times F."""
        return weight * self.factor


class ScaleLoraModel(MaskedLoraModel):
    """PEFT's LoraModel with ScaleLoRA's layers; made by `get_peft_model`, seldom by hand."""

    combinations = ("cat",)
    linear_layer = ScaleLoraLinear
    quantised_layer = ScaleLoraQuantised
    experts_layer = ScaleLoraExperts


if SCALELORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="scalelora", config_cls=ScaleLoraConfig, model_cls=ScaleLoraModel, prefix="lora_")
