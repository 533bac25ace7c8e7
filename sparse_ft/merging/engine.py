"""Carry out a merge plan: stream every tensor, chunk by chunk, from the inputs' files into the output's.

Each thread takes whole tensors and reads, computes and writes them with buffers of its own, so one thread's computing
overlaps another's reading and writing, and memory is a few buffers per thread whatever the size of model or tensor (the
product of a LoRA adapter is formed whole, one tensor at a time). Every result depends on its tensor alone: the output's
bytes are the same for any number of threads and any layout of the input files.

The output is filled under a hidden name and published by a rename. A finished file is flushed and noted, so after a
kill the same merge goes on with the files that are missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_ft.checkpoints import check_output_dir, resumable_directory
from sparse_ft.checkpoints.header import tensor_bytes
from sparse_ft.merging.chunks import CHUNK, Job, Patch, Workspace
from sparse_ft.merging.jobs import make_job
from sparse_ft.merging.methods import METHODS
from sparse_ft.merging.operands import Inputs, operands_of
from sparse_ft.merging.output_files import OutputFiles
from sparse_ft.merging.plan import MergePlan, Source, TensorPlan, default_threads

_FORMAT = 1  # of what a digest stands for: a change of the arithmetic makes unfinished merges begin again


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        merged: number of tensors that were merged.
        copied: number of tensors taken as they are.
        bytes: size of the output's tensors.
        files: output files.
        resumed: how many of them an earlier, interrupted run had finished.
    """

    merged: int
    copied: int
    bytes: int
    files: int
    resumed: int


