"""`sparse-ft eval`: perplexity and zero-shot tasks of a checkpoint or an adapter, with how they were measured.

    sparse-ft eval S --dataset wikitext --sequence_length 2048
    sparse-ft eval S --tasks perp                                  # boolq rte hellaswag winogrande arc_easy ...

Any Hugging Face directory or Hub name can be evaluated, an adapter directory too, as it was trained or with `--merge`
as it would be saved. A checkpoint of ours keeps the results: `sparse_ft.json` gains entries and `report.html` is made
anew, unless `--no_record` or an `--output_dir` is given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.checkpoints import CheckpointReader, atomic_directory, check_output_dir, read_sidecars, versions
from sparse_ft.checkpoints.resolve import member
from sparse_ft.cli.arguments import EvalArguments, ModelArguments, TextArguments, first_word_is_model, parse
from sparse_ft.cli.measuring import choose_device, choose_dtype, choose_length, find_split, load_checked
from sparse_ft.cli.opening import open_source
from sparse_ft.cli.publishing import command_line, plain_arguments, print_tasks, written_weights
from sparse_ft.cli.refreshing import add_evaluations, check_stored, is_sparse_checkpoint
from sparse_ft.data import tokenize
from sparse_ft.evaluation import REPORT_HTML, ReportData, load_tasks, perplexity, write_report, zero_shot
from sparse_ft.models import load_config, load_tokenizer

__all__ = ["run"]

GROUPS = (ModelArguments, TextArguments, EvalArguments)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model directory, and the adapter on top of it if there is one."""

    base: Path
    adapter: Path | None


def run(argv: Sequence[str]) -> int:
    """Evaluate one checkpoint; the exit code."""
    words = first_word_is_model(argv)
    groups = parse(words, GROUPS, verb="eval", description="Measure perplexity and zero-shot tasks, and say how.")
    model, text, how = groups
    tasks = [name for word in how.tasks or [] for name in word.split(",") if name]
    if text.dataset is None and not tasks:
        raise ValueError("No text was given; name one with --dataset, or zero-shot tasks with --tasks.")
    choose_dtype(how.dtype)
    inputs = [model.model_name_or_path]
    target = check_output_dir(how.output_dir, inputs=inputs) if how.output_dir is not None else None
    device = choose_device(how.device)
    with open_subject(model) as subject:
        if how.merge and subject.adapter is None:
            raise ValueError(f"'{subject.base}' is a model, not an adapter; leave out --merge.")
        ours = subject.adapter is None and is_sparse_checkpoint(subject.base)
        recorded = target is None and how.record and ours
        if recorded:
            _check_writable(subject.base)
        if ours:
            masks, record = read_sidecars(subject.base)
            check_stored(subject.base, masks, record, written_weights(subject.base, masks))
        entries = _measure(subject, text, tasks, how, device)
        command = command_line("eval", argv)
        if target is not None:
            _write(entries, target, model.model_name_or_path, command, plain_arguments(*groups))
        elif recorded:
            print(add_evaluations(subject.base, entries))
    return 0


def _check_writable(directory: Path) -> None:
    """Refuse before the work a directory that the result cannot be written into."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RuntimeError(f"No permission to write the result into '{directory}'; add --no_record to only print it.")


def _measure(
    subject: Subject, text: TextArguments, tasks: Sequence[str], how: EvalArguments, device: torch.device
) -> list[dict[str, Any]]:
    """Everything that was asked for, each printed when it is there. The texts and tasks are read before the model."""
    config = load_config(subject.base, trust_remote_code=how.trust_remote_code)
    tokenizer = _tokenizer_of(subject)
    read = _read_text(text, how, config, tokenizer) if text.dataset is not None else None
    loaded = load_tasks(tasks) if tasks else []
    model = load_subject(subject, choose_dtype(how.dtype), device, how.trust_remote_code, merge=how.merge)
    entries: list[dict[str, Any]] = []
    if read is not None:
        options: dict[str, Any] = {"stride": how.stride, "max_windows": how.max_windows, "batch_size": how.batch_size}
        result = perplexity(model, read.pop("ids"), **read, **options)
        print(f"perplexity {result.perplexity:.4f}\n  ({result.protocol})")
        entries.append(result.to_dict())
    if loaded:
        options = {"limit": how.limit, "num_fewshot": how.num_fewshot, "seed": how.seed, "batch_size": how.batch_size}
        of_tasks = [result.to_dict() for result in zero_shot(model, tokenizer, loaded, **options)]
        print_tasks(of_tasks)
        entries += of_tasks
    return entries


def _read_text(
    text: TextArguments, how: EvalArguments, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """What `perplexity` measures on: `ids`, `sequence_length`, `dataset` and `split`."""
    assert text.dataset is not None
    length = choose_length(text.sequence_length, config, tokenizer)
    found, split = find_split(text.dataset, how.split, config=text.dataset_config, text_field=text.text_field)
    return {"ids": tokenize(found, tokenizer), "sequence_length": length, "dataset": text.dataset, "split": split}


def _write(entries: Sequence[dict[str, Any]], target: Path, name: str, command: str, arguments: dict[str, Any]) -> None:
    """The results as a new directory with a report."""
    with atomic_directory(target) as directory:
        labelled = [{"label": "model", **entry} for entry in entries]
        data = ReportData("Evaluated", name, command, evaluations=labelled, arguments=arguments, versions=versions())
        write_report(directory, data)
    print(target / REPORT_HTML)


@contextmanager
def open_subject(model: ModelArguments) -> Iterator[Subject]:
    """The model directory that was named, or the adapter directory and the model it names.

    Raises:
        FileNotFoundError: if there is no such directory or Hub name, or the adapter's base model is gone.
        ValueError: if the adapter's configuration names no base model.
    """
    path = Path(model.model_name_or_path)
    adapter = path if (path / ADAPTER_CONFIG).is_file() else None
    named = model if adapter is None else replace(model, model_name_or_path=_base_of(adapter))
    with open_source(named) as base:
        yield Subject(base, adapter)


def _base_of(adapter: Path) -> str:
    file = adapter / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        raise ValueError(f"'{file}' is not valid JSON; copy the adapter directory again.") from None
    if not base:
        raise ValueError(f"'{file}' names no base_model_name_or_path; add the directory of its model.")
    return str(base)


def load_subject(
    subject: Subject, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool, *, merge: bool = False
) -> PreTrainedModel:
    """The model in eval mode, with its adapter attached, or merged into it.

    Raises:
        FileNotFoundError: if weights are missing, or an adapter of ours comes without its masks.
        ValueError: if a file is damaged.
    """
    model = load_checked(subject.base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if subject.adapter is None:
        return model
    CheckpointReader(member(subject.adapter, ADAPTER_WEIGHTS))
    from peft import PeftModel

    import sparse_ft.adapters  # noqa: F401  (makes PEFT know our adapter types)

    adapted = PeftModel.from_pretrained(model, str(subject.adapter)).eval()
    return adapted.merge_and_unload().eval() if merge else adapted


def _tokenizer_of(subject: Subject) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer if it has one, else its base model's."""
    adapter = subject.adapter
    has_own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return load_tokenizer(adapter if has_own and adapter else subject.base)
