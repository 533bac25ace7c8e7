"""The memory a recipe needs for a model of published size: formulas, and what a block's backward pass keeps, counted.

The count runs one block of a small model whose sizes are all different, and scales each side of each kept tensor to the
real one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from adapters.sparse_models import pruned
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from sparse_ft.adapters import group_parameters, parse_method, prepare_perp
from sparse_ft.models import find_targets

TOKENS, SAMPLES = 2048, 128
# width, width of the MLP, blocks, vocabulary
SIZES = {
    "Llama-2-7B": (4096, 11008, 32, 32000),
    "LLaMA-30B": (6656, 17920, 60, 32000),
    "OPT-6.7B": (4096, 16384, 32, 50272),
    "OPT-30B": (7168, 28672, 48, 50272),
}
HEAD = 128  # in all of them
NF4 = (
    1 / 2 + 1 / 64 + 4 / (64 * 256)
)  # bytes per weight: 4 bits, a scale of 8 bits per 64, one of 32 bits per 256 of those


class Kept(NamedTuple):
    """What backward needs of one block.

    Attributes:
        shapes: of the tensors it keeps besides its input, in sizes of the small model, and bytes per element.
        stream: bytes per element of what goes from block to block.
    """

    shapes: tuple[tuple[tuple[int, ...], int], ...]
    stream: int


def build(family: str, width: int, mlp: int, blocks: int, vocabulary: int, heads: int) -> PreTrainedModel:
    """A Llama, or an OPT."""
    sizes: dict[str, Any] = dict(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads
    )
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=mlp))
    config = OPTConfig(**sizes, ffn_dim=mlp, word_embed_proj_dim=width, max_position_embeddings=TOKENS)
    return OPTForCausalLM(config)


@cache
def empty_model(name: str) -> PreTrainedModel:
    """A model of published size without weights."""
    width, mlp, blocks, vocabulary = SIZES[name]
    with torch.device("meta"):
        model = build("opt" if name.startswith("OPT") else "llama", width, mlp, blocks, vocabulary, width // HEAD)
    model.tie_weights()
    return model


SMALL = dict(width=48, mlp=140, heads=4, head=12, tokens=11, rank=5)


@cache
def kept_by_a_block(family: str, method: str) -> Kept:
    """Count in a forward pass under autocast in training, with gradients for the block's input."""
    torch.manual_seed(0)
    model, masks = pruned(build(family, SMALL["width"], SMALL["mlp"], 1, 17, SMALL["heads"]).bfloat16())
    trained: nn.Module = model.float() if method == "full" else prepare_perp(model, method, masks, r=SMALL["rank"])
    trained.train()
    model.enable_input_require_grads()
    tensors: dict[int, Tensor] = {}
    streams: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        whole = tensors.get(tensor.untyped_storage().data_ptr())
        if whole is None or tensor.numel() > whole.numel():
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = saved_tensors_hooks(note, lambda tensor: tensor)
    block = model.get_submodule("model.layers.0" if family == "llama" else "model.decoder.layers.0")

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append(args[0] if args else kwargs["hidden_states"])
        hooks.__enter__()

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained(input_ids=torch.randint(3, 17, (1, SMALL["tokens"])))
    tensors.pop(streams[0].untyped_storage().data_ptr(), None)
    # without tokens among its sides it is a weight, or autocast's copy of one
    kept = [tensor for tensor in tensors.values() if SMALL["tokens"] in tensor.shape]
    assert all(tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes() for tensor in kept)
    return Kept(tuple((tuple(t.shape), t.element_size()) for t in kept), streams[0].element_size())


def scaled(kept: Kept, name: str, rank: int) -> float:
    """Bytes of these tensors for a model of published size and 2048 tokens."""
    width, mlp, _, _ = SIZES[name]
    real = {
        1: 1,
        SMALL["tokens"]: TOKENS,
        SMALL["width"]: width,
        SMALL["mlp"]: mlp,
        SMALL["heads"]: width // HEAD,
        SMALL["head"]: HEAD,
        SMALL["head"] // 2: HEAD // 2,
        SMALL["rank"]: rank,
    }
    return sum(size * math.prod(real[side] for side in shape) for shape, size in kept.shapes)


def trained_parameters(name: str, recipe: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the model's own parameters are trained, and how many factors of adapters."""
    model, targets = empty_model(name), find_targets(empty_model(name))
    if recipe["method"] == "full":
        return sum(parameter.numel() for parameter in model.parameters()), 0
    parts, rank = parse_method(recipe["method"]), int(recipe.get("r", 16))
    own = {parameter for group in parts.groups if group != "head" for parameter in group_parameters(model, group)}
    factors = rank * sum(sum(target.shape) for target in targets) if parts.adapter else 0
    if "head" in parts.groups:
        factors += rank * sum(model.get_output_embeddings().weight.shape)
    return sum(model.get_parameter(parameter).numel() for parameter in own), factors


def rows_of(name: str, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Rows of a recipe's table in bytes, by the start of their name."""
    method, rank = recipe["method"], int(recipe.get("r", 16))
    model, targets = empty_model(name), find_targets(empty_model(name))
    width, _, blocks, vocabulary = SIZES[name]
    total, masked = sum(parameter.numel() for parameter in model.parameters()), sum(t.numel for t in targets)
    if method == "reconstruct":
        return _reconstruction(name, masked, rank)
    own, factors = trained_parameters(name, recipe)
    adapter = None if method == "full" else parse_method(method).adapter
    frozen = total if adapter else total - own
    linears = masked if recipe.get("quantization") == "4bit" else 0
    kept = kept_by_a_block("opt" if name.startswith("OPT") else "llama", method)
    # autocast holds a copy in 16 bits of what plain linear layers multiply with in fp32; the head's is tiny
    copied = own if method == "full" else factors if adapter == "lora_prune" else 0
    rows = {
        "weights": NF4 * linears + 2 * (frozen - linears),
        "masks": masked / 8 if adapter or method == "full" else 0,
        "trained": 16 * (own + factors),
        "autocast's copies": 2 * copied,
        "inputs of blocks": kept.stream * TOKENS * width * blocks,
        "one block, recomputed": scaled(kept, name, rank),
        "effective weight": max(target.numel for target in targets) * _temporary(adapter, bool(linears)),
        "logits and loss": 12 * TOKENS * vocabulary,
    }
    return {row: size for row, size in rows.items() if size}


def _temporary(adapter: str | None, quantised: bool) -> int:
    """Bytes per weight while a layer runs: W + c (B A) ∘ m; W ∘ (B A) from fp32; the dequantised weight."""
    return {"mask_lora": 2, "scale_lora": 6}.get(str(adapter), 0) + (2 if quantised else 0)


def _reconstruction(name: str, masked: int, rank: int) -> dict[str, float]:
    """The sum is of what lies on the GPU; activations of all sequences wait in main memory."""
    width, mlp, blocks, _ = SIZES[name]
    family = "opt" if name.startswith("OPT") else "llama"
    window = (2 if name.startswith("OPT") else 3) * width * mlp  # of the MLP, the larger one
    return {
        "one block of each model": 2 * 2 * masked / blocks,
        "trained": 18 * max(window, 4 * width * width),  # autocast's copies among it
        "one window": scaled(kept_by_a_block(family, "full"), name, rank),
        "main memory": 4 * 2 * SAMPLES * TOKENS * width,
    }
