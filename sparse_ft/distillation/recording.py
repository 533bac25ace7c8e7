"""What a forward pass leaves behind: the states of compared layers, what enters the output head, the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.distillation.head import Head
from sparse_ft.distillation.output_head import output_head, output_module
from sparse_ft.distillation.stacks import Stack, StateRecorder, bare_model


@dataclass
class Recording:
    """What one forward pass leaves behind.

    Attributes:
        states: by stack, the states of the compared layers.
        head_input: what entered the output head, (B, T, h); the last hidden state where the head's module is not called
            because the trainer multiplies by its weight, as TRL's does.
        logits: what came out of the model: of the first token only where the head was cut short.
        decoder_inputs: what the decoder of an encoder-decoder was called with.
    """

    states: tuple[StateRecorder, ...] = ()
    head_input: Tensor | None = None
    logits: Tensor | None = None
    decoder_inputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def watching(model: nn.Module, record: Recording, *, cut_head: bool, with_gradient: bool) -> Iterator[None]:
    """Record what enters the output head and the decoder, and the logits, while the block lasts.

    Args:
        model: a plain transformers model.
        record: is filled.
        cut_head: let the head see the first token of each row only.
        with_gradient: look at passes with gradients only.
    """

    def entering(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        if with_gradient and not torch.is_grad_enabled():
            return None
        record.head_input = args[0]
        # contiguous, or the product becomes one per row, each reading the whole weight
        return (args[0][:, :1].contiguous(), *args[1:]) if cut_head else None

    def behind(_module: nn.Module, _args: Any, output: Any) -> None:
        if not with_gradient or torch.is_grad_enabled():
            record.head_input = getattr(output, "last_hidden_state", None)

    def decoding(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in ("input_ids", "inputs_embeds"):
            if kwargs.get(name) is not None:
                record.decoder_inputs = {f"decoder_{name}": kwargs[name].detach()}

    def leaving(_module: nn.Module, _args: Any, output: Any) -> None:
        if with_gradient and not torch.is_grad_enabled():
            return
        record.logits = getattr(output, "logits", None)

    head, config = output_module(model), getattr(model, "config", None)
    handles = [model.register_forward_hook(leaving)]
    if head is not None:
        handles.append(head.register_forward_pre_hook(entering))
        backbone: Any = getattr(model, "base_model", model)
        if backbone is not model:
            handles.append(backbone.register_forward_hook(behind))
    if getattr(config, "is_encoder_decoder", False):
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        handles.append(decoder.register_forward_pre_hook(decoding, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_recorded(stack: Stack, layers: set[int], recorder: StateRecorder) -> None:
    """Raise RuntimeError unless every compared layer left a state with a gradient."""
    missing = sorted(layers - set(recorder.states))
    if missing:
        raise RuntimeError(
            f"Layer {missing[0]} of the student left no state with a gradient, as a compiled one does not: leave "
            f"torch_compile off, and checkpoint activations with {{'use_reentrant': False}}."
        )


def predictor(teacher: nn.Module) -> Callable[[Tensor, Tensor], tuple[Tensor, Head]]:
    """What `write_targets` asks for: a teacher's states in front of its head, and the head.

    Args:
        teacher: a frozen causal model in eval mode.

    Example:
        >>> write_targets("targets", dataset, predictor(teacher), vocabulary=teacher.config.vocab_size)
    """
    device = next(teacher.parameters()).device

    def predict(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Head]:
        seen = Recording()
        with watching(bare_model(teacher), seen, cut_head=True, with_gradient=False):
            teacher(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
        assert seen.head_input is not None, "output_head() refuses models without a head"
        return seen.head_input, output_head(teacher)

    return predict
