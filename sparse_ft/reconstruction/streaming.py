"""`reconstruct_checkpoint`: from directory to directory with one block of each model in memory.

Both models are built without weights, and each block's are put in while it is reconstructed. The result is, bit for
bit, that of `reconstruct` on the loaded models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter, resolve_checkpoint
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_blocks, load_model
from sparse_ft.pruning.matrices import return_free_memory
from sparse_ft.pruning.stored_weights import CannotStream, LiveModel, StoredWeights
from sparse_ft.pruning.streaming import open_skeleton, open_writer, write_whole
from sparse_ft.reconstruction.activations import keeper
from sparse_ft.reconstruction.blocks import BlockReconstruction
from sparse_ft.reconstruction.reconstruct import ReconstructionResult, reconstruct_with, result_of
from sparse_ft.reconstruction.settings import Task, check_calibration, check_models, check_settings, check_trained

logger = logging.getLogger(__name__)


def reconstruct_checkpoint(
    source: str | Path,
    dense: str | Path,
    output_dir: str | Path,
    *,
    calibration: Iterable[Any] | None,
    masks: MaskSet | None = None,
    train: str = "full",
    granularity: str = "attn_mlp",
    stream: str = "sparse",
    iterations: int | None = None,
    batch_size: int = 2,
    learning_rate: float | None = None,
    warmup: float = 0.1,
    autocast: bool | None = None,
    r: int = 16,
    lora_alpha: int | None = None,
    seed: int = 0,
    activations_dir: str | Path | None = None,
    progress: bool = True,
    device: torch.device | str = "cpu",
) -> ReconstructionResult:
    """Reconstruct a pruned checkpoint into a new directory, holding one block of it and one of the dense model.

    The weight files written have the names, tensors, dtypes and shards of the source; tensors that are not trained are
    the same bytes. Nothing else is written: config, tokenizer and masks are the caller's to save. If the layout of a
    checkpoint cannot be converted piece by piece both models are loaded, and a warning is logged.

    Args:
        source: directory or Hub name of the pruned model.
        dense: directory or Hub name of the model it was pruned from.
        output_dir: directory for the weight files, made if needed; use `checkpoints.atomic_directory`.
        calibration: as in `reconstruct`, like all arguments that follow but these two.
        masks: of the pruned model; by default those in `source`.
        train: what is trained.
        granularity: the windows.
        stream: their inputs and targets.
        iterations: steps per window.
        batch_size: sequences per step.
        learning_rate: at its peak.
        warmup: steps, or a share.
        autocast: of training steps.
        r: rank of an adapter.
        lora_alpha: of an adapter.
        seed: of everything random.
        activations_dir: directory for activations.
        progress: show a progress bar.
        device: where the blocks run.

    Raises:
        ValueError: as `reconstruct`, or the checkpoints are incomplete or one of them is the output; nothing is written
            then.
        FileNotFoundError: if there is no checkpoint, or no masks.
        RuntimeError: as `reconstruct`.
    """
    settings = check_settings(
        train=train, granularity=granularity, stream=stream, iterations=iterations, batch_size=batch_size,
        learning_rate=learning_rate, warmup=warmup, autocast=autocast, r=r, lora_alpha=lora_alpha, seed=seed,
        progress=progress,
    )  # fmt: skip
    directory, dense_directory, output = resolve_checkpoint(source), resolve_checkpoint(dense), Path(output_dir)
    if dense_directory.resolve() == directory.resolve():
        raise ValueError(f"'{directory}' is both the sparse and the dense model; give the one it was pruned from.")
    if output.resolve() in (directory.resolve(), dense_directory.resolve()):
        raise ValueError(f"The output directory '{output}' is also an input; give another output_dir.")
    masks = MaskSet.load(directory) if masks is None else masks
    task = Task(masks, settings, calibration, activations_dir)
    return _reconstruct(directory, dense_directory, output, task, device)


def _reconstruct(
    directory: Path, dense_directory: Path, output: Path, task: Task, device: torch.device | str
) -> ReconstructionResult:
    reader, dense_reader = CheckpointReader(directory), CheckpointReader(dense_directory)
    try:
        sparse, dense = _Side(directory, reader, device), _Side(dense_directory, dense_reader, device)
    except CannotStream as reason:
        logger.warning("Loading all of '%s' and '%s' into memory: %s.", directory, dense_directory, reason)
        model, whole = load_model(directory, device=device), load_model(dense_directory, device=device)
        result = reconstruct_with(model, whole, task)
        write_whole(model, directory, reader, output)
        return result
    return _stream(sparse, dense, output, task, device)


class _Side(Mapping[str, Tensor]):
    """One of the two checkpoints: its model without weights, and its tensors by the model's names, read when asked for.

    Args:
        directory: of the checkpoint.
        reader: of the directory.
        device: where tensors are put.
    """

    def __init__(self, directory: Path, reader: CheckpointReader, device: torch.device | str) -> None:
        self.reader = reader
        self.model = open_skeleton(directory, reader, device)
        self.weights = StoredWeights(self.model, reader, device)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.read(self.weights.piece_of[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.piece_of)

    def __len__(self) -> int:
        return len(self.weights.piece_of)


def _stream(sparse: _Side, dense: _Side, output: Path, task: Task, device: torch.device | str) -> ReconstructionResult:
    masks, settings = task.masks, task.settings
    check_models(sparse.model, dense.model)
    masks.verify(sparse)
    groups = check_trained(sparse.model, masks, settings)
    batches = check_calibration(sparse.model, task.calibration, settings.batch_size)
    run = BlockReconstruction(
        sparse.model, dense.model, masks, groups, batches, settings,
        device=device, dense_device=device, keep=keeper(device, task.activations_dir),
    )  # fmt: skip
    live, dense_live = (LiveModel(side.model, find_blocks(side.model), side.weights) for side in (sparse, dense))
    written: set[str] = set()
    try:
        with open_writer(output, sparse.reader) as writer:

            def load(block: str) -> None:
                live.fetch(block)
                dense_live.fetch(block)

            def finish(block: str, changed: Sequence[str]) -> None:
                written.update(_write(sparse.weights, live, changed, writer))
                live.drop(block)
                dense_live.drop(block)
                return_free_memory()

            run.run(load=load, finish=finish)
            for name in sparse.reader.names():
                if name not in written:
                    writer.write(name, sparse.reader.get(name))
    finally:
        live.close()
        dense_live.close()
    return result_of(run, settings, batches)


def _write(weights: StoredWeights, live: LiveModel, changed: Sequence[str], writer: CheckpointWriter) -> list[str]:
    """Write the stored tensors that hold the changed ones; their names."""
    written = []
    for piece in dict.fromkeys(weights.piece_of[name] for name in changed):
        for name, tensor in weights.revert(piece, live.tensors_of(piece)).items():
            writer.write(name, tensor)
            written.append(name)
    return written
