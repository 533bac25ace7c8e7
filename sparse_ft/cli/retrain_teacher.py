"""`retrain --teacher`: the sparse model learns from a dense one as well, under every method.

    sparse-ft retrain --model_name_or_path S --teacher M --kl_weight 1 --squarehead_weight 0.1 --output_dir R

`--share_teacher` holds one copy of what the two have in common. `--teacher_cache` holds no teacher at all while
training: its k most likely next tokens at every position are made once, and read from there whenever they are needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from sparse_ft.checkpoints import resolve_checkpoint
from sparse_ft.cli.arguments import option
from sparse_ft.distillation import (
    CachedTargets,
    DistillationConfig,
    check_pair,
    check_tokenizers,
    load_teacher,
    predictor,
    self_teacher,
    write_targets,
)
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_skeleton
from sparse_ft.training import wait_for_everyone

__all__ = ["TeacherArguments", "check_teacher", "check_teacher_fits", "make_teacher"]


@dataclass
class TeacherArguments(DistillationConfig):
    """What is learnt from a dense model, beside the text."""

    # every text is cut into full windows
    no_padding: bool = field(default=True, metadata={"help": "the text is cut into full sequences: leave it as it is"})
    share_teacher: bool = option(
        False, "adapters and groups: the teacher is the model's dense original; hold what they have in common once"
    )
    teacher_cache: str | None = option(
        None, "directory of the teacher's targets for KL: made with --teacher if it is new, then used in its place"
    )
    teacher_top_k: int = option(64, "--teacher_cache: tokens kept per position")

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.teacher_cache is not None

    @property
    def cached(self) -> bool:
        """Whether the targets are made already."""
        return self.teacher_cache is not None and Path(self.teacher_cache).is_dir()


def check_teacher(how: TeacherArguments, *, trains_all: bool, quantised: bool) -> None:
    """What can be refused without reading a model.

    Raises:
        ValueError: options of a teacher are given without one, or do not go together.
        FileNotFoundError: there is no such teacher.
    """
    if not how.wanted:
        for entry in dataclasses.fields(how):
            if getattr(how, entry.name) != entry.default:
                raise ValueError(
                    f"--{entry.name} was given but there is no teacher to learn from; name one with --teacher."
                )
        return
    if how.teacher is None and not how.cached:
        raise ValueError(
            f"There are no targets in --teacher_cache '{how.teacher_cache}' yet; name the model that makes them with "
            f"--teacher."
        )
    if how.teacher_cache is not None and how.feature_weights:
        name = next(iter(how.feature_weights))
        raise ValueError(
            f"--{name}_weight compares hidden states, which --teacher_cache does not hold; leave one of the two out."
        )
    if how.share_teacher and (trains_all or quantised or how.teacher_quantization or how.teacher is None):
        why = (
            "every weight is trained" if trains_all else "it is quantised" if quantised else "there are none of its own"
        )
        raise ValueError(
            f"--share_teacher holds weights of the model and its dense original once, but {why}; leave it out."
        )
    if how.teacher is not None and not how.cached:
        resolve_checkpoint(how.teacher)


def check_teacher_fits(how: TeacherArguments, student: PreTrainedModel, tokenizer: Any) -> None:
    """What can be refused once the student is read; of the teacher, only its config and tokenizer are.

    Raises:
        ValueError: the two cannot be compared, or the targets are of another vocabulary or temperature.
    """
    if not how.wanted or how.cached:
        return
    check_tokenizers(tokenizer, str(how.teacher))
    check_pair(student, load_skeleton(str(how.teacher)), how)


def make_teacher(
    how: TeacherArguments,
    student: nn.Module,
    masks: MaskSet,
    train_data: Any,
    training: TrainingArguments,
) -> nn.Module | CachedTargets:
    """The teacher, or what it left on the disk.

    Args:
        how: which.
        student: as it will be trained, so that what is frozen is known.
        masks: of the student.
        train_data: rows with `input_ids`, which targets are made of.
        training: device, precision and processes.
    """
    if how.teacher_cache is None:
        return _load(how, student, masks, training.device)
    if training.process_index == 0 and not how.cached:
        _write(how, train_data, training)
    wait_for_everyone()
    targets = CachedTargets.open(how.teacher_cache)
    if how.teacher is not None and targets.teacher != how.teacher:
        raise ValueError(
            f"The targets in '{how.teacher_cache}' are of '{targets.teacher}' but --teacher is '{how.teacher}'; leave "
            f"--teacher out to use them, or give another --teacher_cache."
        )
    return targets


def _load(how: TeacherArguments, student: nn.Module, masks: MaskSet, device: torch.device) -> nn.Module:
    if how.share_teacher:
        assert how.teacher is not None
        return self_teacher(student, masks, resolve_checkpoint(how.teacher))
    return load_teacher(how, device)


def _write(how: TeacherArguments, train_data: Any, training: TrainingArguments) -> None:
    """Run the teacher over the training text once."""
    assert how.teacher_cache is not None
    teacher = load_teacher(how, training.device)
    config: PretrainedConfig = teacher.config
    predict = predictor(teacher)
    if training.bf16:
        predict = _under_autocast(predict, training.device.type)
    write_targets(
        how.teacher_cache,
        train_data,
        predict,
        k=how.teacher_top_k,
        temperature=how.temperature,
        teacher=str(how.teacher),
        vocabulary=config.vocab_size,
        batch_size=max(1, training.per_device_train_batch_size),
        progress=not training.disable_tqdm,
    )


def _under_autocast(predict: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The same in bf16."""

    def predict_in_bf16(*args: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return predict(*args)

    return predict_in_bf16
