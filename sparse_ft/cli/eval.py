"""`sparse-ft eval`: the perplexity of a checkpoint or an adapter, printed with the protocol it was measured by.

    sparse-ft eval S --dataset wikitext --sequence_length 2048

Any Hugging Face directory or Hub name can be evaluated, an adapter directory too. A checkpoint of ours keeps the
result: `sparse_ft.json` gains an entry and `report.html` is made anew, unless `--no_record` or an `--output_dir` is
given.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.checkpoints import CheckpointReader, atomic_directory, check_output_dir, read_sidecars, versions
from sparse_ft.checkpoints.resolve import member
from sparse_ft.cli.arguments import EvalArguments, ModelArguments, TextArguments, first_word_is_model, parse
from sparse_ft.cli.measuring import choose_device, choose_dtype, choose_length, find_split, load_checked
from sparse_ft.cli.opening import open_source
from sparse_ft.cli.publishing import command_line, plain_arguments
from sparse_ft.cli.refreshing import add_evaluation, is_sparse_checkpoint
from sparse_ft.data import tokenize
from sparse_ft.evaluation import REPORT_HTML, PerplexityResult, ReportData, perplexity, write_report
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
    groups = parse(words, GROUPS, verb="eval", description="Measure perplexity and say by which protocol.")
    model, text, how = groups
    if text.dataset is None:
        raise ValueError("No text was given; name one with --dataset.")
    choose_dtype(how.dtype)
    inputs = [model.model_name_or_path]
    target = check_output_dir(how.output_dir, inputs=inputs) if how.output_dir is not None else None
    device = choose_device(how.device)
    with open_subject(model) as subject:
        recorded = target is None and how.record and subject.adapter is None and is_sparse_checkpoint(subject.base)
        if recorded:
            _check_recordable(subject.base)
        result = _measure(subject, text, how, device)
        print(f"perplexity {result.perplexity:.4f}\n  ({result.protocol})")
        command = command_line("eval", argv)
        if target is not None:
            _write(result, target, model.model_name_or_path, command, plain_arguments(*groups))
        elif recorded:
            print(add_evaluation(subject.base, result.to_dict()))
    return 0


def _check_recordable(directory: Path) -> None:
    """Refuse before the work what `add_evaluation` would refuse after it, but for changed weights."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RuntimeError(f"No permission to write the result into '{directory}'; add --no_record to only print it.")
    read_sidecars(directory)


def _measure(subject: Subject, text: TextArguments, how: EvalArguments, device: torch.device) -> PerplexityResult:
    assert text.dataset is not None
    config = load_config(subject.base, trust_remote_code=how.trust_remote_code)
    tokenizer = _tokenizer_of(subject)
    length = choose_length(text.sequence_length, config, tokenizer)
    found, split = find_split(text.dataset, how.split, config=text.dataset_config, text_field=text.text_field)
    ids = tokenize(found, tokenizer)
    model = load_subject(subject, choose_dtype(how.dtype), device, how.trust_remote_code)
    return perplexity(
        model,
        ids,
        sequence_length=length,
        stride=how.stride,
        max_windows=how.max_windows,
        batch_size=how.batch_size,
        dataset=text.dataset,
        split=split,
    )


def _write(result: PerplexityResult, target: Path, name: str, command: str, arguments: dict[str, Any]) -> None:
    """The result as a new directory with a report."""
    with atomic_directory(target) as directory:
        entry = result.to_dict(label="model")
        data = ReportData("Evaluated", name, command, evaluations=[entry], arguments=arguments, versions=versions())
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
    subject: Subject, dtype: str | torch.dtype, device: torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    """The model in eval mode, with its adapter attached.

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

    return PeftModel.from_pretrained(model, str(subject.adapter)).eval()


def _tokenizer_of(subject: Subject) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer if it has one, else its base model's."""
    adapter = subject.adapter
    has_own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    return load_tokenizer(adapter if has_own and adapter else subject.base)
