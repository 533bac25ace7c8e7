"""Which checkpoint of a run to resume from after the process was killed.

`Trainer` writes `checkpoint-N` in place, in this order: weights, configuration and tokenizer, `training_args.bin`,
optimizer and scheduler, random state, `trainer_state.json`; then it deletes checkpoints beyond `save_total_limit`; then
`on_save` runs, where `MaskCallback` adds its two sidecars. A `trainer_state.json` that parses therefore marks a whole
checkpoint, and older ones are deleted only after it exists: a kill at any moment leaves one to resume from. The masks
file comes after the deletion and cannot be the mark: with `save_total_limit=1` a kill between the two would leave no
checkpoint. It is also the file resuming can do without, because the masks are in the script or in the zeros.

Every file is checked against its own length as well, for saves over an older checkpoint of the same name. Against a
loss of power (instead of the process) there is no protection: the Trainer does not flush its files to the disk.

A checkpoint without optimizer state (`save_only_model`) is a model and nothing to resume from: the Trainer would go on
with empty moments and the learning rate of step 0, and not say so. A checkpoint in which `MaskCallback` found a revived
weight while it was saved is disowned: its state is set aside as `trainer_state.refused.json`.

Several processes share the run's directory. Each writes its random state, `rng_state_<process>.pth`, by itself: a kill
between the first process's last file and another's only file leaves a checkpoint whose other process starts with other
random numbers, which matters with dropout only, and which the masks tell: they are written when all are done.

Example:
    >>> trainer.train(resume_from_checkpoint=latest_complete_checkpoint(arguments.output_dir))   # None: from the start
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_ft.checkpoints.header import read_header

# Trainer's own names: other files beside them may have any format.
_TORCH_FILES = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin|.*_model.*\.bin")
_OPTIMIZER = re.compile(r".*optimizer\.(pt|bin)|optimizer_\d+|global_step\d+")  # Trainer's, FSDP's, DeepSpeed's
_REFUSED_STATE = "trainer_state.refused.json"
_WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|(adapter|pytorch)_model(-\d+-of-\d+)?\.bin")


def latest_complete_checkpoint(run_dir: str | Path) -> str | None:
    """The checkpoint of a run with the highest step that can be resumed from, None if there is none.

    Half-written ones are skipped, not deleted: the resumed run writes over them when it reaches their step. It warns
    when it skips one because it holds a model only.

    Args:
        run_dir: the Trainer's `output_dir`; it need not exist yet.

    Returns:
        The path to give to `trainer.train(resume_from_checkpoint=…)`.
    """
    by_step: dict[int, Path] = {}
    for path in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if step.isdecimal():
            by_step[int(step)] = path
    whole = [by_step[step] for step in sorted(by_step, reverse=True) if _was_written(by_step[step])]
    found = next((path for path in whole if _has_optimizer(path)), None)
    if whole and found != whole[0]:
        warnings.warn(
            f"'{whole[0]}' holds a model without the optimizer's state (save_only_model), so training cannot go on "
            f"from it; it goes on from {f'{found.name!r}' if found else 'the beginning'}.",
            stacklevel=2,
        )
    return None if found is None else str(found)


def is_complete_checkpoint(checkpoint: str | Path, *, resumable: bool = True) -> bool:
    """Whether a Trainer's `checkpoint-N` was written to its end and can be resumed from.

    True if `trainer_state.json` is whole and of step N, there are weights and the optimizer's state, every shard that
    an index names exists, and no safetensors or torch file is shorter than it says.

    Args:
        checkpoint: its directory.
        resumable: with False the optimizer's state may be missing: it is a model that was saved whole.
    """
    checkpoint = Path(checkpoint)
    return _was_written(checkpoint) and (not resumable or _has_optimizer(checkpoint))


def disown_checkpoint(checkpoint: str | Path) -> None:
    """Make a checkpoint one that is not resumed from; its files stay, for a look at what went wrong."""
    state = Path(checkpoint) / TRAINER_STATE_NAME
    if state.is_file():
        state.replace(state.with_name(_REFUSED_STATE))


def _has_optimizer(checkpoint: Path) -> bool:
    return any(_OPTIMIZER.fullmatch(path.name) for path in checkpoint.iterdir())


def _was_written(checkpoint: Path) -> bool:
    """Whether the Trainer came to the end of a checkpoint, with or without an optimizer in it."""
    state = _read_json(checkpoint / TRAINER_STATE_NAME)
    if state is None or checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{state.get('global_step')}":
        return False
    files = [path for path in checkpoint.iterdir() if path.is_file()]
    names = {path.name for path in files}
    if not any(_WEIGHTS.fullmatch(name) for name in names):
        return False
    shards = _shards_of_indices(path for path in files if path.name.endswith(".index.json"))
    return shards is not None and shards <= names and all(_is_whole(path) for path in files)


def _read_json(path: Path) -> dict[str, object] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _shards_of_indices(indices: Iterable[Path]) -> set[str] | None:
    """File names that the weight indices list, None if an index is damaged."""
    shards: set[str] = set()
    for index in indices:
        weight_map = (_read_json(index) or {}).get("weight_map")
        if not isinstance(weight_map, dict):
            return None
        shards |= set(weight_map.values())
    return shards


def _is_whole(path: Path) -> bool:
    """Whether a file is as long as it says: safetensors state their size, torch's zip files end with their table."""
    if path.suffix == ".safetensors":
        try:
            read_header(path)
        except ValueError:
            return False
        return True
    return zipfile.is_zipfile(path) if _TORCH_FILES.fullmatch(path.name) else True
