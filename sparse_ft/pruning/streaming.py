"""`prune_checkpoint`: from directory to directory with one block in memory, whatever the size of the model.

Methods without calibration need no model at all: tensors are read, pruned and written one by one. With calibration the
model is built without weights, and each block's are put in while it is pruned. The result is, bit for bit, that of
`prune` on the loaded model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter, resolve_checkpoint
from sparse_ft.masks import MaskSet, Pattern
from sparse_ft.models import Target, find_blocks, find_targets, load_model, load_skeleton
from sparse_ft.models.loading import load_config
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.pruning.inside import check_inside, check_zeros
from sparse_ft.pruning.matrices import PackedMasks, prune_matrices, return_free_memory, split_matrices
from sparse_ft.pruning.plan import (
    Budget,
    Method,
    Settings,
    check_settings,
    check_target,
    divisible_targets,
    make_budgets,
    matrix_names,
)
from sparse_ft.pruning.prune import METHODS, is_calibrated, prune_with
from sparse_ft.pruning.sequential import progress_bar, prune_block_by_block
from sparse_ft.pruning.stored_weights import CannotStream, LiveModel, StoredWeights
from sparse_ft.pruning.validation import check_all_finite

logger = logging.getLogger(__name__)


def prune_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    method: str = "magnitude",
    calibration: Iterable[Any] | None = None,
    allocation: str = "uniform",
    exclude: Sequence[str] = (),
    indivisible: str = "error",
    seed: int = 0,
    update_weights: bool = True,
    block_size: int = 128,
    damping: float = 0.01,
    min_keep: float = 0.0005,
    inside: MaskSet | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> MaskSet:
    """Prune a checkpoint into a new directory, holding one block at a time.

    The weight files written have the names, tensors, dtypes and shards of the source; tensors that are not pruned are
    the same bytes. Nothing else is written: config, tokenizer and masks are the caller's to save. If the checkpoint's
    layout cannot be converted piece by piece the whole model is loaded, and a warning is logged.

    Args:
        source: directory or Hub name.
        output_dir: directory for the weight files, made if needed; use `checkpoints.atomic_directory`.
        pattern: as in `prune`, like all arguments that follow.
        sparsity: share removed.
        method: a key of `METHODS`.
        calibration: batches of token ids.
        allocation: `"uniform"`, `"erk"` or `"global"`.
        exclude: globs of modules to leave dense.
        indivisible: `"error"`, `"skip"` or `"dense_tail"`.
        seed: for `"random"`.
        update_weights: of SparseGPT.
        block_size: of SparseGPT.
        damping: of SparseGPT.
        min_keep: of allocation `"global"`.
        inside: masks of an earlier pruning that the new ones must not exceed.
        progress: show a progress bar.
        device: where the blocks run.

    Returns:
        The masks by the model's parameter names, which need not be the names in the files.

    Raises:
        ValueError: as `prune`, or the checkpoint is incomplete, or the output is the source; nothing is written then.
        FileNotFoundError: if there is no checkpoint at `source`.
    """
    settings = check_settings(
        METHODS, pattern=pattern, sparsity=sparsity, method=method, allocation=allocation, exclude=exclude,
        indivisible=indivisible, seed=seed, update_weights=update_weights, block_size=block_size, damping=damping,
        min_keep=min_keep, progress=progress,
    )  # fmt: skip
    settings = replace(settings, inside=inside)
    directory, output = resolve_checkpoint(source), Path(output_dir)
    if output.resolve() == directory.resolve():
        raise ValueError(f"The output directory '{output}' is also the source; give another output_dir.")
    reader = CheckpointReader(directory)
    try:
        job = _Streaming(directory, reader, settings, device)
    except CannotStream as reason:
        logger.warning("Loading all of '%s' into memory: %s.", directory, reason)
        return _prune_whole(directory, reader, output, settings, calibration, device)
    return job.run(output, calibration)


class _Streaming:
    """One run of `prune_checkpoint`: what is known before the work begins, and the two ways to do it."""

    def __init__(self, directory: Path, reader: CheckpointReader, settings: Settings, device: torch.device | str):
        self._reader = reader
        self._settings = settings
        self._device = device
        self._method: Method = METHODS[settings.method]
        self._model = open_skeleton(directory, reader, device)
        self._targets = divisible_targets(find_targets(self._model, exclude=settings.exclude), settings)
        self._weights = StoredWeights(self._model, reader, device)
        self._masks = PackedMasks()

    def run(self, output: Path, calibration: Iterable[Any] | None) -> MaskSet:
        method, settings, targets = self._method, self._settings, self._targets
        batches = []
        if method.statistic is not None:
            batches = prepare_calibration(self._model, calibration, settings.method)
        for piece_targets, live in self._read_targets():
            for target in piece_targets:
                check_target(target, live[target.name])
            if settings.inside is not None:
                check_zeros(settings.inside, {target.name: live[target.name] for target in piece_targets})
        check_all_finite(self._read_others(), self._reader.path)
        budgets = make_budgets(targets, settings, _StoredMatrices(targets, self._weights))
        if settings.inside is not None:
            check_inside(settings.inside, targets, budgets, by_row=method.by_row)
        with open_writer(output, self._reader) as writer:
            if is_calibrated(method, budgets):
                self._prune_blocks(batches, budgets, writer)
            else:
                self._prune_tensors(budgets, writer)
            written = {name for target in targets for name in self._weights.piece_of[target.name].stored}
            for name in self._reader.names():
                if name not in written:
                    writer.write(name, self._reader.get(name))
        return self._masks.as_mask_set(targets, settings)

    def _read_targets(self) -> Iterator[tuple[list[Target], dict[str, Tensor]]]:
        """The targets of each piece of the checkpoint, with the piece's live tensors."""
        of_piece: dict[str, list[Target]] = {}
        for target in self._targets:
            of_piece.setdefault(self._weights.piece_of[target.name].first, []).append(target)
        for first, members in of_piece.items():
            yield members, self._weights.read(self._weights.piece_of[first])

    def _read_others(self) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of parameters that are not pruned; a buffer may well hold infinities, as causal masks."""
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        pruned = {self._weights.piece_of[target.name].first for target in self._targets}
        for piece in self._weights.pieces:
            if piece.first not in pruned and parameters.intersection(piece.live):
                yield from ((name, self._reader.get(name)) for name in piece.stored)

    def _prune_tensors(self, budgets: Mapping[str, list[Budget]], writer: CheckpointWriter) -> None:
        with progress_bar(len(self._targets), self._settings, unit="tensor") as bar:
            for targets, live in self._read_targets():
                masks, _ = prune_matrices(targets, live, budgets, [], self._method, self._settings)
                self._masks.update(masks)
                self._write(targets, live, writer)
                return_free_memory()
                bar.update(len(targets))

    def _prune_blocks(
        self, batches: list[dict[str, Any]], budgets: Mapping[str, list[Budget]], writer: CheckpointWriter
    ) -> None:
        blocks = find_blocks(self._model)
        live = LiveModel(self._model, blocks, self._weights)

        def finish(block: str, masks: dict[str, Tensor]) -> None:
            self._masks.update(masks)
            targets = [target for target in self._targets if target.block == block]
            pieces = {self._weights.piece_of[target.name] for target in targets}
            tensors = {name: tensor for piece in pieces for name, tensor in live.tensors_of(piece).items()}
            self._write(targets, tensors, writer)
            del tensors
            live.drop(block)
            return_free_memory()

        try:
            prune_block_by_block(
                self._model, blocks, self._targets, budgets, batches, self._method, self._settings,
                device=self._device, load=live.fetch, finish=finish,
            )  # fmt: skip
        finally:
            live.close()

    def _write(self, targets: Sequence[Target], live: Mapping[str, Tensor], writer: CheckpointWriter) -> None:
        for piece in {self._weights.piece_of[target.name] for target in targets}:
            part = {name: live[name] for name in piece.live}
            for name, tensor in self._weights.revert(piece, part).items():
                writer.write(name, tensor)


class _StoredMatrices(Mapping[str, Tensor]):
    """Matrices of a checkpoint by matrix name, read when asked for; the tensor asked for last is kept."""

    def __init__(self, targets: Sequence[Target], weights: StoredWeights) -> None:
        self._weights = weights
        self._where = {name: (t, i) for t in targets for i, name in enumerate(matrix_names(t))}
        self._last: tuple[str, list[Tensor]] = ("", [])

    def __getitem__(self, name: str) -> Tensor:
        target, index = self._where[name]
        if self._last[0] != target.name:
            live = self._weights.read(self._weights.piece_of[target.name])
            self._last = (target.name, split_matrices(target, live[target.name]))
        return self._last[1][index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def open_skeleton(directory: Path, reader: CheckpointReader, device: torch.device | str) -> Any:
    """The model without weights, in the dtype `load_model` would give it, its buffers on the device."""
    dtype = getattr(load_config(directory), "dtype", None)
    if dtype is None:
        dtype = next((reader.dtype(n) for n in reader.names() if reader.dtype(n).is_floating_point), torch.float32)
    model = load_skeleton(directory, dtype=dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def open_writer(output: Path, reader: CheckpointReader) -> CheckpointWriter:
    """A writer of the files, names, dtypes and shapes of another checkpoint."""
    output.mkdir(parents=True, exist_ok=True)
    shards = [(file, {n: (reader.dtype(n), reader.shape(n)) for n in names}) for file, names in reader.shards]
    return CheckpointWriter(output, shards, metadata=reader.metadata)


def _prune_whole(
    directory: Path,
    reader: CheckpointReader,
    output: Path,
    settings: Settings,
    calibration: Iterable[Any] | None,
    device: torch.device | str,
) -> MaskSet:
    """For layouts that cannot be streamed: load, prune, and write the source's tensors with their new values."""
    model = load_model(directory, device=device)
    check_all_finite(model.named_parameters(), directory)
    masks = prune_with(model, settings, calibration)
    write_whole(model, directory, reader, output)
    return masks


def write_whole(model: Any, directory: Path, reader: CheckpointReader, output: Path) -> None:
    """Write a loaded model's tensors into files like those it was loaded from; what it does not know is copied.

    Args:
        model: a transformers model, plain.
        directory: where it was loaded from.
        reader: of that directory.
        output: the new directory.

    Raises:
        RuntimeError: if transformers stores one of the tensors under another name or shape.
    """
    state = revert_weight_conversion(model, model.state_dict())
    stored = {n: t for n, t in state.items() if n in reader and tuple(t.shape) == reader.shape(n)}
    places = {tensor.data_ptr() for tensor in stored.values()}
    homeless = [name for name, tensor in state.items() if tensor.data_ptr() not in places]  # a tied tensor has a home
    if homeless:
        raise RuntimeError(
            f"transformers saves '{homeless[0]}' of this model under another name or shape than '{directory}' has it; "
            f"load the model, change it in memory and use save_pretrained()."
        )
    with open_writer(output, reader) as writer:
        for name in reader.names():
            writer.write(name, stored[name].to(reader.dtype(name)) if name in stored else reader.get(name))
