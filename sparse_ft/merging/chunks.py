"""One tensor of a merge as its method sees it, and the loop that takes it chunk by chunk.

A method never holds a whole tensor. It is given a `Job`: operands that read any range of their elements, and the
settings of this tensor. It makes passes over them where it needs a number of the whole tensor (a threshold, a norm),
and returns a `Merge` that computes any chunk of the result. The same code runs on files, in chunks that stay in the
processor's cache, and on tensors in memory, which is what the methods' public functions do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.merging.kernels import drop, subtract
from sparse_ft.merging.plan import Compatibility

#: Elements read, computed and written at a time; compiled loops work on them in blocks that stay in the cache.
CHUNK = 1 << 18

#: Random numbers of model k for the elements `start .. stop`: bool, True = keep, or uniform ones of [0, 1).
Draw = Callable[[int, int, int], NDArray[Any]]


@dataclass(frozen=True)
class Patch:
    """Elements of the result to be replaced: `start + places` (ascending) by `values`, (n,) int32 and fp32."""

    start: int
    places: NDArray[np.int32]
    values: NDArray[np.float32]


class Operand(Protocol):
    """One input tensor, readable in pieces."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype it is stored in; None if its elements are computed."""

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Put the flat elements `start .. stop` into `out` (that many elements, fp32 or of `dtype`)."""


class Merge(Protocol):
    """A method applied to one tensor."""

    def chunk(self, start: int, stop: int) -> Tensor:
        """The merged elements `start .. stop`, fp32 or of the job's dtype, in a buffer used again by the next call."""

    def settle(self) -> Iterable[Patch]:
        """After a pass over all chunks: the elements that turn out otherwise, now that the whole is known."""


