"""Layers, embeddings and heads of a model, found from the names of its tensors: no table of architectures.

The first number in a name is the layer's: `model.layers.3.mlp.experts.5.w1.weight` is of layer 3 of the stack
`model.layers`. A model may have several stacks (encoder and decoder). What has no number stands before the layers if it
is an embedding, else after them.

Example:
    >>> layer_of("transformer.h.11.attn.c_attn.weight")
    Layer(stack='transformer.h', index=11, rest='attn.c_attn.weight')
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^((?:[^.\d][^.]*\.)*[^.\d][^.]*)\.(\d+)\.(.+)$")
_EMBEDDING_WORDS = ("embed", "wte", "wpe", "shared")
# components of names whose first dimension counts tokens
_INPUT_WORDS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings", "embedding")
_OUTPUT_WORDS = ("lm_head", "embed_out", "predictions", "output", "output_layer")
_LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Where a tensor stands: layer `index` of `stack`; `rest` is the name inside the layer."""

    stack: str
    index: int
    rest: str

    def name(self, index: int) -> str:
        """The same tensor of another layer."""
        return f"{self.stack}.{index}.{self.rest}"


def layer_of(name: str) -> Layer | None:
    """Where a tensor stands; None outside the layers."""
    match = _LAYER.match(name)
    return Layer(match[1], int(match[2]), match[3]) if match else None


def stacks_of(names: Iterable[str]) -> dict[str, int]:
    """Number of layers of every stack."""
    found: dict[str, int] = {}
    for layer in filter(None, map(layer_of, names)):
        found[layer.stack] = max(found.get(layer.stack, 0), layer.index + 1)
    return found


def main_stack(names: Iterable[str], config: Mapping[str, Any], label: str) -> str:
    """The stack whose layers are sliced and numbered anew.

    Raises:
        ValueError: if there is none, or several could be meant.
    """
    stacks = stacks_of(names)
    counts = {config[key] for key in _LAYER_KEYS if isinstance(config.get(key), int)}
    fitting = [stack for stack, count in stacks.items() if count in counts] or list(stacks)
    if len(fitting) != 1:
        found = ", ".join(f"'{stack}' with {stacks[stack]}" for stack in fitting) or "no numbered layers"
        raise ValueError(f"'slices' need one stack of layers but '{label}' has {found}; use 'modules' or 'models'.")
    return fitting[0]


def layer_count_key(config: Mapping[str, Any], count: int) -> str | None:
    """The key of config.json that holds this number of layers."""
    return next((key for key in _LAYER_KEYS if config.get(key) == count), None)


def stands_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers is used before them."""
    return any(word in name for word in _EMBEDDING_WORDS) and "embed_out" not in name


def input_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Name of the token embedding."""
    for word in _INPUT_WORDS:
        for name, shape in shapes.items():
            if len(shape) == 2 and word in name.split(".") and layer_of(name) is None:
                return name
    return None


def is_vocabulary(name: str, shape: tuple[int, ...], rows: int | None) -> bool:
    """Whether the first dimension of a tensor counts tokens.

    Args:
        name: its name.
        shape: its shape.
        rows: of the model's token embedding.
    """
    if rows is None or not shape or shape[0] != rows or layer_of(name) is not None:
        return False
    return any(part in _INPUT_WORDS or part in _OUTPUT_WORDS for part in name.split("."))


def is_head(name: str) -> bool:
    """Whether a tensor is the matrix of the language model's head, which may be tied to the token embedding."""
    parts = name.split(".")
    words = ("lm_head", "embed_out")
    return (parts[-1] == "weight" and (parts[-2:-1] or [""])[0] in words) or name == "output.weight"
