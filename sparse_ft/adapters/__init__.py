"""Adapters that keep a pruned model's zeros, as PEFT methods. Importing this room registers them with PEFT."""

from sparse_ft.adapters.lora_prune import LoraPruneConfig, LoraPruneModel
from sparse_ft.adapters.mask_lora import MaskLoraConfig, MaskLoraModel
from sparse_ft.adapters.mask_lora_function import mask_lora_delta, mask_lora_linear
from sparse_ft.adapters.merge_into_base import merge_into_base
from sparse_ft.adapters.perp import (
    PerpMethod,
    TrainableShare,
    group_parameters,
    merge_perp,
    parse_method,
    prepare_perp,
    trainable_share,
)
from sparse_ft.adapters.scale_lora import ScaleLoraConfig, ScaleLoraModel
from sparse_ft.adapters.scale_lora_function import scale_lora_linear, scale_lora_weight

__all__ = [
    "LoraPruneConfig",
    "LoraPruneModel",
    "MaskLoraConfig",
    "MaskLoraModel",
    "PerpMethod",
    "ScaleLoraConfig",
    "ScaleLoraModel",
    "TrainableShare",
    "group_parameters",
    "mask_lora_delta",
    "mask_lora_linear",
    "merge_into_base",
    "merge_perp",
    "parse_method",
    "prepare_perp",
    "scale_lora_linear",
    "scale_lora_weight",
    "trainable_share",
]