class Workspace:
    """Named buffers of one thread, allocated once and used for every tensor."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of `numel` elements; its content is whatever was there last."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[name, dtype] = torch.empty(max(numel, CHUNK), dtype=dtype)
        return buffer[:numel]

    def bools(self, name: str, numel: int) -> NDArray[np.bool_]:
        """A buffer of bools, as an array: NumPy compares several times faster than torch."""
        return np.asarray(self.get(name, numel, torch.bool).numpy(), dtype=np.bool_)

    def trim(self, numel: int) -> None:
        """Give back buffers larger than `numel` elements, which one unusual tensor needed."""
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer.numel() <= numel}


@dataclass(frozen=True)
class Job:
    """One tensor to be merged. All lists have one entry per model, the base not counted.

    Attributes:
        name: of the output tensor, for errors.
        shape: of the result.
        base: the base model's tensor; None for methods without a base.
        models: the other models' tensors.
        weights: w_k.
        densities: d_k, the share of each delta that is kept.
        gammas: share of the largest entries that breadcrumbs drops.
        epsilons: half the width of DELLA's window of probabilities.
        scales: q_k of DAREx-q.
        normalize: divide by the sum of the weights.
        rescale: make up for what sparsifying removed.
        lam: the factor on the merged delta.
        t: position between the two models of slerp.
        compatibility: whose formula, where paper and mergekit differ.
        dtype: in which the result is wanted; a method may give fp32 all the same.
        draw: random bits, for random methods.
        labels: names of the models, for errors.
        workspace: buffers.
        by_rows: chunks are whole rows of the last dimension.
    """

    name: str
    shape: tuple[int, ...]
    base: Operand | None
    models: Sequence[Operand]
    weights: Sequence[float] = ()
    densities: Sequence[float] = ()
    gammas: Sequence[float] = ()
    epsilons: Sequence[float] = ()
    scales: Sequence[float] = ()
    normalize: bool = False
    rescale: bool = False
    lam: float = 1.0
    t: float = 0.0
    compatibility: Compatibility = "paper"
    dtype: torch.dtype = torch.float32
    draw: Draw | None = None
    labels: Sequence[str] = ()
    workspace: Workspace = field(default_factory=Workspace)
    by_rows: bool = False

    @property
    def numel(self) -> int:
        """Number of elements of the result."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Length of a row; a tensor of one dimension is one row."""
        return self.shape[-1] if self.shape else 1

    def ranges(self) -> Iterator[tuple[int, int]]:
        """The chunks, in order: they follow from the shape alone, so no thread and no file changes a result."""
        size = max(CHUNK // self.row, 1) * self.row if self.by_rows and self.row else CHUNK
        for start in range(0, self.numel, size):
            yield start, min(start + size, self.numel)

    def read_base(self, start: int, stop: int) -> Tensor | None:
        """A chunk of the base, in the buffer "base"; None without one."""
        if self.base is None:
            return None
        out = self.workspace.get("base", stop - start)
        self.base.read(start, stop, out)
        return out

    def read_delta(self, k: int, base: Tensor | None, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """A chunk of model k minus the base, in `out` or the buffer "delta"; without a base, of the model itself.

        Raises:
            ValueError: if it is not finite.
        """
        if out is None:
            out = self.workspace.get("delta", stop - start)
        self.models[k].read(start, stop, out)
        if subtract(out.numpy(), base.numpy()) if base is not None else not bool(out.isfinite().all()):
            raise self.not_finite(k)
        return out

    def not_finite(self, k: int) -> ValueError:
        """What to raise if model k or the base has NaN or Inf."""
        label = f" of '{self.labels[k]}'" if self.labels else ""
        return ValueError(
            f"Tensor '{self.name}'{label} or of the base has NaN or Inf, which a merge would spread; "
            f"repair that checkpoint or leave it out."
        )

    def read_raw(self, chosen: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A chunk of the base (n,) and of models (K, n) in one dtype: bfloat16 if all are stored so, else fp32."""
        assert self.base is not None
        models, n = [self.models[k] for k in chosen], stop - start
        short = all(operand.dtype == torch.bfloat16 for operand in (self.base, *models))
        dtype = torch.bfloat16 if short else torch.float32
        base = self.workspace.get("raw base", n, dtype)
        stack = self.workspace.get("raw models", len(models) * n, dtype).view(len(models), n)
        self.base.read(start, stop, base)
        for model, row in zip(models, stack, strict=True):
            model.read(start, stop, row)
        return base, stack

    def present(self) -> list[int]:
        """The models that take part in this tensor: a weight of zero takes none."""
        return [k for k in range(len(self.models)) if self.weights[k] != 0]


class MemoryOperand:
    """A tensor in memory as an operand."""

    def __init__(self, tensor: Tensor) -> None:
        self._flat, self.dtype = tensor.detach().reshape(-1), tensor.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Copy a range."""
        out.copy_(self._flat[start:stop])


def as_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor for compiled loops: fp32 as it is, the bits of bfloat16 as uint16."""
    array: NDArray[Any] = tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array.view(np.uint16) if tensor.dtype == torch.bfloat16 else array


def run_in_memory(job: Job, merge: Merge) -> Tensor:
    """The whole result, fp32."""
    result = torch.empty(job.numel)
    for start, stop in job.ranges():
        result[start:stop] = merge.chunk(start, stop)
    for patch in merge.settle():
        result.numpy()[patch.start + patch.places] = patch.values
    return result.view(job.shape)


def keep_(values: Tensor, keep: NDArray[np.bool_]) -> None:
    """Set what is not kept to +0, in place.

    Args:
        values: (n,) fp32.
        keep: (n,) bool, True = keep.
    """
    drop(values.numpy(), keep.view(np.uint8))


def operands(tensors: Sequence[Tensor], shape: Sequence[int]) -> list[MemoryOperand]:
    """Tensors as operands, after a look at their shapes.

    Raises:
        ValueError: if there is none, or one has another shape.
    """
    if not tensors:
        raise ValueError("A merge needs at least one tensor besides the base, got none.")
    for tensor in tensors:
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"Tensors of shapes {tuple(shape)} and {tuple(tensor.shape)} cannot be merged.")
    return [MemoryOperand(tensor) for tensor in tensors]


def no_second_look(_: object = None) -> list[Patch]:
    """`Merge.settle` of methods that are done after one pass."""
    return []
