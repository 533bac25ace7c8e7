"""Which modules of a model make its hidden states, and how they are listened to.

A stack is a run of blocks with what follows them: the decoder of a Llama, the encoder and the decoder of a T5. Layer l
of a stack with L blocks is the output of block l, for l < L, and what the stack returns, after the final norm where it
has one, for l = L. These are transformers' `hidden_states[1:]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparse_ft.models import find_blocks

Listener = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Stack:
    """Blocks in the order they run, and the module that runs them.

    Attributes:
        name: "encoder" or "decoder" in an encoder-decoder, else "".
        module: returns the last hidden state.
        blocks: its repeated blocks.
    """

    name: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.blocks)


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    base: nn.Module = model if get_base_model is None else get_base_model()
    return base


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a model, the encoder's first.

    Args:
        model: a transformers model, or a PeftModel around one.

    Raises:
        ValueError: if it has no repeated blocks, or those of more than an encoder and a decoder.
    """
    model = bare_model(model)
    owners: dict[str, list[nn.Module]] = {}
    for name, block in find_blocks(model):
        owners.setdefault(name.rsplit(".", 2)[0] if name.count(".") > 1 else "", []).append(block)
    config = getattr(model, "config", None)
    wanted = ("encoder", "decoder") if getattr(config, "is_encoder_decoder", False) else ("",)
    if len(owners) != len(wanted):
        raise ValueError(
            f"{type(model).__name__} has {len(owners)} runs of blocks ({', '.join(owners) or 'none'}) but hidden "
            f"states are compared in {len(wanted)}: take a decoder, encoder or encoder-decoder, or kl_weight alone."
        )
    return tuple(
        Stack(name, model.get_submodule(path), tuple(blocks))
        for name, (path, blocks) in zip(wanted, owners.items(), strict=True)
    )


def predicts_next(model: nn.Module) -> bool:
    """Whether position i predicts token i + 1.

    A model of a causal class, whose labels the Trainer's label smoothing shifts, or one whose loss shifts them, such as
    subclasses, models with code of their own and decoders that images are put into. An encoder-decoder may name that
    loss without using it.
    """
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return True
    loss = getattr(model, "loss_function", None)
    return loss is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


@contextmanager
def listening(stack: Stack, layers: Iterable[int], listener: Listener) -> Iterator[None]:
    """Call `listener(layer, state)` for these layers whenever the stack runs, with state (B, T, h)."""

    def heard(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        listener(layer, first_tensor(output))

    handles: list[RemovableHandle] = []
    try:
        for layer in layers:
            module = stack.module if layer == stack.depth else stack.blocks[layer - 1]
            handles.append(module.register_forward_hook(partial(heard, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block or a stack returns: a tensor, a tuple, or a model's output."""
    if isinstance(output, Tensor):
        return output
    state = getattr(output, "last_hidden_state", None)
    found = output[0] if state is None else state
    assert isinstance(found, Tensor)
    return found


class StateRecorder:
    """Keeps the student's states of one forward pass with gradients; passes without gradients are not looked at."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def __call__(self, layer: int, state: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if layer in self.states:
            raise RuntimeError(
                f"Layer {layer} of the student ran twice in one micro-batch: hidden states can be compared only where "
                f"each block runs once; leave the weights of hidden states at 0."
            )
        self.states[layer] = state
