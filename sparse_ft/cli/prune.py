"""`sparse-ft prune`: a dense checkpoint becomes a sparse one, directory to directory, one block in memory.

    sparse-ft prune --model_name_or_path M --pattern 2:4 --method sparsegpt --dataset wikitext --output_dir S

Perplexity before and after is measured when the text has a test or validation split; that loads the whole model, which
the pruning itself never does. `--no_eval` leaves it out.
"""

from __future__ import annotations

import dataclasses
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
    parse,
)
from sparse_ft.cli.measuring import (
    EvalText,
    choose_device,
    choose_eval_text,
    choose_length,
    draw_calibration,
    load_checked,
    measure,
)
from sparse_ft.cli.opening import open_source
from sparse_ft.cli.publishing import Outcome, plain_arguments, print_outcome, publish, written_weights
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.naming import check_choice
from sparse_ft.pruning import METHODS, prune_checkpoint
from sparse_ft.pruning.plan import check_settings

__all__ = ["run"]

GROUPS = (ModelArguments, OutputArguments, TextArguments, PruneArguments, CalibrationArguments, EvaluationArguments)
_OF_SPARSEGPT = ("update_weights", "block_size", "damping")
# Below this share of the weights, zeros of a model without masks are there by chance.
_CHANCE = 0.01


def run(argv: Sequence[str]) -> int:
    """Prune one checkpoint; the exit code."""
    groups = parse(argv, GROUPS, verb="prune", description="Make a sparse checkpoint from a dense one.")
    model, output, text, how, calibration, _ = groups
    check_choice("method", how.method, list(METHODS))
    _check_unused(how, calibration)
    check_settings(METHODS, progress=True, **_settings(how, output.seed))
    output_dir = check_output_dir(output.output_dir, inputs=[model.model_name_or_path], overwrite=output.overwrite)
    if METHODS[how.method].statistic is not None and text.dataset is None:
        raise ValueError(f"Method {how.method!r} looks at the model's activations; name a text with --dataset.")
    device = choose_device(how.device)
    inside = MaskSet.load(how.inside) if how.inside is not None else None
    with open_source(model) as source:
        return _prune(groups, argv, source, output_dir, device, inside)


def _prune(
    groups: Sequence[Any],
    argv: Sequence[str],
    source: Path,
    output_dir: Path,
    device: torch.device,
    inside: MaskSet | None,
) -> int:
    """Read the texts, then evaluate, prune, evaluate again and publish."""
    model, output, text, how, calibration, evaluation = groups
    needs_text = METHODS[how.method].statistic is not None
    tokenizer = load_tokenizer(source) if needs_text or (evaluation.eval and _names_a_text(text, evaluation)) else None
    config = load_config(source)
    length = choose_length(text.sequence_length, config, tokenizer) if tokenizer else 0
    eval_text = choose_eval_text(evaluation, text, tokenizer, config) if tokenizer else None
    batches = _calibration(text, calibration, tokenizer, length, output.seed) if tokenizer and needs_text else None
    evaluations = [_evaluate(source, eval_text, length, evaluation, "dense", device)] if eval_text else []
    older = MaskSet.load(source) if (source / MASKS_FILE).exists() else None
    with atomic_directory(output_dir, overwrite=output.overwrite) as directory:
        settings = _settings(how, output.seed)
        masks = prune_checkpoint(source, directory, calibration=batches, inside=inside, device=device, **settings)
        copy_side_files(source, directory)
        if eval_text:
            evaluations.append(_evaluate(directory, eval_text, length, evaluation, "pruned", device))
        outcome = Outcome("prune", argv, model.model_name_or_path, how.method, plain_arguments(*groups), evaluations)
        publish(directory, masks, outcome)
        warning = _forgotten(source, masks, older, model.model_name_or_path)
    print_outcome(output_dir, masks, evaluations)
    if warning:
        print(warning)
    return 0


def _check_unused(how: PruneArguments, calibration: CalibrationArguments) -> None:
    """Refuse options that the method does not use.

    Raises:
        ValueError: naming method and option.
    """
    user = f"Method {how.method!r}"
    if how.method != "sparsegpt":
        _check_defaults(user, how, _OF_SPARSEGPT)
    if METHODS[how.method].statistic is None:
        _check_defaults(user, calibration, [entry.name for entry in dataclasses.fields(calibration)])
    if how.allocation != "global":
        _check_defaults(f"{user} with allocation {how.allocation!r}", how, ["min_keep"])


def _check_defaults(user: str, group: PruneArguments | CalibrationArguments, names: Sequence[str]) -> None:
    for entry in dataclasses.fields(group):
        if entry.name in names and getattr(group, entry.name) != entry.default:
            option = f"no_{entry.name}" if entry.default is True else entry.name
            raise ValueError(f"{user} does not use --{option}; leave it out, of the recipe too.")


def _names_a_text(text: TextArguments, evaluation: EvaluationArguments) -> bool:
    return text.dataset is not None or evaluation.eval_dataset is not None


def _settings(how: PruneArguments, seed: int) -> dict[str, Any]:
    """`PruneArguments` as keyword arguments of `prune_checkpoint` that need no model to be checked."""
    names = ("method", "pattern", "sparsity", "allocation", "indivisible", "update_weights", "block_size")
    settings = {name: getattr(how, name) for name in (*names, "damping", "min_keep")}
    return settings | {"exclude": how.exclude or [], "seed": seed}


def _calibration(
    text: TextArguments, calibration: CalibrationArguments, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[dict[str, Any]]:
    samples, split = calibration.samples, calibration.calibration_split
    return draw_calibration(text, tokenizer, samples=samples, length=length, seed=seed, split=split)


def _forgotten(source: Path, masks: MaskSet, older: MaskSet | None, name: str) -> str:
    """A warning if zeros of the model that was pruned are kept weights in the new masks, else nothing.

    Args:
        source: directory of the model.
        masks: the new masks.
        older: the model's own masks; None counts its zeros.
        name: what the user calls the model.
    """
    zeros = lost = total = 0
    for tensor, weight in masks.weights_in(written_weights(source, masks)):
        gone = ~older[tensor] if older is not None and tensor in older else weight == 0
        zeros, lost = zeros + int(gone.sum()), lost + int((gone & masks[tensor]).sum())
        total += gone.numel()
    if lost == 0 or (older is None and lost < _CHANCE * total):
        return ""
    has_masks = "" if older is None else " (in masks of another pattern or sparsity)"
    remedy = f"add --inside '{name}'"
    if older is None:
        remedy = "use Python: sparse_ft.prune(model, ..., inside=sparse_ft.MaskSet.from_zeros(model))"
    return (
        f"warning: '{name}' already had {zeros / total:.2%} zeros{has_masks}, of which {lost / zeros:.2%} now count as "
        f"kept weights and may be trained; to go on from its zeros, {remedy}."
    )


def _evaluate(
    directory: Path, text: EvalText, length: int, evaluation: EvaluationArguments, label: str, device: torch.device
) -> dict[str, Any]:
    """Load, measure, and let go of the model again."""
    result = measure(load_checked(directory, device=device), text, length, evaluation, label)
    gc.collect()
    return result
