"""LoRA-Prune: ordinary LoRA in training, masked only when it is merged, as a PEFT method of its own.

    training x Wᵀ + c (x Aᵀ) Bᵀ,   merged W + c (B A) ∘ m,   c = alpha / r,   B (out, r), A (r, in), m the mask.

It trains at the speed and memory of LoRA, dropout included, and the merged model is exactly as sparse as before. But
the merged model is not the one that was trained: on the same inputs a layer's outputs differ by
x (c (B A) ∘ (1 - m))ᵀ exactly. Measure the merged model, or use MaskLoRA, which trains what it merges.

Example:
    >>> config = LoraPruneConfig(r=16, target_modules="pruned", masks=masks, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)            # train it with Trainer or SFTTrainer
    >>> model.save_pretrained("adapter")                 # PEFT's files and sparse_masks.safetensors
    >>> model = model.merge_and_unload()                 # as sparse as before

To load a saved adapter, this module has to be imported (`import sparse_ft.adapters`); without it PEFT stops at the
unknown type LORAPRUNE.

Limits: no dropout on fused experts, none of LoRA's variants.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (LoRA-Prune); r = 16 and c = 2 as in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method
from torch import Tensor

from sparse_ft.adapters.mask_lora import MaskLoraExperts
from sparse_ft.adapters.masked_config import REFUSED, MaskedLoraConfig
from sparse_ft.adapters.masked_layer import PlainLinear
from sparse_ft.adapters.masked_model import MaskedLoraModel
from sparse_ft.adapters.peft_type import add_peft_type
from sparse_ft.adapters.quantised import QuantisedLinear

LORAPRUNE = add_peft_type("LORAPRUNE")


@dataclass
class LoraPruneConfig(MaskedLoraConfig):
    """Configuration of LoRA-Prune: LoraConfig's fields, dropout included, and the masks; see `MaskedLoraConfig`.

    Raises:
        ValueError: for an option of LoraConfig that LoRA-Prune cannot honour.

    Example:
        >>> LoraPruneConfig(r=16, masks=masks, task_type="CAUSAL_LM", lora_dropout=0.05)
    """

    METHOD: ClassVar[str] = "LoRA-Prune"
    TYPE: ClassVar[PeftType] = LORAPRUNE
    REFUSED: ClassVar[dict[str, str]] = {name: why for name, why in REFUSED.items() if name != "lora_dropout"}


class LoraPruneLinear(PlainLinear):
    """LoRA-Prune around `nn.Linear`, weight (out, in), or GPT-2's Conv1D, weight (in, out)."""

    method = "LoRA-Prune"


class LoraPruneQuantised(QuantisedLinear, LoraPruneLinear):
    """LoRA-Prune around a 4-bit or 8-bit linear of bitsandbytes, see `quantised`."""


class ParamWrapper(MaskLoraExperts):
    """LoRA-Prune on a stack of fused experts: W + c B A in forward, merged as MaskLoRA is."""

    method = "LoRA-Prune"

    def _trained(self, product: Tensor, bits: Tensor) -> Tensor:
        return product


LoraPruneExperts = ParamWrapper


class LoraPruneModel(MaskedLoraModel):
    """PEFT's LoraModel with LoRA-Prune's layers; made by `get_peft_model`, seldom by hand."""

    linear_layer = LoraPruneLinear
    quantised_layer = LoraPruneQuantised
    experts_layer = LoraPruneExperts


if LORAPRUNE not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="loraprune", config_cls=LoraPruneConfig, model_cls=LoraPruneModel, prefix="lora_")
