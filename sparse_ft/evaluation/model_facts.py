"""What evaluation asks of a model before it runs: its class, its config, its dtype, and which way it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; the mode it was in comes back."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DistributedDataParallel or torch.compile."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        base_of_adapter: Any = getattr(model, "get_base_model", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        elif base_of_adapter is not None:
            inner = base_of_adapter()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def class_name(model: nn.Module) -> str:
    """Name of the transformers class."""
    return type(unwrapped(model)).__name__


def config_of(model: nn.Module) -> Any:
    """The config of the text part of the model, None for a plain module."""
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def sees_the_right(name: str, config: Any) -> bool:
    """True for a masked LM, and for the LM head of a BERT-like family that was not made a decoder."""
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        family_of_both = getattr(config, "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return family_of_both and getattr(config, "is_decoder", None) is False
    return name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def dtype_line(model: nn.Module, dtype: torch.dtype | None) -> str:
    """How numbers are computed: the dtype of the weights and, if there is one, of autocast."""
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return f"{short_dtype(weights)} weights" + ("" if dtype is None else f", {short_dtype(dtype)} autocast")


def short_dtype(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
