"""What a merge will need of memory, from its plan: nothing of it grows with the number of tensors.

    now resident + threads x buffers of a chunk + what single tensors need as a whole + masks

As a whole are formed the products of adapters (one tensor at a time), and, in a small part, the deltas that are cut at
a rank: the values near the cut are collected.
"""

from __future__ import annotations

import heapq
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from sparse_ft.deltas.lora import LoraTarget
from sparse_ft.deltas.random_mask import GAP_BLOCK, GAPS_UP_TO
from sparse_ft.merging import chunks
from sparse_ft.merging.inputs import OpenModel
from sparse_ft.merging.methods import BY_ROWS
from sparse_ft.merging.plan import MergePlan, Source, TensorPlan

_BUFFERS = 10 * 4  # bytes per element of a chunk: base, delta, sums, signs, a piece as stored, a piece as written
_BUFFERS_OF_ROWS = 5 * 8  # more where rows are ranked: 64 bit keys, ranks, probabilities, random numbers
_CUT = frozenset({"ties", "breadcrumbs", "breadcrumbs_ties"})
_NEAR_A_CUT = 0.014 * 12  # bytes per element: up to 1.4% of the values are collected, and sorted in a copy
_COMPILED = 70_000_000  # the compiled loops, which are loaded when they are first used
_TRANSFORMERS = 200_000_000  # loading it, to find the prunable weights


def peak_bytes(plan: MergePlan, models: Mapping[str, OpenModel], threads: int, *, pruned_again: bool = False) -> int:
    """An estimate of the most memory the process will have resident during a merge.

    Args:
        plan: the merge.
        models: every model, by label, in the plan's order.
        threads: tensors worked on at once.
        pruned_again: whether masks are made from the merged weights.
    """
    total = resident_bytes() + _COMPILED + threads * _bytes_of_thread(plan)
    opened = list(models.values())
    total += max((_bytes_of_products(tensor, opened) for tensor in plan.tensors), default=0)
    if plan.method in _CUT:
        total += sum(heapq.nlargest(threads, (_bytes_of_cuts(tensor) for tensor in plan.tensors)))
    if pruned_again:
        total += 2 * sum(-(-math.prod(tensor.shape) // 8) for tensor in plan.tensors if len(tensor.shape) > 1)
        total += 0 if "transformers" in sys.modules else _TRANSFORMERS
    return total


def resident_bytes() -> int:
    """Memory this process has now; where the system does not say, the most it ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _bytes_of_thread(plan: MergePlan) -> int:
    """Buffers of one thread: a chunk of everything, or as many rows as fill one."""
    if plan.method not in BY_ROWS:
        drawn = [s for t in plan.tensors for s in t.sources if s.parameters.get("density", 1.0) <= GAPS_UP_TO]
        return _BUFFERS * chunks.CHUNK + (len(plan.models) * GAP_BLOCK if drawn else 0)
    row = max((tensor.shape[-1] for tensor in plan.tensors if tensor.shape), default=1)
    return (_BUFFERS + _BUFFERS_OF_ROWS) * max(chunks.CHUNK, row)


def _bytes_of_cuts(tensor: TensorPlan) -> int:
    """Values collected near the cuts of a tensor's deltas."""
    cut = sum(0.0 < source.parameters.get("density", 1.0) < 1.0 for source in tensor.sources)
    return int(_NEAR_A_CUT * cut * math.prod(tensor.shape))


def _bytes_of_products(tensor: TensorPlan, models: list[OpenModel]) -> int:
    """Products of adapters that are there at once for one tensor, and what forming the last of them takes beside."""
    sources = [tensor.copy] if tensor.copy else [*filter(None, [tensor.base]), *tensor.sources, *tensor.fallbacks]
    targets = [target for source in sources if (target := _target(source, models)) is not None]
    if not targets:
        return 0
    beside = max(math.prod(t.shape) * (4 if t.magnitude else int(t.transposed)) for t in targets)
    return 4 * (sum(math.prod(target.shape) for target in targets) + beside)


def _target(source: Source | None, models: list[OpenModel]) -> LoraTarget | None:
    adapter = models[source.model].adapter if source is not None else None
    return adapter.get(source.name) if adapter is not None and source is not None else None
