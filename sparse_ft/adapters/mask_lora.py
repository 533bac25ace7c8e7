"""MaskLoRA: LoRA for a pruned model that keeps every zero, as a PEFT method of its own.

    W_eff = W + c (B A) ∘ m,   c = alpha / r,   B (out, r), A (r, in), m the mask, W frozen.

Training sees the weight it will be merged into, so merged and unmerged model agree and pruned weights stay exactly
zero. PEFT does everything else: `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `add_adapter`,
`load_adapter`, `merge_and_unload`, `disable_adapter`, and transformers' own adapter methods.

Example:
    >>> config = MaskLoraConfig(r=16, target_modules="pruned", masks=masks, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)            # train it with Trainer or SFTTrainer
    >>> model.save_pretrained("adapter")                 # PEFT's files and sparse_masks.safetensors
    >>> model = model.merge_and_unload()                 # as sparse as before
    >>> masks.verify(model)

To load a saved adapter, this module has to be imported (`import sparse_ft.adapters`); without it PEFT stops at the
unknown type MASKLORA.

Limits: no dropout (it acts on an input branch that W_eff does not have), none of LoRA's variants.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (MaskLoRA); r = 16 and c = 2 as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from torch import Tensor, nn

from sparse_ft.adapters.mask_lora_function import mask_lora_delta, mask_lora_linear, masked
from sparse_ft.adapters.masked_config import MaskedLoraConfig
from sparse_ft.adapters.masked_layer import Added, MaskedExperts, MaskedLinear
from sparse_ft.adapters.masked_model import MaskedLoraModel
from sparse_ft.adapters.peft_type import add_peft_type
from sparse_ft.adapters.quantised import QuantisedMaskedLinear

MASKLORA = add_peft_type("MASKLORA")


@dataclass
class MaskLoraConfig(MaskedLoraConfig):
    """Configuration of MaskLoRA: LoraConfig's fields and the masks; see `MaskedLoraConfig` for the fields.

    Raises:
        ValueError: for an option of LoraConfig that MaskLoRA cannot honour.

    Example:
        >>> MaskLoraConfig(r=16, masks=masks, task_type="CAUSAL_LM", exclude_modules=["k_proj"])
    """

    METHOD: ClassVar[str] = "MaskLoRA"
    TYPE: ClassVar[PeftType] = MASKLORA

    def made_for(self) -> str:
        """The base weights, by their digest."""
        return str(self.weights_digest)


class MaskLoraLinear(MaskedLinear):
    """MaskLoRA around `nn.Linear`, weight (out, in), or GPT-2's Conv1D, weight (in, out)."""

    method = "MaskLoRA"

    def get_delta_weight(self, adapter: str) -> Tensor:
        """c (B A) ∘ m in the layout of the weight, in fp32 (fp64 for fp64 factors)."""
        A, B = self._wide(adapter)
        return mask_lora_delta(A, B, self._bits(adapter), self.scaling[adapter], fan_in_fan_out=self.fan_in_fan_out)

    def _fused(self, x: Tensor, adapter: str, bias: Tensor | None) -> Tensor:
        A, B, keep = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self._bits(adapter)
        weight, scaling = self._base_weight(), self.scaling[adapter]
        return mask_lora_linear(x, weight, bias, keep, A, B, scaling, fan_in_fan_out=self.fan_in_fan_out)

    def _addition(self, x: Tensor, adapter: str) -> Tensor:
        A, B, keep = self.lora_A[adapter].weight, self.lora_B[adapter].weight, self._bits(adapter)
        return mask_lora_linear(x, None, None, keep, A, B, self.scaling[adapter], fan_in_fan_out=self.fan_in_fan_out)


class MaskLoraQuantised(QuantisedMaskedLinear, MaskLoraLinear):
    """MaskLoRA around a 4-bit or 8-bit linear of bitsandbytes, see `quantised`."""


class ParamWrapper(MaskedExperts):
    """MaskLoRA on a stack of fused experts: one pair A, B and one mask per expert.

    The delta in forward is computed in the dtype of the weight, or in autocast's, like any product. W + Δ of the stack
    lives until that block's backward pass is done; with activation checkpointing that is one block at a time.
    """

    method = "MaskLoRA"

    def get_delta_weight(self, adapter: str, *args: object, **kwargs: object) -> Tensor:
        """c (B A) ∘ m of every expert in the layout of the stack, in fp32 (fp64 for fp64 factors)."""
        A, B = self._wide(adapter)
        return masked(self._product(A, B * self.scaling[adapter]), self._bits(adapter))

    def _change(self, adapters: list[str]) -> nn.Module:
        dtype = self._parameter().dtype
        deltas = []
        for name in adapters:
            A, B = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
            deltas.append(self._trained(self._product(A, B * self.scaling[name]), self._bits(name)).to(dtype))
        return Added(sum(deltas[1:], deltas[0]))

    def _trained(self, product: Tensor, bits: Tensor) -> Tensor:
        """What training adds to the stack, from c B A."""
        return masked(product, bits)


MaskLoraExperts = ParamWrapper


class MaskLoraModel(MaskedLoraModel):
    """PEFT's LoraModel with MaskLoRA's layers; made by `get_peft_model`, seldom by hand."""

    linear_layer = MaskLoraLinear
    quantised_layer = MaskLoraQuantised
    experts_layer = MaskLoraExperts


if MASKLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="masklora", config_cls=MaskLoraConfig, model_cls=MaskLoraModel, prefix="lora_")
