"""What a merge will do, tensor by tensor, before a weight is read: the product of a configuration, the engine's input.

A `MergePlan` holds nothing but names, numbers and places. `config.py` and its neighbours make it (from mergekit's YAML
or from plain arguments), `engine.py` carries it out, and everything that can be refused is refused while it is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

#: "paper": every method as its paper has it. "mergekit": as mergekit computes it, where the two differ.
Compatibility = Literal["paper", "mergekit"]

#: In `Source.rows`: the model has no such row.
NO_ROW = -1
#: In `Source.rows`: a row of zeros, whatever the model has.
ZERO_ROW = -2


@dataclass(frozen=True)
class MergeInput:
    """A model that takes part.

    Attributes:
        label: how the configuration names it; also keys its random masks, so two entries need two labels.
        path: local directory of a checkpoint, or of the base of `adapter`.
        adapter: local directory of a LoRA adapter to be added to the checkpoint at `path`, as scaling * B A.
    """

    label: str
    path: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class Source:
    """One input's tensor on its way into an output tensor.

    Attributes:
        model: index into `MergePlan.models`.
        name: the tensor's name in that model.
        parameters: the method's settings for this tensor of this model: `weight`, `density`, `gamma`, `epsilon`, `q`.
        rows: for a vocabulary that is not the output's: (output rows,) int64, the row of this tensor to be used, or
            `NO_ROW` where this model has none (`TensorPlan.fallbacks` says what it takes instead), or `ZERO_ROW` for
            a row of zeros. None takes the tensor as it is.
    """

    model: int
    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    rows: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor.

    Attributes:
        name: its name in the output.
        shape: its shape in the output.
        dtype: dtype it is written in.
        base: the base model's tensor; None for methods without a base.
        sources: the other models that have it. With a `copy`, only that one is read.
        parameters: settings of the whole tensor: `normalize`, `rescale`, `lambda`, `t`, `shared_drop`.
        copy: take this tensor as it is (cast to `dtype`), merging nothing: integer buffers, tensors of one model only.
        fallbacks: where a source (or the base) has `NO_ROW`, it takes the row of the first of these that has one, else
            the base's, else the mean of all `sources` that have one (in fp32), else zeros. So it is one row that
            every model without a row of its own takes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    base: Source | None
    sources: tuple[Source, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    copy: Source | None = None
    fallbacks: tuple[Source, ...] = ()


@dataclass(frozen=True)
class MergePlan:
    """A whole merge.

    Attributes:
        method: a name of `methods.METHODS`.
        models: all inputs, base included.
        tensors: all output tensors, in the order of the output's files.
        shards: for each output file its name and the names of its tensors.
        seed: seed of everything random.
        compatibility: whose formula is used where paper and mergekit differ.
    """

    method: str
    models: tuple[MergeInput, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[str, tuple[str, ...]], ...]
    seed: int = 0
    compatibility: Compatibility = "paper"


def default_threads() -> int:
    """How many tensors are worked on at once unless it is said: as many as processors, at least 2 and at most 8."""
    return min(max(os.cpu_count() or 1, 2), 8)
