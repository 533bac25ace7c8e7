"""TIES trimmed as its paper has it: the largest entries of a delta over the whole model, not of each tensor.

    trim: model

A cut of the whole delta is a share of each tensor: the tensors' densities are found here, and the merge itself is the
usual one. The cut is exact. It is found without sorting: two histograms over the bits of the absolute values, whose
order is that of the numbers, and a count, each a reading of the models. Of equal entries those of the tensors written
first are kept, and within a tensor those of the lowest index.

Source: Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, section 4.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sparse_ft.merging.chunks import Workspace
from sparse_ft.merging.jobs import make_job
from sparse_ft.merging.operands import Inputs
from sparse_ft.merging.plan import MergePlan, TensorPlan, default_threads

_SHIFT = 16
_BINS = 1 << (32 - _SHIFT)
T = TypeVar("T")
#: Work on the bits of |delta| of one model, in one chunk of a tensor.
_Look = Callable[[int, NDArray[np.uint32]], None]


def densities_of_models(plan: MergePlan) -> dict[int, float]:
    """The share that each trimmed model keeps, by its index.

    Raises:
        ValueError: if the method is not TIES in the paper's form, or a model's density is not one number.
    """
    if plan.method != "ties" or plan.compatibility != "paper":
        raise ValueError(
            f"'trim: model' is how the paper of ties trims, but this is {plan.method} with compat "
            f"{plan.compatibility}; leave 'trim' out."
        )
    found: dict[int, float] = {}
    for tensor in _merged(plan):
        for source in tensor.sources:
            density = source.parameters["density"]
            if found.setdefault(source.model, density) != density:
                label = plan.models[source.model].label
                raise ValueError(
                    f"'trim: model' cuts the whole delta of '{label}' at one density, but it has "
                    f"{found[source.model]:g} and for '{tensor.name}' {density:g}; give one, or leave 'trim' out."
                )
    return {model: density for model, density in found.items() if 0.0 < density < 1.0}


def trim_whole_models(plan: MergePlan, threads: int | None = None, *, progress: bool = False) -> MergePlan:
    """The plan with the density of each tensor that one cut through each whole delta leaves it.

    Args:
        plan: of TIES; every model has one density, a share of all its merged entries.
        threads: tensors looked at at once; the result does not depend on it.
        progress: show a bar.

    Raises:
        ValueError: as `densities_of_models`, or if a weight is NaN or infinite.
    """
    densities = densities_of_models(plan)
    if not densities:
        return plan
    numel = {model: sum(math.prod(t.shape) for t in _merged(plan) if _has(t, model)) for model in densities}
    wanted = {model: round(density * numel[model]) for model, density in densities.items()}
    readings = 3 * len(_merged(plan))
    with ExitStack() as stack, tqdm(total=readings, desc="trim", unit="tensor", disable=not progress) as bar:
        inputs = Inputs(plan.models, stack)
        models = _Models(plan, inputs, set(densities), threads or default_threads(), bar.update)
        leading = {k: _cut(h, wanted[k]) for k, h in models.histograms(dict.fromkeys(densities)).items()}
        trailing = models.histograms({model: bin_ for model, (bin_, _) in leading.items()})
        values = {k: _cut(histogram, leading[k][1]) for k, histogram in trailing.items()}
        exact = {k: (leading[k][0] << _SHIFT | low, ties) for k, (low, ties) in values.items()}
        counts = models.counts({model: value for model, (value, _) in exact.items()})
    left = {model: ties for model, (_, ties) in exact.items()}
    kept: dict[tuple[str, int], int] = {}
    for tensor in _merged(plan):
        for model, (above, equal) in counts[tensor.name].items():
            taken = min(equal, left[model])
            left[model] -= taken
            kept[tensor.name, model] = above + taken
    return replace(plan, tensors=tuple(_with_densities(tensor, kept) for tensor in plan.tensors))


class _Models:
    """The deltas of a plan, looked at in chunks."""

    def __init__(
        self, plan: MergePlan, inputs: Inputs, trimmed: set[int], threads: int, advance: Callable[[], object]
    ) -> None:
        self._plan, self._inputs, self._trimmed, self._threads = plan, inputs, trimmed, threads
        self._advance = advance
        self._whole, self._local = threading.Lock(), threading.local()

    def histograms(self, inside: Mapping[int, int | None]) -> dict[int, NDArray[np.int64]]:
        """How often each value of the leading bits occurs, per model; of the trailing ones, inside a leading value."""
        total = {model: np.zeros(_BINS, np.int64) for model in inside}
        adding = threading.Lock()

        def of_tensor(tensor: TensorPlan) -> None:
            found = {model: np.zeros(_BINS, np.int64) for model in inside if _has(tensor, model)}

            def look(model: int, bits: NDArray[np.uint32]) -> None:
                bin_ = inside[model]
                if bin_ is not None:
                    bits = bits[bits >> np.uint32(_SHIFT) == np.uint32(bin_)] & np.uint32(_BINS - 1)
                else:
                    bits = bits >> np.uint32(_SHIFT)
                found[model] += np.bincount(bits, minlength=_BINS)

            self._look(tensor, look)
            with adding:  # at once: histograms of all tensors would be as large as a model
                for model, histogram in found.items():
                    total[model] += histogram

        self._map(of_tensor)
        return total

    def counts(self, values: Mapping[int, int]) -> dict[str, dict[int, tuple[int, int]]]:
        """Per tensor and model, how many entries are larger than the model's value, and how many equal to it."""

        def of_tensor(tensor: TensorPlan) -> dict[int, tuple[int, int]]:
            found = {model: (0, 0) for model in values if _has(tensor, model)}

            def look(model: int, bits: NDArray[np.uint32]) -> None:
                above, equal = found[model]
                value = np.uint32(values[model])
                found[model] = above + int((bits > value).sum()), equal + int((bits == value).sum())

            self._look(tensor, look)
            return found

        return self._map(of_tensor)

    def _map(self, work: Callable[[TensorPlan], T]) -> dict[str, T]:
        found = {}
        tensors = _merged(self._plan)
        with ThreadPoolExecutor(self._threads) as pool:
            for tensor, result in zip(tensors, pool.map(work, tensors), strict=True):
                found[tensor.name] = result
                self._advance()
        return found

    def _look(self, tensor: TensorPlan, look: _Look) -> None:
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        # Products of adapters are formed whole, of one tensor at a time.
        with self._whole if self._inputs.forms_whole(tensor) else nullcontext():
            job = make_job(self._plan, tensor, self._inputs, self._local.workspace)
            for start, stop in job.ranges():
                base = job.read_base(start, stop)
                for k, source in enumerate(tensor.sources):
                    if source.model in self._trimmed:
                        delta = job.read_delta(k, base, start, stop).abs_()
                        look(source.model, delta.numpy().view(np.uint32))


def _cut(histogram: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The bin with the smallest of the `wanted` largest entries, and how many of them lie in it."""
    above = np.concatenate([np.cumsum(histogram[::-1])[::-1][1:], np.zeros(1, np.int64)])
    bin_ = int(np.flatnonzero(above < max(wanted, 1))[0])
    return bin_, wanted - int(above[bin_])


def _merged(plan: MergePlan) -> list[TensorPlan]:
    """The tensors that are merged, in the order of the output's files."""
    return [tensor for tensor in plan.tensors if tensor.copy is None]


def _has(tensor: TensorPlan, model: int) -> bool:
    return any(source.model == model for source in tensor.sources)


def _with_densities(tensor: TensorPlan, kept: Mapping[tuple[str, int], int]) -> TensorPlan:
    """A share of which the method makes exactly this many entries."""
    if tensor.copy is not None:
        return tensor
    numel = math.prod(tensor.shape)
    sources = []
    for source in tensor.sources:
        count = kept.get((tensor.name, source.model))
        changed = {} if count is None else {"density": count / numel if numel else 1.0}
        sources.append(replace(source, parameters={**source.parameters, **changed}))
    return replace(tensor, sources=tuple(sources))
