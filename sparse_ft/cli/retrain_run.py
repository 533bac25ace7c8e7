"""The directory of a run: `<output_dir>.run` holds its training checkpoints until the result is whole.

It remembers what was started in `run.json`, so that a killed run can only be continued as what it was: then it ends
with the weights it would have had.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from sparse_ft.checkpoints import atomic_write
from sparse_ft.masks import MaskSet
from sparse_ft.training import is_complete_checkpoint, latest_complete_checkpoint, wait_for_everyone

__all__ = [
    "bare_resume_flag",
    "check_left_over",
    "checkpoint_to_resume",
    "decisive_settings",
    "open_run",
    "run_dir_of",
    "run_identity",
]

RUN_FILE = "run.json"
_FLAG = "--resume_from_checkpoint"
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0", "none")
# Whatever changes the weights a run ends with: of TrainingArguments, and of our own options.
_DECISIVE = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args", "optim_target_modules", "bf16", "fp16",
    "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last",
    "load_best_model_at_end", "world_size",
)  # fmt: skip
_OURS = (
    "method", "r", "lora_alpha", "use_rslora", "lora_dropout", "break_symmetry", "dtype", "quantization", "dataset",
    "dataset_config", "text_field", "train_split",
    "teacher", "teacher_cache", "teacher_dtype", "teacher_quantization", "teacher_top_k", "ce_weight", "kl_weight",
    "squarehead_weight", "mse_weight", "cosine_weight", "temperature", "distill_layers", "layer_weights", "energy",
    "energy_samples", "skip_first",
)  # fmt: skip


def bare_resume_flag(argv: Sequence[str]) -> list[str]:
    """`--resume_from_checkpoint` without a value means true."""
    words: list[str] = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):
        words.append(word)
        if word.replace("-", "_") == _FLAG.replace("-", "_") and following.startswith("--"):
            words.append("true")
    return words


def run_dir_of(output_dir: str | Path) -> Path:
    """`out.run` for `out`."""
    path = Path(output_dir).absolute()
    return path.with_name(f"{path.name}.run")


def decisive_settings(training: TrainingArguments) -> dict[str, Any]:
    """The training arguments that change the weights a run ends with, as plain values."""
    return _plain({name: getattr(training, name, None) for name in _DECISIVE})


def run_identity(
    training: TrainingArguments, settings: Mapping[str, Any], masks: MaskSet, model: nn.Module, length: int
) -> dict[str, Any]:
    """What makes a run the run it is: masks, weights, and every setting that changes the weights it ends with.

    Args:
        training: the Trainer's settings.
        settings: our own options by name.
        masks: of the sparse model.
        model: the sparse model, before training.
        length: tokens per sequence.
    """
    digests = {"masks_digest": masks.digest(), "weights_digest": masks.weights_digest(model)}
    ours = {name: settings.get(name) for name in _OURS}
    return {**digests, **_plain({**ours, "sequence_length": length}), **decisive_settings(training)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return dict(json.loads(json.dumps(values, default=str)))


@contextlib.contextmanager
def open_run(directory: Path, wanted: Mapping[str, Any], *, resume: str | None, keep: bool) -> Iterator[str | None]:
    """The run's directory while the block lasts; yields the checkpoint to resume from, None to start.

    It is removed when the block succeeds, and also when it fails before there is a checkpoint: nothing is lost then.
    Of several processes only the first makes and removes it.

    Args:
        directory: `run_dir_of(output_dir)`.
        wanted: `run_identity` of the run that is asked for.
        resume: `--resume_from_checkpoint`: a flag, or the path of one checkpoint.
        keep: leave it when the block succeeds.

    Raises:
        FileExistsError: if there is an earlier run and it is not to be resumed.
        ValueError: if the earlier run was another one, or the checkpoint named is not whole.
    """
    checkpoint = checkpoint_to_resume(directory, wanted, resume)
    wait_for_everyone()  # each process has looked before the first one makes the directory
    if not PartialState().is_main_process:
        yield checkpoint
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(directory / RUN_FILE, json.dumps(wanted, indent=2) + "\n")
        yield checkpoint
    except BaseException:
        if any(is_complete_checkpoint(path, resumable=False) for path in directory.glob("checkpoint-*")):
            print(
                f"note: '{directory}' keeps the checkpoints of this run; go on from the last, with the same settings, "
                f"by {_FLAG} true, or remove it to start again with others.",
                file=sys.stderr,
            )
        else:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)


def checkpoint_to_resume(directory: Path, wanted: Mapping[str, Any], resume: str | None) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means, None to start from the beginning. Nothing is written.

    Raises:
        FileExistsError: if there is an earlier run and it is not to be resumed.
        ValueError: if the earlier run was another one, or the checkpoint named is not whole.
    """
    check_left_over(directory, resume)
    if resume is None or resume.lower() in _NO:
        return None
    if resume.lower() not in _YES:
        if not is_complete_checkpoint(resume):
            raise ValueError(f"'{resume}' is not a whole training checkpoint; give a checkpoint-N, or {_FLAG} true.")
        return resume
    if _is_left_over(directory):
        _check_same(directory, wanted)
    return latest_complete_checkpoint(directory)


def check_left_over(directory: Path, resume: str | None) -> None:
    """What can be told before a model is read: an earlier run is there, and it is not to be resumed.

    Args:
        directory: `run_dir_of(output_dir)`.
        resume: `--resume_from_checkpoint`.

    Raises:
        FileExistsError: if so.
    """
    if (resume is None or resume.lower() in _NO) and _is_left_over(directory):
        raise FileExistsError(
            f"'{directory}' holds an earlier run; continue it with {_FLAG} true, or remove it to start again, which "
            f"--overwrite does not."
        )


def _is_left_over(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def _check_same(directory: Path, wanted: Mapping[str, Any]) -> None:
    try:
        started = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"'{directory}' has no readable {RUN_FILE}, so it cannot be continued; remove it.") from None
    for name, value in wanted.items():
        if started.get(name) != value:
            raise ValueError(
                f"The run in '{directory}' was started with {name} {started.get(name)!r} but now it is {value!r}; "
                f"continue it as it was, or remove it to start again."
            )