def execute(
    plan: MergePlan,
    output_dir: str | Path,
    *,
    threads: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Merge checkpoints into a new directory.

    Args:
        plan: what to merge.
        output_dir: new directory; it appears when it is whole.
        threads: how many tensors are worked on at once; by default as many as there are processors, at least 2 and at
            most 8. The output does not depend on it.
        progress: show a bar.
        overwrite: replace an output directory that is not empty.
        finish: called with the directory when all weights are in it and before it appears at its name, to add config,
            tokenizer and model card. It may be called again after a kill.

    Returns:
        What was done.

    Raises:
        ValueError: if the output is an input, the method is unknown, an input is damaged or has NaN or Inf.
        FileExistsError: if the output is a file, or not empty without `overwrite`.
        RuntimeError: if the disk has not enough room.

    Example:
        >>> execute(plan, "merged").merged      # doctest: +SKIP
        291
    """
    if plan.method not in METHODS:
        raise ValueError(f"Unknown merge method '{plan.method}'; there are {', '.join(METHODS)}.")
    directories = [place for model in plan.models for place in (model.path, model.adapter) if place is not None]
    check_output_dir(output_dir, inputs=directories, overwrite=overwrite)
    with ExitStack() as stack:
        inputs = Inputs(plan.models, stack)
        directory = stack.enter_context(
            resumable_directory(output_dir, key=plan_digest(plan, inputs), overwrite=overwrite)
        )
        output = OutputFiles(directory, plan)
        resumed = len(output.finished)
        stack.callback(output.close)
        _run_threads(plan, inputs, output, threads or default_threads(), progress)
        output.complete()
        if finish is not None:
            finish(directory)
        copied = sum(tensor.copy is not None for tensor in plan.tensors)
        size = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in plan.tensors)
    return MergeReport(len(plan.tensors) - copied, copied, size, len(plan.shards), resumed)


def plan_digest(plan: MergePlan, inputs: Inputs) -> str:
    """SHA-256 over everything the output follows from: the plan, and size and time of the files it reads."""
    files = sorted({reader.place(name)[0] for reader in inputs.readers for name in reader.names()})
    files += sorted(file for model in plan.models if model.adapter for file in model.adapter.iterdir())
    content = {
        "format": _FORMAT,
        "method": plan.method,
        "seed": plan.seed,
        "compatibility": plan.compatibility,
        "models": [(model.label, str(model.path), str(model.adapter)) for model in plan.models],
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "shards": plan.shards,
        "tensors": [_describe(tensor) for tensor in plan.tensors],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _describe(tensor: TensorPlan) -> list[Any]:
    def of(source: Source | None) -> list[Any] | None:
        if source is None:
            return None
        rows = None if source.rows is None else hashlib.sha256(np.ascontiguousarray(source.rows).data).hexdigest()
        return [source.model, source.name, dict(source.parameters), rows]

    sources = [of(source) for source in (*tensor.sources, *tensor.fallbacks)]
    head = [tensor.name, tensor.shape, str(tensor.dtype), dict(tensor.parameters), len(tensor.fallbacks)]
    return [*head, of(tensor.base), of(tensor.copy), *sources]


def _run_threads(plan: MergePlan, inputs: Inputs, output: OutputFiles, threads: int, progress: bool) -> None:
    """Work off all tensors of unfinished files; the first error ends it."""
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    # File after file, so that files are finished early; within a file the large tensors first, so that no thread waits.
    todo = [
        (file, tensor)
        for file, names in plan.shards
        if file not in output.finished
        for tensor in sorted((by_name[name] for name in names), key=lambda tensor: -math.prod(tensor.shape))
    ]
    waiting = iter(todo)
    lock, whole, stop = threading.Lock(), threading.Lock(), threading.Event()
    size = sum(math.prod(tensor.shape) for _, tensor in todo)
    with _progress(size, progress) as advance:

        def work() -> None:
            workspace = Workspace()
            try:
                while not stop.is_set():
                    with lock:
                        file, tensor = next(waiting, (None, None))
                    if file is None or tensor is None:
                        return
                    with whole if inputs.forms_whole(tensor) else nullcontext():
                        _do_tensor(plan, tensor, inputs, output, workspace)
                    output.tensor_done(file)
                    with lock:
                        advance(math.prod(tensor.shape))
            except BaseException:
                stop.set()
                raise

        with _single_threaded_operations(), ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work) for _ in range(threads)]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """Parallelism is over tensors: torch's own threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, unit="weight", unit_scale=True, desc="merge", disable=None if shown else True) as bar:
        yield bar.update


def _do_tensor(plan: MergePlan, tensor: TensorPlan, inputs: Inputs, output: OutputFiles, workspace: Workspace) -> None:
    if tensor.copy is not None:
        _copy(tensor, tensor.copy, inputs, output, workspace)
        return
    job = make_job(plan, tensor, inputs, workspace)
    merge = METHODS[plan.method](job)
    for start, stop in job.ranges():
        output.write(tensor, start, _cast(tensor, merge.chunk(start, stop), workspace))
    for patch in merge.settle():
        _patch(tensor, patch, output, workspace)
    workspace.trim(max(len(plan.models), 4) * CHUNK)


def _patch(tensor: TensorPlan, patch: Patch, output: OutputFiles, workspace: Workspace) -> None:
    """Replace scattered elements: the stretch they lie in is read back and written once more."""
    first, last = int(patch.places[0]), int(patch.places[-1])
    piece = workspace.get("patch", last + 1 - first, tensor.dtype)
    output.read(tensor, patch.start + first, piece)
    piece[torch.from_numpy(patch.places - first).long()] = _cast(tensor, torch.from_numpy(patch.values), workspace)
    output.write(tensor, patch.start + first, piece)


def _copy(tensor: TensorPlan, source: Source, inputs: Inputs, output: OutputFiles, workspace: Workspace) -> None:
    """Take a tensor as it is; integers never pass through a float."""
    stored = inputs.stored(source, workspace)
    job = Job(tensor.name, tensor.shape, None, [])
    if stored is not None:
        for start, stop in job.ranges():
            output.write(tensor, start, _cast(tensor, stored.stored(start, stop), workspace))
        return
    alone = TensorPlan(tensor.name, tensor.shape, tensor.dtype, None, (source,), fallbacks=tensor.fallbacks)
    (operand,) = operands_of(alone, inputs, workspace)[1]
    for start, stop in job.ranges():
        values = workspace.get("total", stop - start)
        operand.read(start, stop, values)
        output.write(tensor, start, _cast(tensor, values, workspace))


def _cast(tensor: TensorPlan, values: Tensor, workspace: Workspace) -> Tensor:
    """Round to the output's dtype, to nearest even.

    Raises:
        ValueError: if a finite value is too large for it.
    """
    if values.dtype == tensor.dtype:
        return values
    out = workspace.get("cast", values.numel(), tensor.dtype).copy_(values)
    if tensor.dtype == torch.float16 and bool((out.isinf() & values.isfinite()).any()):
        raise ValueError(f"'{tensor.name}' has values beyond 65504, the largest of float16; set out_dtype: bfloat16.")
    return out
