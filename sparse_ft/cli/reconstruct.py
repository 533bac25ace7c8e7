"""`sparse-ft retrain --method reconstruct`: block by block, each made to compute what the dense one computes.

    sparse-ft retrain --method reconstruct --model_name_or_path S --dense_model M --dataset wikitext --output_dir R

Of `transformers.TrainingArguments` it uses `--max_steps` (per window; by default every calibration sequence is used
once), `--num_train_epochs`, `--learning_rate`, `--per_device_train_batch_size`, `--warmup_steps`, `--seed`, `--bf16`
(matrix products in training; the default for a model in bfloat16 and where the hardware multiplies it, which `--dtype
float32` turns off) and `--use_cpu`.
Checkpoints are streamed, so models of any size and kind will do; the perplexity before and after is measured for causal
models, and loads them.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from sparse_ft.checkpoints import (
    Record,
    atomic_directory,
    check_output_dir,
    copy_side_files,
    read_sidecars,
)
from sparse_ft.cli.arguments import (
    RETRAIN_DEFAULTS,
    EvaluationArguments,
    ModelArguments,
    RetrainArguments,
    TextArguments,
    option,
    parse,
)
from sparse_ft.cli.measuring import EvalText, choose_eval_text, choose_length, draw_calibration, load_checked, measure
from sparse_ft.cli.opening import open_source
from sparse_ft.cli.publishing import Outcome, plain_arguments, print_outcome, publish, written_weights
from sparse_ft.cli.refreshing import check_stored, is_sparse_checkpoint
from sparse_ft.cli.retrain_source import load_sparse_model, starting_evaluations
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.reconstruction import ReconstructionResult, reconstruct_checkpoint
from sparse_ft.reconstruction.settings import check_settings
from sparse_ft.reconstruction.trained import parse_training

__all__ = ["METHOD", "ReconstructArguments", "check_unused", "run"]

METHOD = "reconstruct"
_USED = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "warmup_steps",
    "seed",
    "bf16",
)
# Options that would change a training by the Trainer, with the only value that is right here.
_FIXED: dict[str, tuple[Any, str]] = {
    "save_adapter": (None, "adapters are merged window by window"),
    "quantization": (None, "it holds few blocks at a time"),
    "use_rslora": (False, "give the scale of an adapter by --lora_alpha"),
    "lora_dropout": (None, "it trains without dropout"),
    "break_symmetry": (False, "scale_lora starts as published"),
    "resume_from_checkpoint": (None, "it starts anew, and takes minutes"),
    "fp16": (False, "use --bf16"),
    "gradient_accumulation_steps": (1, "use --per_device_train_batch_size"),
    "weight_decay": (0.0, "kept weights are not to decay"),
    "lr_scheduler_type": ("linear", "the learning rate falls linearly"),
}


@dataclass
class ReconstructArguments:
    """How `--method reconstruct` goes about it."""

    dense_model: str | None = option(
        None, "reconstruct: the model it was pruned from; by default the one its record names"
    )
    reconstruct_with: str = option(
        "full", "reconstruct: what is trained: full (kept weights) or one adapter, and norms or biases, joined by +"
    )
    granularity: str = option("attn_mlp", "reconstruct: windows: attn_mlp, block, or linear (single matrices)")
    stream: str = option(
        "sparse",
        "reconstruct: sparse (inputs from the reconstructed blocks before), dense (inputs from the dense model), or "
        "sparse_to_dense (inputs as sparse, targets from the dense model)",
    )
    samples: int = option(128, "reconstruct: number of calibration sequences, drawn at random from --train_split")
    activations_dir: str | None = option(None, "reconstruct: hold activations in files there instead of in memory")


GROUPS = (ModelArguments, TextArguments, RetrainArguments, ReconstructArguments, EvaluationArguments, TrainingArguments)


def check_unused(method: str, how: ReconstructArguments) -> None:
    """Refuse options of reconstruction beside another method.

    Raises:
        ValueError: naming the option.
    """
    for entry in dataclasses.fields(how):
        if getattr(how, entry.name) != entry.default:
            raise ValueError(f"Method {method!r} does not use --{entry.name}; leave it out, or use --method {METHOD}.")


@dataclass(frozen=True)
class _Job:
    """One reconstruction: what was asked for, and what was read."""

    names: ModelArguments
    text: TextArguments
    how: RetrainArguments
    windows: ReconstructArguments
    evaluation: EvaluationArguments
    training: TrainingArguments
    output_dir: Path
    source: Path
    masks: MaskSet
    record: Record | None
    length: int
    eval_text: EvalText | None
    batches: list[dict[str, Any]]

    def settings(self) -> dict[str, Any]:
        """Every option that matters and its value."""
        ours = plain_arguments(self.names, self.text, self.how, self.windows, self.evaluation)
        return ours | {name: getattr(self.training, name) for name in _USED}

    def measure(self, directory: Path, label: str, kind: str) -> list[dict[str, Any]]:
        """The perplexity of a checkpoint as a list of one, or of none without a text."""
        if self.eval_text is None:
            return []
        model = load_checked(directory, device=self.training.device)
        result = measure(model, self.eval_text, self.length, self.evaluation, label)
        del model
        gc.collect()
        return [{**result, "kind": kind}]


def run(argv: Sequence[str]) -> int:
    """Reconstruct one checkpoint; the exit code."""
    defaults = RETRAIN_DEFAULTS | {
        "use_cpu": not torch.accelerator.is_available(),
        "max_steps": -1,
        "num_train_epochs": 1.0,
        "learning_rate": None,
    }
    groups = parse(
        argv, GROUPS, verb="retrain", description="Reconstruct a sparse checkpoint block by block.",
        defaults=defaults, required=["output_dir"],
    )  # fmt: skip
    names, _, retraining, windows, _, _ = groups
    output_dir = _check(groups)
    with open_source(names) as source:
        masks, record = _read_masks(source)
        dense = _dense_model(windows.dense_model, record, names.model_name_or_path)
        check_output_dir(output_dir, inputs=[names.model_name_or_path, dense], overwrite=retraining.overwrite)
        windows.dense_model = dense
        with open_source(ModelArguments(dense, names.allow_pickle)) as dense_source:
            return _reconstruct(_read_job(groups, output_dir, source, masks, record), dense_source, argv)


def _check(groups: Sequence[Any]) -> Path:
    """What can be refused without reading a model; the output directory."""
    names, text, how, windows, _, training = groups
    for name, (value, reason) in _FIXED.items():
        given = getattr(how if hasattr(how, name) else training, name)
        if given != value:
            raise ValueError(f"Method {METHOD!r} does not take --{name} {given}: {reason}; leave it out.")
    if how.dtype not in ("auto", "float32") or (how.dtype == "float32" and training.bf16):
        raise ValueError(
            f"Method {METHOD!r} trains weights in float32, their products in bfloat16 with --bf16, for a model in "
            f"bfloat16 or on hardware for it, else in float32 as with --dtype float32; --dtype {how.dtype} does not go "
            f"with that."
        )
    if training.max_steps == 0 or (training.max_steps < 0 and not training.num_train_epochs > 0):
        given = f"--max_steps {training.max_steps} and --num_train_epochs {training.num_train_epochs:g}"
        raise ValueError(f"{given} leave nothing to train; give one that is positive.")
    check_settings(**_options(how, windows, training), progress=True)
    if how.r is not None and parse_training(windows.reconstruct_with).weights in (None, "full"):
        raise ValueError(
            f"Method {METHOD!r} does not use --r with --reconstruct_with {windows.reconstruct_with}, which has no "
            f"adapter; leave it out, of the recipe too."
        )
    if text.dataset is None:
        raise ValueError(f"Method {METHOD!r} looks at the model's activations; name a text with --dataset.")
    return check_output_dir(training.output_dir, inputs=[names.model_name_or_path], overwrite=how.overwrite)


def _options(how: RetrainArguments, windows: ReconstructArguments, training: TrainingArguments) -> dict[str, Any]:
    """Keyword arguments of `reconstruct` that need no model."""
    batch = training.per_device_train_batch_size
    iterations: int | None = training.max_steps if training.max_steps > 0 else None
    if iterations is None and training.num_train_epochs != 1:
        iterations = math.ceil(training.num_train_epochs * math.ceil(windows.samples / max(batch, 1)))
    return {
        "train": windows.reconstruct_with,
        "granularity": windows.granularity,
        "stream": windows.stream,
        "iterations": iterations,
        "batch_size": batch,
        "learning_rate": training.learning_rate,
        "warmup": float(training.warmup_steps),
        "autocast": True if training.bf16 else False if how.dtype == "float32" else None,
        "r": 16 if how.r is None else how.r,
        "lora_alpha": how.lora_alpha,
        "seed": training.seed,
    }


def _read_masks(source: Path) -> tuple[MaskSet, Record | None]:
    """The masks of a sparse checkpoint, checked against its weights one at a time, or taken from its zeros."""
    if not is_sparse_checkpoint(source):
        return load_sparse_model(source).masks, None
    masks, record = read_sidecars(source)
    check_stored(source, masks, record, written_weights(source, masks))
    return masks, record


def _dense_model(given: str | None, record: Record | None, sparse: str) -> str:
    """The model a checkpoint was pruned from: the one that was given, else the one its record names.

    Raises:
        ValueError: if none is known, it is not there any more, or it is the sparse model.
    """
    steps = [] if record is None else [*record.history, record.step()]
    pruned = [step["arguments"].get("model_name_or_path") for step in steps if step["command"] == "prune"]
    found = given or next((name for name in reversed(pruned) if name), None)
    if found is None:
        raise ValueError(f"Nothing says which model '{sparse}' was pruned from; name it with --dense_model.")
    is_path = Path(found).is_absolute() or found.startswith(".") or found.count("/") != 1
    if given is None and is_path and not Path(found).is_dir():
        raise ValueError(
            f"'{sparse}' was pruned from '{found}', which is not there; name the model with --dense_model."
        )
    if os.path.exists(found) and os.path.realpath(found) == os.path.realpath(sparse):
        raise ValueError(f"'{sparse}' is given as the sparse and as the dense model; --dense_model is another one.")
    return found


def _read_job(groups: Sequence[Any], output_dir: Path, source: Path, masks: MaskSet, record: Record | None) -> _Job:
    """Read the texts."""
    names, text, how, windows, evaluation, training = groups
    config, tokenizer = load_config(source), load_tokenizer(source)
    length = choose_length(text.sequence_length, config, tokenizer)
    batches = draw_calibration(
        text, tokenizer, samples=windows.samples, length=length, seed=training.seed, split=how.train_split
    )
    eval_text = choose_eval_text(evaluation, text, tokenizer, config)
    return _Job(
        names, text, how, windows, evaluation, training, output_dir, source, masks, record, length, eval_text, batches
    )


def _reconstruct(job: _Job, dense: Path, argv: Sequence[str]) -> int:
    """Reconstruct, evaluate both models, and publish; a model that does not fit is refused before it is evaluated."""
    with atomic_directory(job.output_dir, overwrite=job.how.overwrite) as directory:
        result = reconstruct_checkpoint(
            job.source, dense, directory, masks=job.masks, calibration=job.batches,
            activations_dir=job.windows.activations_dir, device=job.training.device,
            **_options(job.how, job.windows, job.training),
        )  # fmt: skip
        copy_side_files(job.source, directory)
        outcome = Outcome(
            verb="retrain",
            argv=argv,
            model=job.names.model_name_or_path,
            method=job.how.method,
            arguments={**job.settings(), "learning_rate": result.learning_rate, "output_dir": str(job.output_dir)},
            evaluations=[
                *starting_evaluations(job.record, partial(job.measure, job.source)),
                *job.measure(directory, "retrained", "retrained"),
            ],
            reconstruction=[asdict(row) for row in result.windows],
            previous=job.record,
        )
        publish(directory, job.masks, outcome)
    _print_windows(result)
    print_outcome(job.output_dir, job.masks, outcome.evaluations)
    return 0


def _print_windows(result: ReconstructionResult) -> None:
    """How far the errors fell, by kind of window."""
    print(f"\n{'window':<12}{'of blocks':>10}{'error before':>14}{'after':>12}{'unchanged':>11}")
    kinds = dict.fromkeys("matrix" if result.granularity == "linear" else row.window for row in result.windows)
    for kind in kinds:
        rows = [row for row in result.windows if kind in ("matrix", row.window)]
        before, after = sum(row.loss_before for row in rows), sum(row.loss_after for row in rows)
        count, kept = len(rows), sum(not row.improved for row in rows)
        print(f"{kind:<12}{count:>10}{before / count:>14.4g}{after / count:>12.4g}{kept:>11}")
    if not any(row.improved for row in result.windows):
        print(
            "No window came closer to the dense model, so the weights are what they were: raise --max_steps, --samples "
            "or --learning_rate."
        )
