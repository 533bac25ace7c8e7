"""A pruned tiny model with its masks and the dense model it comes from; what blocks are called with and give back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from adapters.sparse_models import FAMILIES as ADAPTED
from adapters.sparse_models import sparse_model
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_blocks

FAMILIES = [*ADAPTED, "neox"]
QUICK: dict[str, Any] = dict(iterations=6, learning_rate=3e-3, autocast=False, progress=False)


def pair(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, pattern: str = "unstructured"
) -> tuple[PreTrainedModel, MaskSet, PreTrainedModel]:
    """Sparse model, masks, dense model."""
    model, masks = sparse_model(name, dtype=dtype, pattern=pattern)
    return model, masks, TINY[name](0).to(dtype)


def texts(*, rows: int = 6, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    """Calibration batches of `rows` sequences in all."""
    return [tiny_batch(None, batch=rows, length=length, seed=seed)]  # type: ignore[arg-type]


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters as bytes."""
    return {n: p.detach().clone().contiguous().view(torch.uint8) for n, p in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ in any bit."""
    return {name for name, now in bits(model).items() if not torch.equal(now, before[name])}


def only(masks: MaskSet, wanted: Callable[[str], bool]) -> MaskSet:
    """The masks of some tensors."""
    names = [name for name in masks if wanted(name)]
    return MaskSet({n: masks[n] for n in names}, input_dims={n: masks.input_dims[n] for n in names})


def forward_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without labels, with decoder inputs where there is a decoder."""
    given = {key: value for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["input_ids"])
    return given | ({"use_cache": False} if model.config.model_type != "bert" else {})


def hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def block_calls(model: Any, batch: dict[str, Tensor]) -> dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Arguments and hidden states of every block in one forward of the model."""
    calls: dict[str, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.update(
                {name: (args, kwargs, hidden(output).detach().clone())}
            ),
            with_kwargs=True,
        )
        for name, block in find_blocks(model)
    ]
    model(**forward_inputs(model, batch))
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def input_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The first tensor a module is called with while `run` runs."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda inner, args, kwargs: seen.append((args[0] if args else next(iter(kwargs.values()))).clone()),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return seen[0]


def mean_square(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).square().mean())
