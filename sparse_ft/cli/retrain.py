"""`sparse-ft retrain`: train a sparse checkpoint while every pruned weight stays exactly zero.

    sparse-ft retrain --config perp/llama_2of4 --model_name_or_path S --output_dir R

`--method mask_lora` trains adapters under the mask and merges them; `--method full` trains every weight that is left;
`--method norms`, `mask_lora+norms` and others train a small part (`cli.retrain_methods`). `--method reconstruct` works
block by block instead (`cli.reconstruct`). `--quantization 4bit` trains an adapter on a quantised copy and merges it
into the stored weights (`cli.retrain_quantised`).
Everything else is `transformers.TrainingArguments`, unchanged. Checkpoints of the run live in `<output_dir>.run`
until the result is whole; a killed run goes on with `--resume_from_checkpoint true` and ends with the same weights.

Several processes (`torchrun`, or `accelerate launch --config_file launch/ddp.yaml -m sparse_ft retrain …`) train
together with a whole copy of the model each. All of them read and evaluate; the first alone prints and writes.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from sparse_ft.adapters import merge_into_base
from sparse_ft.checkpoints import (
    atomic_directory,
    check_output_dir,
    copy_side_files,
    make_record,
    write_sidecars,
)
from sparse_ft.cli import reconstruct
from sparse_ft.cli.arguments import (
    RETRAIN_DEFAULTS,
    RETRAIN_OVERRULES,
    EvaluationArguments,
    ModelArguments,
    RetrainArguments,
    TextArguments,
    parse,
)
from sparse_ft.cli.measuring import EvalText, choose_dtype, choose_eval_text, choose_length, measure
from sparse_ft.cli.opening import is_causal, open_source
from sparse_ft.cli.publishing import (
    Outcome,
    check_finite,
    plain_arguments,
    print_outcome,
    publish,
    written_weights,
)
from sparse_ft.cli.reconstruct import ReconstructArguments, check_unused
from sparse_ft.cli.retrain_limits import check_training_values
from sparse_ft.cli.retrain_methods import Method, check_settings, choose_method, print_trainable
from sparse_ft.cli.retrain_quantised import check_quantization, load_quantised
from sparse_ft.cli.retrain_run import (
    bare_resume_flag,
    check_left_over,
    decisive_settings,
    open_run,
    run_dir_of,
    run_identity,
)
from sparse_ft.cli.retrain_source import SparseModel, load_sparse_model, starting_evaluations
from sparse_ft.cli.retrain_teacher import TeacherArguments, check_teacher, check_teacher_fits, make_teacher
from sparse_ft.data import tokens_digest, training_dataset, windows
from sparse_ft.distillation import distilling
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.training import MaskCallback, check_strategy, wait_for_everyone
from sparse_ft.training.processes import uses_every_parameter

__all__ = ["Job", "run"]

GROUPS = (
    ModelArguments,
    TextArguments,
    RetrainArguments,
    TeacherArguments,
    ReconstructArguments,
    EvaluationArguments,
    TrainingArguments,
)
TENSORBOARD = "runs"  # where transformers' TensorBoard callback writes, below the directory of the run


@dataclass(frozen=True)
class Job:
    """One retraining: what was asked for, and what was read."""

    names: ModelArguments
    how: RetrainArguments
    teacher: TeacherArguments
    evaluation: EvaluationArguments
    training: TrainingArguments
    reporters: list[TrainerCallback]
    settings: Mapping[str, Any]
    output_dir: Path
    source: Path
    tokenizer: PreTrainedTokenizerBase
    length: int
    eval_text: EvalText | None
    train_data: Any
    sparse: SparseModel

    @property
    def method(self) -> Method:
        """The way to retrain."""
        return choose_method(self.how.method)

    def measure(self, model: nn.Module, label: str, kind: str) -> list[dict[str, Any]]:
        """The perplexity of a model as a list of one, or of none without a text."""
        if self.eval_text is None:
            return []
        result = measure(model, self.eval_text, self.length, self.evaluation, label)
        return [{**result, "kind": kind}]


def run(argv: Sequence[str]) -> int:
    """Retrain one checkpoint; the exit code."""
    defaults = RETRAIN_DEFAULTS | {"use_cpu": not torch.accelerator.is_available()}
    names, text, how, teacher, windows, evaluation, training = parse(
        bare_resume_flag(argv),
        GROUPS,
        verb="retrain",
        description="Train a sparse checkpoint; its zeros stay exactly zero.",
        defaults=defaults,
        required=["output_dir"],
        overrules=RETRAIN_OVERRULES,
        check=check_training_values,
    )
    if how.method == reconstruct.METHOD:
        if training.world_size > 1:
            raise ValueError(
                f"Method 'reconstruct' works through the blocks in one process, got {training.world_size}; start it by "
                f"plain `sparse-ft retrain`."
            )
        if teacher.wanted:
            raise ValueError(
                "Method 'reconstruct' compares each block with the dense model's by itself; leave out the teacher."
            )
        check_teacher(teacher, trains_all=False, quantised=False)
        return reconstruct.run(argv)
    check_unused(choose_method(how.method).name, windows)
    groups = (names, text, how, teacher, evaluation, training)
    output_dir = _check(names, text, how, teacher, training)
    with ExitStack() as stack:
        if training.process_index > 0:
            stack.enter_context(redirect_stdout(io.StringIO()))
        source = stack.enter_context(open_source(names))
        return _retrain(_read_job(groups, output_dir, source), argv)


def _check(
    names: ModelArguments,
    text: TextArguments,
    how: RetrainArguments,
    teacher: TeacherArguments,
    training: TrainingArguments,
) -> Path:
    """What can be refused without reading a model; the output directory."""
    check_strategy(training)
    check_settings(choose_method(how.method), how)
    check_quantization(choose_method(how.method), how)
    choose_dtype(how.dtype)
    check_teacher(teacher, trains_all=choose_method(how.method).perp is None, quantised=how.quantization is not None)
    if teacher.wanted and teacher.feature_weights and training.torch_compile:
        raise ValueError(
            f"--{next(iter(teacher.feature_weights))}_weight compares hidden states, which a compiled model does not "
            f"show; leave out --torch_compile, or use --kl_weight alone."
        )
    if teacher.teacher is not None and os.path.realpath(teacher.teacher) == os.path.realpath(names.model_name_or_path):
        raise ValueError(
            f"--teacher '{teacher.teacher}' is the pruned model itself; give the dense one it was made of."
        )
    inputs = [path for path in (names.model_name_or_path, teacher.teacher, teacher.teacher_cache) if path is not None]
    output_dir = check_output_dir(training.output_dir, inputs=inputs, overwrite=how.overwrite)
    check_left_over(run_dir_of(output_dir), training.resume_from_checkpoint)
    places = [output_dir, run_dir_of(output_dir)]
    if how.save_adapter is not None:
        _check_apart("save_adapter", how.save_adapter, places)
        check_output_dir(how.save_adapter, inputs=inputs, overwrite=how.overwrite)
        places.append(Path(how.save_adapter))
    if teacher.teacher_cache is not None:
        _check_apart("teacher_cache", teacher.teacher_cache, places)
    if text.dataset is None:
        raise ValueError("No text to train on was given; name one with --dataset.")
    if training.max_steps == 0 or (training.max_steps < 0 and training.num_train_epochs <= 0):
        given = f"--max_steps {training.max_steps} and --num_train_epochs {training.num_train_epochs:g}"
        raise ValueError(f"{given} leave nothing to train; give one that is positive.")
    return output_dir


def _check_apart(option: str, place: str, others: Sequence[Path]) -> None:
    """Refuse a directory inside another that is written, or around it."""
    for other in others:
        one, two = Path(os.path.realpath(other)), Path(os.path.realpath(place))
        if one == two or one in two.parents or two in one.parents:
            raise ValueError(f"--{option} '{place}' and '{other}' are not two places; give one beside the other.")


def _read_job(groups: Sequence[Any], output_dir: Path, source: Path) -> Job:
    """Read everything that is needed before the first step; writes nothing."""
    names, text, how, teacher, evaluation, training = groups
    config = load_config(source)
    if not is_causal(config):
        raise ValueError(
            f"'{names.model_name_or_path}' is a {config.model_type} model but retrain trains next-token prediction; "
            f"train it with your own Trainer and sparse_ft.MaskCallback or MaskLoraConfig."
        )
    tokenizer = load_tokenizer(source)
    length = choose_length(text.sequence_length, config, tokenizer)
    job = Job(
        names=names,
        how=how,
        teacher=teacher,
        evaluation=evaluation,
        training=training,
        reporters=_take_reporters(training),
        settings=plain_arguments(names, text, how, evaluation, *([teacher] if teacher.wanted else [])),
        output_dir=output_dir,
        source=source,
        tokenizer=tokenizer,
        length=length,
        eval_text=choose_eval_text(evaluation, text, tokenizer, config),
        train_data=training_dataset(
            text.dataset,
            tokenizer,
            split=how.train_split,
            sequence_length=length,
            config=text.dataset_config,
            text_field=text.text_field,
        ),
        sparse=load_sparse_model(source),
    )
    job.method.check(job.sparse.model, job.sparse.masks, how, training)
    check_teacher_fits(teacher, job.sparse.model, tokenizer, job.train_data)
    return job


def _take_reporters(training: TrainingArguments) -> list[TrainerCallback]:
    """What `--report_to` names. The Trainer would call it before MaskCallback has added the sparsity to a log."""
    reporters = [kind() for kind in get_reporting_integration_callbacks(training.report_to)]
    training.report_to = []
    return reporters


def _retrain(job: Job, argv: Sequence[str]) -> int:
    """Train, and make the result; the exit code."""
    masks, settings = job.sparse.masks, {**job.settings, **decisive_settings(job.training)}
    wanted = run_identity(job.training, settings, masks, job.sparse.model, job.length)
    wanted["train_text_digest"] = tokens_digest(job.train_data)
    run_dir, resume = run_dir_of(job.output_dir), job.training.resume_from_checkpoint
    job.training.output_dir = str(run_dir)
    with open_run(run_dir, wanted, resume=resume, keep=job.how.keep_run) as checkpoint:
        outcome = Outcome(
            verb="retrain",
            argv=argv,
            model=job.names.model_name_or_path,
            method=job.how.method,
            arguments={**settings, "output_dir": str(job.output_dir)},
            evaluations=starting_evaluations(
                job.sparse.record, partial(job.measure, job.sparse.model.to(job.training.device))
            ),
            previous=job.sparse.record,
        )
        model = _train(job, checkpoint, outcome)
        wait_for_everyone()  # the run's directory is removed when the result is written
        if job.training.process_index > 0:
            return 0
        _finish(job, model, outcome)
    print_outcome(job.output_dir, masks, outcome.evaluations)
    return 0


def _train(job: Job, checkpoint: str | None, outcome: Outcome) -> nn.Module:
    """The trained model; the outcome learns what was trained and, by method, the log of the training."""
    how, masks = job.how, job.sparse.masks
    model = _model_to_train(job)
    set_seed(job.training.seed)
    evaluated = job.training.eval_strategy != "no" and job.eval_text is not None
    prepared = job.method.prepare(model, masks, how)
    outcome.trainable = job.method.trainable(prepared)
    print_trainable(outcome.trainable)
    if job.training.ddp_find_unused_parameters is None and uses_every_parameter(prepared):
        job.training.ddp_find_unused_parameters = False  # the Trainer would search in every step, and warn of it
    trainer = _trainer_of(job, prepared)(
        model=prepared,
        args=job.training,
        train_dataset=job.train_data,
        eval_dataset=_blocks(job) if evaluated else None,
        processing_class=job.tokenizer,
        data_collator=default_data_collator,
        # quantised weights are frozen, and their bytes are not the zeros that the callback checks
        callbacks=[*([] if how.quantization else [MaskCallback(masks)]), *job.reporters],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    outcome.histories = {how.method: trainer.state.log_history}
    return trainer.model


def _trainer_of(job: Job, prepared: nn.Module) -> Callable[..., Trainer]:
    """The Trainer, with a teacher where one was asked for."""
    if not job.teacher.wanted:
        return Trainer
    teacher = make_teacher(job.teacher, prepared, job.sparse.masks, job.train_data, job.training)

    def with_teacher(**options: Any) -> Trainer:
        trainer: Any = distilling(Trainer)(**options, teacher=teacher, distillation=job.teacher)
        print(trainer.distiller.describe())
        return cast(Trainer, trainer)

    return with_teacher


def _model_to_train(job: Job) -> PreTrainedModel:
    """The sparse model itself, in the dtype of the training, or a quantised copy."""
    if job.how.quantization is not None:
        job.sparse.model.to("cpu")  # where it waits to be merged into
        return load_quantised(job.source, job.how, job.training)
    dtype = choose_dtype(job.method.dtype if job.how.dtype == "auto" else job.how.dtype)
    return job.sparse.model if dtype == "auto" else job.sparse.model.to(dtype)


def _blocks(job: Job) -> list[dict[str, Any]]:
    """The evaluation text as Trainer wants it, for `--eval_strategy`."""
    assert job.eval_text is not None
    cut = windows(job.eval_text.ids, job.length)[: job.evaluation.eval_windows]
    return [{"input_ids": block, "labels": block} for block in cut]


def _finish(job: Job, trained: nn.Module, outcome: Outcome) -> None:
    """Merge, evaluate, verify and write: result and adapter appear together, or neither does."""
    how, run_dir = job.how, Path(str(job.training.output_dir))
    with ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(job.output_dir, overwrite=how.overwrite))
        if how.save_adapter is not None:
            adapter = stack.enter_context(atomic_directory(how.save_adapter, overwrite=how.overwrite))
            check_finite(trained)
            _write_adapter(job, trained, outcome, adapter)
        model = _merged(job, trained).to(job.sparse.dtype).eval()
        check_finite(model)
        outcome.evaluations = [*outcome.evaluations, *job.measure(model, "retrained", "retrained")]
        model.save_pretrained(directory)
        for name in ("config.json", "generation_config.json"):
            (directory / name).unlink(missing_ok=True)  # the Trainer switched the cache off in them
        copy_side_files(job.source, directory)
        if (run_dir / TENSORBOARD).is_dir():
            shutil.copytree(run_dir / TENSORBOARD, directory / TENSORBOARD)
        publish(directory, job.sparse.masks, outcome)


def _merged(job: Job, trained: nn.Module) -> PreTrainedModel:
    """The trained model as a plain one, on the device of the training."""
    if job.how.quantization is None:
        return job.method.finish(trained)
    assert isinstance(trained, PeftModel), "check_quantization() wants an adapter"
    merged = cast(PreTrainedModel, merge_into_base(trained, job.sparse.model))
    return merged.to(job.training.device)


def _write_adapter(job: Job, trained: Any, outcome: Outcome, directory: Path) -> None:
    """Write the adapter by itself: PEFT's directory and our two sidecars, bound to the weights it was trained on."""
    local = Path(job.names.model_name_or_path).is_dir()
    base = str(job.source.resolve()) if local else job.names.model_name_or_path
    trained.peft_config[trained.active_adapter].base_model_name_or_path = base
    masks = job.sparse.masks
    trained.save_pretrained(directory, save_embedding_layers=False)  # a head's LoRA, not the head
    record = make_record(
        masks,
        written_weights(job.source, masks),
        command=outcome.verb,
        arguments=outcome.arguments,
        previous=outcome.previous,
    )
    write_sidecars(directory, masks, record)
