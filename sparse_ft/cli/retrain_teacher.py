"""`retrain --teacher`: the sparse model learns from a dense one as well, under every method.

    sparse-ft retrain --model_name_or_path S --teacher M --kl_weight 1 --squarehead_weight 0.1 --output_dir R

`--share_teacher` holds one copy of what the two have in common. `--teacher_cache` holds no teacher at all while
training: its k most likely next tokens at every position are made once, and read from there whenever they are needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from sparse_ft.checkpoints import check_output_dir, resolve_checkpoint
from sparse_ft.cli.arguments import option
from sparse_ft.cli.measuring import choose_device
from sparse_ft.cli.opening import is_causal
from sparse_ft.distillation import (
    CachedTargets,
    DistillationConfig,
    check_pair,
    check_targets,
    check_tokenizers,
    load_teacher,
    predictor,
    self_teacher,
    self_teacher_bytes,
    write_targets,
)
from sparse_ft.distillation.cached_targets import TARGETS_FILE
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_skeleton
from sparse_ft.training import wait_for_everyone

__all__ = ["DEFAULT_TOP_K", "TeacherArguments", "check_teacher", "check_teacher_fits", "make_teacher"]

DEFAULT_TOP_K = 64


@dataclass
class TeacherArguments(DistillationConfig):
    """What is learnt from a dense model, beside the text."""

    no_padding: bool = field(default=True, init=False)  # every text is cut into full windows
    share_teacher: bool = option(
        False, "adapters and groups: the teacher is the model's dense original; hold what they have in common once"
    )
    teacher_cache: str | None = option(
        None, "directory of the teacher's targets for KL: made with --teacher if it is new, then used in its place"
    )
    teacher_top_k: int | None = option(None, "--teacher_cache: tokens kept per position; by default 64")

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.teacher_cache is not None

    @property
    def cached(self) -> bool:
        """Whether the targets are made already."""
        return self.teacher_cache is not None and (Path(self.teacher_cache) / TARGETS_FILE).exists()


def check_teacher(how: TeacherArguments, *, trains_all: bool, quantised: bool) -> None:
    """What can be refused without reading a model; defaults that depend on other options are filled in.

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
    if how.share_teacher:
        _check_shared(how, trains_all=trains_all, quantised=quantised)
    if how.teacher_cache is not None:
        _check_cache(how, Path(how.teacher_cache))
    _check_unused(how)
    choose_device(how.teacher_device)
    if how.teacher_quantization is not None and find_spec("bitsandbytes") is None:
        raise ValueError("--teacher_quantization needs bitsandbytes; install it with pip install sparse-ft[quant].")
    if how.teacher is not None and not how.cached:
        resolve_checkpoint(how.teacher)
    how.kl_weight = how.kl


def _check_shared(how: TeacherArguments, *, trains_all: bool, quantised: bool) -> None:
    """Raise ValueError where model and teacher have no weights in common."""
    if how.teacher is None or how.teacher_cache is not None:
        raise ValueError(
            "--share_teacher holds a teacher in the model's memory, but with --teacher_cache none is held; leave one "
            "of the two out."
        )
    if trains_all or quantised or how.teacher_quantization is not None:
        why = (
            "--method full trains every weight" if trains_all
            else "the model is quantised" if quantised
            else "the teacher is quantised"
        )  # fmt: skip
        raise ValueError(
            f"--share_teacher holds once what the model and its dense original have in common, but {why}, so that is "
            f"nothing; leave it out."
        )


def _check_cache(how: TeacherArguments, cache: Path) -> None:
    """Raise ValueError for targets that are not there and cannot be made, or are others than those asked for."""
    if how.feature_weights:
        name = next(iter(how.feature_weights))
        raise ValueError(
            f"--{name}_weight compares hidden states, which --teacher_cache does not hold; leave one of the two out."
        )
    if how.cached:
        targets = CachedTargets.open(cache)
        if how.teacher is not None and not _is_same(targets.teacher, how.teacher):
            raise ValueError(
                f"The targets in '{cache}' are of '{targets.teacher}' but --teacher is '{how.teacher}'; leave it out "
                f"to use them, or give another --teacher_cache."
            )
        if how.teacher_top_k not in (None, targets.k):
            raise ValueError(
                f"The targets in '{cache}' keep {targets.k} tokens per position but --teacher_top_k is "
                f"{how.teacher_top_k}; leave it out, or give another --teacher_cache."
            )
        how.teacher_top_k = targets.k
        return
    if how.teacher is None:
        raise ValueError(
            f"There are no targets in --teacher_cache '{cache}' yet; name the model that makes them with --teacher."
        )
    if cache.is_file() or (cache.is_dir() and any(cache.iterdir())):
        raise ValueError(
            f"--teacher_cache '{cache}' is there and holds no targets of a teacher; give a directory that is new."
        )
    check_output_dir(cache)
    how.teacher_top_k = DEFAULT_TOP_K if how.teacher_top_k is None else how.teacher_top_k


