"""Pruned tiny models for the adapter tests."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.adapters import LoraPruneConfig, MaskLoraConfig, ScaleLoraConfig
from sparse_ft.adapters.masked_layer import MaskedExperts, MaskedLayer
from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name, find_targets, named_weights

CONFIGS = {"mask_lora": MaskLoraConfig, "scale_lora": ScaleLoraConfig, "lora_prune": LoraPruneConfig}
every_method = pytest.mark.parametrize("method", list(CONFIGS))
FAMILIES = ["llama", "gpt2", "opt", "mixtral", "bert", "t5"]
every_family = pytest.mark.parametrize("name", FAMILIES)


def sparse_model(
    name: str = "llama",
    *,
    pattern: str = "unstructured",
    dtype: torch.dtype = torch.float32,
    sparsity: float = 0.6,
    seed: int = 0,
) -> tuple[PreTrainedModel, MaskSet]:
    """A tiny model with its smallest weights pruned, and the masks. The same arguments give the same model."""
    return pruned(TINY[name](seed).to(dtype), pattern=pattern, sparsity=sparsity)


def pruned(
    model: PreTrainedModel, *, pattern: str = "unstructured", sparsity: float = 0.6
) -> tuple[PreTrainedModel, MaskSet]:
    """The model with its smallest weights pruned in place, and the masks."""
    weights, targets = named_weights(model), find_targets(model)
    masks = MaskSet.from_scores(
        {target.name: weights[target.name].detach().float().abs() for target in targets},
        pattern=pattern,
        sparsity=sparsity if pattern == "unstructured" else None,
        input_dims={target.name: target.input_dim for target in targets},
    )
    masks.apply_(model)
    return model, masks


def adapted(
    model: nn.Module, masks: MaskSet, *, method: str = "mask_lora", seed: int = 1, **options: object
) -> PeftModel:
    """A model with an adapter as it is after some training: the factors are far from where they start."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, CONFIGS[method](**{"r": 4, "masks": masks, **options}))
    perturb(peft_model, seed=seed)
    return peft_model.eval()


@torch.no_grad()
def perturb(model: nn.Module, *, adapter: str = "default", seed: int = 1) -> None:
    """Draw the adapter's factors, B included: around 0, or for ScaleLoRA around B A = 1."""
    generator = torch.Generator().manual_seed(seed)
    config = model.peft_config[adapter]
    for name, parameter in model.named_parameters():
        if f".{adapter}.weight" in name and "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if isinstance(config, ScaleLoraConfig) and not config.is_dense(canonical_name(name).partition(".lora_")[0]):
                parameter.add_(config.r**-0.5)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of the fixed batch."""
    return model(**tiny_batch(model)).logits


def train(model: nn.Module, *, steps: int = 3, lr: float = 1e-2) -> None:
    """A few AdamW steps on the fixed batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(**tiny_batch(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters by canonical name."""
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def layers_of(model: nn.Module) -> dict[str, MaskedLayer]:
    """Adapted layers by the name of their parameter."""
    layers = [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]
    return {layer.lora_mask["default"].name: layer for layer in layers}


def pair_of(layer: MaskedLayer, adapter: str = "default") -> tuple[Tensor, Tensor]:
    """A and B as PEFT holds them."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def product(layer: MaskedLayer, A: Tensor, B: Tensor) -> Tensor:
    """B A in the layout of the weight."""
    if isinstance(layer, MaskedExperts):
        return stack_product(A, B, layer.get_param().shape)
    return (B @ A).T if layer.fan_in_fan_out else B @ A


def stack_product(A: Tensor, B: Tensor, shape: torch.Size) -> Tensor:
    """B A of each expert in a stack of this shape, from the parameters as PEFT holds them."""
    experts = shape[0]
    r = A.shape[0] // experts
    each = [B[:, [j * experts + e for j in range(r)]] @ A[e * r : (e + 1) * r] for e in range(experts)]
    stack = torch.stack(each)
    return stack if stack.shape == shape else stack.mT
