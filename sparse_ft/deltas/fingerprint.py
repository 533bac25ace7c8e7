"""Tell one base from another without reading all of it: a digest over evenly spaced values of every tensor.

Another model, another revision or another fine-tune differs nearly everywhere, so 1024 values of each tensor are enough
to refuse a wrong base in milliseconds. A change of a few single weights is not noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ft.deltas.delta_header import Part
from sparse_ft.deltas.scope import sample_values

#: Fine-tunes change weights by one or two orders less on average. Beyond it the base is probably another one, and if
#: it is the right one, random pruning fails and ranked pruning is chosen.
LARGE_DELTA = 1e-2


def base_digest(parts: Mapping[str, Part], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and at most 1024 values of each tensor, rounded to bfloat16.

    The rounding makes a base in float32 and the same base loaded in bfloat16 equal.

    Args:
        parts: of a delta's header; only those with a delta are looked at, or if there are none, those of kind `"base"`.
        tensors: of a checkpoint, or of a live model.
    """
    sha = hashlib.sha256()
    pruned = [name for name, part in parts.items() if part.mask != "none"]
    for name in sorted(pruned or [name for name, part in parts.items() if part.kind == "base"]):
        tensor = tensors[name][: parts[name].rows] if parts[name].kind == "resized" else tensors[name]
        values = sample_values(tensor).to(torch.bfloat16).contiguous()
        sha.update(f"{name}|{tuple(tensor.shape)}|".encode() + values.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def too_large(mean: float) -> str | None:
    """A sentence if the mean |delta| is that of another model rather than of a fine-tune, else None."""
    if mean <= LARGE_DELTA:
        return None
    return (
        f"The mean |delta| is {mean:.2g}, where fine-tuning usually leaves less than {LARGE_DELTA:g}: check that the "
        f"base is the one it was trained from, and if it is, prune by magnitude or wanda rather than at random."
    )
