"""Blocks that train but would get no gradient: said in one sentence at the first step, instead of training nothing.

With reentrant activation checkpointing a block's output has a gradient only if its input has one. Under a frozen
embedding nothing has: the adapters and norms inside the blocks silently stay as they are. transformers lets the output
of the embedding require a gradient when it switches checkpointing on itself; a model with a checkpointing of its own,
or one fed with `inputs_embeds`, must see to it.

Example:
    >>> handles = watch_gradient_flow(model)         # raises in the first forward pass that cannot train its blocks
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_ft.models import find_blocks


def watch_gradient_flow(model: nn.Module) -> list[RemovableHandle]:
    """Look, once per block with trainable parameters, whether its output has a gradient.

    Without activation checkpointing nothing is watched, for there a trainable parameter is enough. Where a model
    checkpoints its blocks together with their hooks (transformers before 5.23) the look sees nothing;
    `check_gradients_came` does, one backward pass later.

    Args:
        model: the model about to be trained; an adapter may be around it.

    Returns:
        The hooks; each takes itself off after its block's first training forward pass.

    Raises:
        ValueError: if no parameter of the model is trainable.
        RuntimeError: (from the first forward pass) if a block's parameters would get no gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter of the model requires a gradient, so there is nothing to train; add an adapter, or call "
            "requires_grad_(True) on what shall train."
        )
    handles: list[RemovableHandle] = []
    if not _is_checkpointing(model):
        return handles
    for name, block in find_blocks(model):
        count = sum(parameter.requires_grad for parameter in block.parameters())
        if count:
            handles.append(_watch(name, block, count))
    return handles


def _watch(name: str, block: nn.Module, count: int) -> RemovableHandle:
    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return  # an evaluation, or a forward pass inside a checkpoint
        handle.remove()
        if not any(tensor.requires_grad for tensor in _tensors(output)):
            raise RuntimeError(_sentence(count, f"'{name}'"))

    handle = block.register_forward_hook(look)
    return handle


def check_gradients_came(model: nn.Module) -> None:
    """Check, after the first backward pass, that it reached the trainable parameters inside the blocks.

    Raises:
        RuntimeError: if there are such parameters and none of them has a gradient.
    """
    inside = [p for _, block in find_blocks(model) for p in block.parameters() if p.requires_grad]
    if inside and _is_checkpointing(model) and all(parameter.grad is None for parameter in inside):
        raise RuntimeError(_sentence(len(inside), "the blocks"))


def _is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _sentence(count: int, where: str) -> str:
    return (
        f"None of the {count} trainable tensors in {where} gets a gradient, because reentrant activation checkpointing "
        f"needs an input that requires one and the embedding is frozen; call model.enable_input_require_grads() before "
        f"training, or set use_reentrant to False."
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a block's output: one, a tuple, or a dictionary."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
