"""Tiny fine-tuned models for the tests of delta pruning: a base and the same model after small, known changes."""

from __future__ import annotations

import torch
from tiny_models import TINY, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from sparse_ft.models import find_targets


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def finetuned_model(
    name: str = "llama", *, size: float = 1e-2, dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model whose every parameter was moved by N(0, size²), and a copy of its state before."""
    model = TINY[name]().to(dtype)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(dtype))
    return model.eval(), base


def batches(count: int = 2, *, batch: int = 2, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator)} for _ in range(count)]


def linear_names(model: PreTrainedModel) -> list[str]:
    return [target.name for target in find_targets(model) if target.kind != "experts"]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: tells -0 from 0."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
