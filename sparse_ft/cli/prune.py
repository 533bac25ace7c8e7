"""`sparse-ft prune`: a dense checkpoint becomes a sparse one, directory to directory, one block in memory.

    sparse-ft prune --model_name_or_path M --pattern 2:4 --method sparsegpt --dataset wikitext --output_dir S

Perplexity before and after is measured when the text has a test or validation split; that loads the whole model, which
the pruning itself never does. `--no_eval` leaves it out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sparse_ft.checkpoints import atomic_directory, check_output_dir, copy_side_files
from sparse_ft.cli.arguments import (
    CalibrationArguments,
    EvaluationArguments,
    ModelArguments,
    OutputArguments,
    PruneArguments,
    TextArguments,
    check_choice,
    parse,
)
from sparse_ft.cli.measuring import EvalText, choose_device, choose_eval_text, choose_length, load_checked, measure
from sparse_ft.cli.opening import open_source
from sparse_ft.cli.publishing import Outcome, plain_arguments, print_outcome, publish
from sparse_ft.data import calibration_batches
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.pruning import METHODS, prune_checkpoint

__all__ = ["run"]

GROUPS = (ModelArguments, OutputArguments, TextArguments, PruneArguments, CalibrationArguments, EvaluationArguments)


def run(argv: Sequence[str]) -> int:
    """Prune one checkpoint; the exit code."""
    groups = parse(argv, GROUPS, verb="prune", description="Make a sparse checkpoint from a dense one.")
    model, output, text, how, _, _ = groups
    check_choice("method", how.method, list(METHODS))
    output_dir = check_output_dir(output.output_dir, inputs=[model.model_name_or_path], overwrite=output.overwrite)
    if METHODS[how.method].statistic is not None and text.dataset is None:
        raise ValueError(f"Method {how.method!r} looks at the model's activations; name a text with --dataset.")
    device = choose_device(how.device)
    with open_source(model) as source:
        return _prune(groups, argv, source, output_dir, device)


def _prune(groups: Sequence[Any], argv: Sequence[str], source: Path, output_dir: Path, device: torch.device) -> int:
    """Read the texts, then evaluate, prune, evaluate again and publish."""
    model, output, text, how, calibration, evaluation = groups
    needs_text = METHODS[how.method].statistic is not None
    tokenizer = load_tokenizer(source) if needs_text or (evaluation.eval and _names_a_text(text, evaluation)) else None
    config = load_config(source)
    length = choose_length(text.sequence_length, config, tokenizer) if tokenizer else 0
    eval_text = choose_eval_text(evaluation, text, tokenizer, config) if tokenizer else None
    batches = _calibration(text, calibration, tokenizer, length, output.seed) if tokenizer and needs_text else None
    evaluations = [_evaluate(source, eval_text, length, evaluation, "dense", device)] if eval_text else []
    with atomic_directory(output_dir, overwrite=output.overwrite) as directory:
        masks = prune_checkpoint(source, directory, calibration=batches, **_settings(how, output.seed, device))
        copy_side_files(source, directory)
        if eval_text:
            evaluations.append(_evaluate(directory, eval_text, length, evaluation, "pruned", device))
        outcome = Outcome("prune", argv, model.model_name_or_path, how.method, plain_arguments(*groups), evaluations)
        publish(directory, masks, outcome)
    print_outcome(output_dir, masks, evaluations)
    return 0


def _names_a_text(text: TextArguments, evaluation: EvaluationArguments) -> bool:
    return text.dataset is not None or evaluation.eval_dataset is not None


def _settings(how: PruneArguments, seed: int, device: torch.device) -> dict[str, Any]:
    """`PruneArguments` as keyword arguments of `prune_checkpoint`."""
    names = ("method", "pattern", "sparsity", "allocation", "indivisible", "update_weights", "block_size")
    settings = {name: getattr(how, name) for name in (*names, "damping", "min_keep")}
    return settings | {"exclude": how.exclude or [], "seed": seed, "device": device}


def _calibration(
    text: TextArguments, calibration: CalibrationArguments, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[dict[str, Any]]:
    assert text.dataset is not None
    return calibration_batches(
        text.dataset,
        tokenizer,
        samples=calibration.samples,
        sequence_length=length,
        seed=seed,
        split=calibration.calibration_split,
        config=text.dataset_config,
        text_field=text.text_field,
    )


def _evaluate(
    directory: Path, text: EvalText, length: int, evaluation: EvaluationArguments, label: str, device: torch.device
) -> dict[str, Any]:
    """Load, measure, and let go of the model again."""
    result = measure(load_checked(directory, device=device), text, length, evaluation, label)
    gc.collect()
    return result
