"""Pruned tiny models loaded through bitsandbytes, and the same with the dequantised weights in plain linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from adapters.sparse_models import CONFIGS, layers_of, pair_of, perturb, pruned, stack_product
from adapters.wide_models import WIDE as MODELS
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name, model_class, named_weights

KINDS: dict[str, dict[str, Any]] = {
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4-double": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "int8": dict(load_in_8bit=True),
}


class Stored(NamedTuple):
    """A sparse checkpoint: where it is, its masks, and its weights by name."""

    path: Path
    masks: MaskSet
    weights: dict[str, Tensor]

    def quantised(
        self, kind: str, compute: torch.dtype = torch.float32, skip: list[str] | None = None, **options: Any
    ) -> PreTrainedModel:
        """The model, loaded in 4 or 8 bits, apart from the head and what is skipped."""
        settings = {**KINDS[kind], "llm_int8_skip_modules": ["lm_head", "cls", *(skip or [])]}
        if "load_in_4bit" in settings:
            settings["bnb_4bit_compute_dtype"] = compute
        config = BitsAndBytesConfig(**settings)
        return self._load(quantization_config=config, **options)

    def plain(self, **options: Any) -> PreTrainedModel:
        """The model as it is stored."""
        return self._load(**options)

    def _load(self, **options: Any) -> PreTrainedModel:
        return model_class(AutoConfig.from_pretrained(self.path)).from_pretrained(self.path, **options)

    def dequantised(self, quantised: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
        """The plain model with the weights of a quantised one."""
        model = self.plain(dtype=dtype)
        with torch.no_grad():
            for name, module in quantised.named_modules():
                if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
                    plain = model.get_submodule(canonical_name(f"{name}.weight").removesuffix(".weight"))
                    dense = dense_weight(module, dtype)
                    plain.weight.copy_(dense.t() if isinstance(plain, Conv1D) else dense)
        return model

    def adapted(self, method: str, kind: str, compute: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        """An adapter as it is after some training, on the quantised model."""
        return adapt(self.quantised(kind, compute), method, self.masks, **options)


def dense_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """(out, in), from code and scale of the quantised weight by hand."""
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return (module.weight.data.float() * scale[:, None] * (1 / 127)).to(dtype)
    state = module.weight.quant_state
    packed = module.weight.data.view(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1).long()
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    values = state.code[codes].view(-1, state.blocksize) * absmax.view(-1, 1)
    return values.view(state.shape).to(dtype)


def store(
    path: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, pattern: str = "unstructured", seed: int = 0
) -> Stored:
    """A sparse model, saved: half of each row's weights kept, or the largest n of every m."""
    torch.manual_seed(seed)
    model, masks = pruned(MODELS[name]().to(dtype), pattern=pattern)
    model.save_pretrained(path)
    return Stored(path, masks, {key: weight.detach().clone() for key, weight in named_weights(model).items()})


def adapt(model: nn.Module, method: str, masks: MaskSet, **options: Any) -> PeftModel:
    """An adapter with random factors; ScaleLoRA's are near those of B A = 1."""
    peft_model = get_peft_model(model, CONFIGS[method](**{"r": 4, "masks": masks, **options}))
    randomise(peft_model, method)
    return peft_model.eval()


@torch.no_grad()
def randomise(model: nn.Module, method: str, *, adapter: str = "default", seed: int = 1) -> None:
    """Draw A and B of an adapter."""
    if method != "scale_lora":
        perturb(model, adapter=adapter, seed=seed)
        return
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}.weight" in name and "lora_" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def factors(model: PeftModel, name: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """A and B beside a weight of the plain model."""
    return pair_of(layers_of(model)[name], adapter)


def effective(
    method: str, weight: Tensor, mask: Tensor, A: Tensor, B: Tensor, *, transposed: bool = False, merged: bool = False
) -> Tensor:
    """The formulas of the paper with c = 2, for a weight in the layout of its mask."""
    product = stack_product(A, B, mask.shape) if mask.ndim == 3 else (B @ A).t() if transposed else B @ A
    if method == "scale_lora":
        return weight * product
    return weight + 2 * product * (mask if merged or method == "mask_lora" else torch.ones_like(mask))
