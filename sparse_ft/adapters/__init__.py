"""Adapters that keep a pruned model's zeros, as PEFT methods. Importing this room registers them with PEFT."""

from sparse_ft.adapters.mask_lora import MaskLoraConfig, MaskLoraModel
from sparse_ft.adapters.mask_lora_function import mask_lora_delta, mask_lora_linear

__all__ = ["MaskLoraConfig", "MaskLoraModel", "mask_lora_delta", "mask_lora_linear"]
