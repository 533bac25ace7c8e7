"""What several verbs share: which text is evaluated on, how long a sequence is, where tensors live."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.cli.arguments import EvaluationArguments, TextArguments
from sparse_ft.cli.opening import is_causal
from sparse_ft.cli.plain_options import dtype_called
from sparse_ft.data import TooFewSequencesError, calibration_batches, load_text, tokenize
from sparse_ft.evaluation import perplexity
from sparse_ft.models import load_model
from sparse_ft.pruning.validation import check_all_finite

__all__ = [
    "EvalText",
    "choose_device",
    "choose_dtype",
    "choose_eval_text",
    "choose_length",
    "draw_calibration",
    "find_split",
    "load_checked",
    "measure",
]

_LONGEST_DEFAULT = 2048


@dataclass(frozen=True)
class EvalText:
    """Token ids `(T,)` of one split, and what it is called."""

    ids: Tensor
    dataset: str
    split: str


def load_checked(directory: Path, **options: Any) -> PreTrainedModel:
    """`load_model`, after a reader has refused damaged or unsafe weight files by name.

    Raises:
        ValueError: if a file is damaged, the checkpoint is not a whole model, or a weight is NaN or infinite.
        FileNotFoundError: if a file is missing.
    """
    CheckpointReader(directory)
    model = load_model(directory, **options)
    check_all_finite(model.named_parameters(), directory)
    return model


def choose_device(name: str | None) -> torch.device:
    """The device named, or cuda if there is one, else cpu.

    Raises:
        ValueError: torch does not know the name, or has no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"Unknown device {name!r}; use cpu, cuda or cuda:0.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"Device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices; use cpu.")
    return device


def choose_dtype(name: str) -> str | torch.dtype:
    """`"auto"`, or the torch dtype called so.

    Raises:
        ValueError: The name is another.
    """
    return dtype_called(name) or "auto"


def choose_length(requested: int | None, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens per sequence: what was asked for, else what model and tokenizer take, at most 2048.

    Raises:
        ValueError: More than the model's positions were asked for, or fewer than 2.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = positions if isinstance(positions, int) and positions > 0 else _LONGEST_DEFAULT
    if requested is None:
        return int(min(limit, tokenizer.model_max_length, _LONGEST_DEFAULT))
    if requested < 2 or (positions and requested > limit):
        raise ValueError(f"--sequence_length is {requested} but the model takes 2 to {limit} tokens; change it.")
    return requested


def find_split(dataset: str, split: str | None, *, config: str | None, text_field: str) -> tuple[Any, str]:
    """The text to evaluate on and the name of its split: `split` if given, else test, else validation.

    Raises:
        FileNotFoundError: There is no such dataset or split.
        ValueError: The text is empty, binary or not where `text_field` says.
    """
    if split is not None or Path(dataset).expanduser().is_file():
        name = split or ""
        return load_text(dataset, split=name or "test", config=config, text_field=text_field), name
    try:
        return load_text(dataset, split="test", config=config, text_field=text_field), "test"
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # no such dataset, or no way to it: another split is as far away
            raise
        try:
            return load_text(dataset, split="validation", config=config, text_field=text_field), "validation"
        except FileNotFoundError:
            raise error from None


def choose_eval_text(
    evaluation: EvaluationArguments, text: TextArguments, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> EvalText | None:
    """The text before-and-after perplexities are measured on, None when there is none or `--no_eval` was given.

    A text that was asked for by name must be there. The test split of `--dataset` is used if it exists; a single file
    that is calibrated or trained on has no test split and is not evaluated on.

    Raises:
        FileNotFoundError: `--eval_dataset` or `--eval_split` names what is not there.
        ValueError: The text is empty or binary.
    """
    dataset = evaluation.eval_dataset or text.dataset
    if not evaluation.eval or dataset is None:
        return None
    asked_for = evaluation.eval_dataset is not None or evaluation.eval_split is not None
    if not asked_for and not is_causal(config):
        _not_evaluated("perplexity is for causal language models")
        return None
    if not asked_for and Path(dataset).expanduser().is_file():
        _not_evaluated(f"'{dataset}' has no test split; name a text with --eval_dataset")
        return None
    subset = text.dataset_config if dataset == text.dataset else None
    try:
        found, split = find_split(dataset, evaluation.eval_split, config=subset, text_field=text.text_field)
    except FileNotFoundError:
        if asked_for:
            raise
        _not_evaluated(f"'{dataset}' has no test or validation split; name a text with --eval_dataset")
        return None
    return EvalText(tokenize(found, tokenizer), dataset, split)


def _not_evaluated(reason: str) -> None:
    print(f"Not evaluated: {reason}.")


def draw_calibration(
    text: TextArguments, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int, split: str
) -> list[dict[str, Any]]:
    """`calibration_batches` of `--dataset`, which must have been given.

    Raises:
        FileNotFoundError: There is no such dataset or split.
        ValueError: The text is empty, binary, or has fewer sequences than samples are asked for.
    """
    assert text.dataset is not None
    try:
        return calibration_batches(
            text.dataset,
            tokenizer,
            samples=samples,
            sequence_length=length,
            seed=seed,
            split=split,
            config=text.dataset_config,
            text_field=text.text_field,
        )
    except TooFewSequencesError as error:
        raise ValueError(
            f"--dataset '{text.dataset}' has text for {error.found} sequences of {length} tokens but {samples} samples "
            f"are asked for; lower --samples or --sequence_length."
        ) from None


def measure(
    model: nn.Module, text: EvalText, length: int, evaluation: EvaluationArguments, label: str, **options: Any
) -> dict[str, Any]:
    """Perplexity with its protocol as plain values, `label` among them."""
    result = perplexity(
        model,
        text.ids,
        sequence_length=length,
        max_windows=evaluation.eval_windows,
        batch_size=evaluation.eval_batch_size,
        dataset=text.dataset,
        split=text.split,
        **options,
    )
    return result.to_dict(label=label)