def _is_same(one: str, other: str) -> bool:
    """Whether two names mean one teacher."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _check_unused(how: TeacherArguments) -> None:
    """Raise ValueError for an option that nothing uses."""
    states = "a loss on hidden states, such as --squarehead_weight"
    uses: list[tuple[bool, tuple[str, ...], str]] = [
        (bool(how.feature_weights), ("distill_layers", "layer_weights", "skip_first"), states),
        (how.squarehead_weight > 0, ("energy", "energy_samples"), "--squarehead_weight"),
        (how.energy == "fixed", ("energy_samples",), "--energy fixed"),
        (how.kl > 0, ("temperature",), "--kl_weight"),
        (how.teacher_cache is not None, ("teacher_top_k",), "--teacher_cache"),
        (not how.share_teacher, ("teacher_dtype", "teacher_device"), "a teacher in memory of its own"),
    ]
    defaults = {entry.name: entry.default for entry in dataclasses.fields(how)}
    for used, names, needed in uses:
        given = next((name for name in names if getattr(how, name) != defaults[name]), None)
        if not used and given is not None:
            raise ValueError(f"--{given} is for {needed}, which was not asked for; leave it out.")


def check_teacher_fits(how: TeacherArguments, student: PreTrainedModel, tokenizer: Any, train_data: Any) -> None:
    """What can be refused once the student and the text are read; of the teacher, only config and tokenizer are.

    Raises:
        ValueError: the two cannot be compared, or the targets are of another vocabulary, temperature or text.
    """
    if not how.wanted:
        return
    if how.cached:
        targets = CachedTargets.open(str(how.teacher_cache))
        check_targets(student, targets, how)
        targets.check_rows(_rows(train_data))
        return
    check_tokenizers(tokenizer, str(how.teacher))
    teacher = load_skeleton(str(how.teacher))
    if not is_causal(teacher.config):
        raise ValueError(
            f"--teacher '{how.teacher}' is a {teacher.config.model_type} model, which does not predict the next token; "
            f"give a dense model of the student's kind."
        )
    check_pair(student, teacher, how)
    if how.teacher_cache is not None and int(how.teacher_top_k or 0) > teacher.config.vocab_size:
        raise ValueError(
            f"--teacher_top_k {how.teacher_top_k} is more than the teacher's vocabulary of "
            f"{teacher.config.vocab_size}; give less, usually {DEFAULT_TOP_K}."
        )


def _rows(train_data: Any) -> Iterable[torch.Tensor]:
    """Token ids of each sequence."""
    return (row for batch in train_data.iter(batch_size=1024) for row in batch["input_ids"])


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
    return CachedTargets.open(how.teacher_cache)


def _load(how: TeacherArguments, student: nn.Module, masks: MaskSet, device: torch.device) -> nn.Module:
    if not how.share_teacher:
        return load_teacher(how, device)
    assert how.teacher is not None
    teacher = self_teacher(student, masks, resolve_checkpoint(how.teacher))
    print(f"teacher in the model's memory: it adds {self_teacher_bytes(teacher, student).share:.1%} of a second model")
    return teacher


def _write(how: TeacherArguments, train_data: Any, training: TrainingArguments) -> None:
    """Run the teacher over the training text once."""
    assert how.teacher_cache is not None and how.teacher_top_k is not None
    teacher = load_teacher(how, training.device)
    config: PretrainedConfig = teacher.config
    predict = predictor(teacher)
    if training.bf16 or training.fp16:
        half = torch.bfloat16 if training.bf16 else torch.float16
        predict = _under_autocast(predict, next(teacher.parameters()).device.type, half)
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


def _under_autocast(predict: Callable[..., Any], device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The same in 16 bits, as the teacher would run beside the training."""

    def predict_in_half(*args: Any) -> Any:
        with torch.autocast(device, dtype=dtype):
            return predict(*args)

    return predict_in_half
