"""`retrain --quantization`: train an adapter on a 4-bit or 8-bit copy of the model, and merge it into the stored one.

The memory for weights while training is that of the copy. Evaluated and written is the stored model with the adapter.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from sparse_ft.cli.arguments import RetrainArguments
from sparse_ft.cli.measuring import choose_dtype
from sparse_ft.cli.retrain_methods import Method
from sparse_ft.models import load_config, model_class
from sparse_ft.naming import check_choice

__all__ = ["check_quantization", "load_quantised"]

_KINDS = ("4bit", "8bit")


def check_quantization(method: Method, how: RetrainArguments) -> None:
    """What can be refused of `--quantization` without reading a model.

    Raises:
        ValueError: if it is unknown, bitsandbytes is missing, or the method has no adapter.
    """
    if how.quantization is None:
        return
    check_choice("quantization", how.quantization, _KINDS)
    if method.perp is None or method.perp.adapter is None:
        raise ValueError(
            f"Method {method.name!r} does not train on quantised weights, which take an adapter; use mask_lora or "
            f"another adapter, alone or joined with groups, or leave out --quantization."
        )
    if find_spec("bitsandbytes") is None:
        raise ValueError("--quantization needs bitsandbytes; install it with pip install sparse-ft[quant].")


def load_quantised(source: Path, how: RetrainArguments, training: TrainingArguments) -> PreTrainedModel:
    """The checkpoint in 4 bits (nf4, double quantisation) or 8 bits, on the device of the training.

    4-bit linears compute in bfloat16 with `--bf16`, in float16 with `--fp16`, else in float32.
    """
    compute = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    quantised: Any = BitsAndBytesConfig(
        load_in_8bit=how.quantization == "8bit",
        load_in_4bit=how.quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    cls: Any = model_class(load_config(source))
    model: PreTrainedModel = cls.from_pretrained(
        source,
        dtype=choose_dtype(how.dtype),
        use_safetensors=True,
        quantization_config=quantised,
        device_map={"": training.device},
    )
    return model
