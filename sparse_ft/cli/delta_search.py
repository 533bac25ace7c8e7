"""What `sparse-ft delta` measures on models: the scale that suits a text, and the inputs that wanda ranks by."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sparse_ft.checkpoints import CheckpointReader, resolve_checkpoint
from sparse_ft.checkpoints.resolve import ADAPTER_CONFIG_FILE, CONFIG_FILE
from sparse_ft.cli.arguments import TextArguments
from sparse_ft.cli.delta_arguments import ScaleArguments
from sparse_ft.cli.measuring import choose_device, choose_length, draw_calibration, find_split, load_checked
from sparse_ft.data import tokenize
from sparse_ft.deltas import (
    DeltaProbe,
    InputMoments,
    OutputChange,
    ScaleSearch,
    collect_moments,
    dare,
    search_scale,
    structural_delta,
)
from sparse_ft.deltas.delta_header import Header
from sparse_ft.deltas.extract import METHODS
from sparse_ft.deltas.resident import Delta
from sparse_ft.deltas.store import DeltaFile
from sparse_ft.evaluation import perplexity
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.naming import check_choice

__all__ = ["check_search", "input_moments", "search"]

OBJECTIVES = ("perplexity", "output_change")
_ROLE = "search"  # of masks, as those of `DeltaProbe`: a scale is not tuned to the mask it is stored with


def search(
    delta: str | Path, base: str, finetuned: str | None, text: TextArguments, how: ScaleArguments, *, seed: int
) -> ScaleSearch:
    """Find the scale with the best objective, DARE's among those tried; a line for each is printed.

    Raises:
        ValueError: if the delta has no scale, there is no text, or the objective needs a fine-tune that is not given.
    """
    file = DeltaFile(delta)
    objective = check_search(file.header.method, file.header.density, finetuned, text, how)
    print(f"scale by {objective} on {how.samples} sequences of {text.dataset}")
    if finetuned is None or objective == "perplexity":
        return _by_perplexity(file, base, text, how)
    return _by_output_change(file, base, finetuned, text, how, seed)


def check_search(method: str, density: float, finetuned: str | None, text: TextArguments, how: ScaleArguments) -> str:
    """Refuse a search that cannot work, before anything is read; what it searches by.

    Raises:
        ValueError: if the method has no scale, there is no text, or the objective needs what is not given.
    """
    if not METHODS.get(method, False) or not 0 < density < 1:
        raise ValueError(
            f"A delta made by {method} at density {density:g} is not rescaled; search the scale of a random mask with "
            f"a density between 0 and 1."
        )
    if text.dataset is None:
        raise ValueError("A scale is searched on a text; name one with --dataset.")
    if how.max_scale is not None and not density <= how.max_scale < math.inf:
        raise ValueError(
            f"--max_scale is {how.max_scale:g} but the search begins at the density {density:g}; give more."
        )
    objective = check_choice("objective", how.objective or ("output_change" if finetuned else "perplexity"), OBJECTIVES)
    if objective == "output_change":
        if finetuned is None:
            raise ValueError("output_change compares with the fine-tune; give it with --finetuned, or use perplexity.")
        _refuse_adapter(finetuned)
    return objective


def _by_perplexity(file: DeltaFile, base: str, text: TextArguments, how: ScaleArguments) -> ScaleSearch:
    """On the very mask that is stored."""
    source = resolve_checkpoint(base)
    assert text.dataset is not None
    tokenizer = load_tokenizer(source)
    length = choose_length(text.sequence_length, load_config(source), tokenizer)
    split = None if Path(text.dataset).expanduser().is_file() else how.split
    found, _ = find_split(text.dataset, split, config=text.dataset_config, text_field=text.text_field)
    ids = tokenize(found, tokenizer)
    model = load_checked(source, device=choose_device(how.device))
    delta = Delta(file)

    def score(scale: float) -> float:
        delta.apply(model, scale=scale)
        try:
            value = perplexity(model, ids, sequence_length=length, max_windows=how.samples, progress=False).perplexity
        finally:
            delta.subtract(model)
        print(f"  scale {scale:<10.6g} perplexity {value:.4f}")
        return -math.log(value) if value > 0 else math.nan

    return search_scale(score, density=file.header.density, high=how.max_scale)


def _by_output_change(
    file: DeltaFile, base: str, finetuned: str, text: TextArguments, how: ScaleArguments, seed: int
) -> ScaleSearch:
    """On other masks than the stored one, against the outputs of the fine-tune."""
    model, tuned = _load_finetuned(finetuned, how)
    batches = _draw(tuned, text, how, seed)
    names = [name for name, part in file.header.tensors.items() if part.kind == "delta"]
    header = file.header
    with DeltaProbe(model, CheckpointReader(resolve_checkpoint(base)), density=header.density, names=names) as probe:
        change = OutputChange(model, batches, kind="logits")

        def score(scale: float) -> float:
            if header.method == "structural":
                probe.transform(partial(_whole_slices, header=header, scale=scale, seed=seed))
            else:
                probe.prune(scale, seed=seed)
            value = change.measure()
            print(f"  scale {scale:<10.6g} output change {value:.6g}")
            return -value

        return search_scale(score, density=header.density, high=how.max_scale)


def _whole_slices(name: str, delta: Tensor, *, header: Header, scale: float, seed: int) -> Tensor:
    """A delta without the slices that a search's mask drops, rescaled."""
    part = header.tensors[name]
    if part.mask != "slices":
        return dare(delta, density=header.density, seed=seed, role=_ROLE, name=name, scale=scale)
    key = part.key or name
    return structural_delta(delta, density=header.density, seed=seed, role=_ROLE, name=key, axis=part.axis, scale=scale)


def input_moments(finetuned: str, text: TextArguments, how: ScaleArguments, *, seed: int) -> dict[str, InputMoments]:
    """Moments of what flows into the fine-tune's layers on the text, by weight name."""
    model, tuned = _load_finetuned(finetuned, how)
    return collect_moments(model, _draw(tuned, text, how, seed))


def _load_finetuned(finetuned: str, how: ScaleArguments) -> tuple[PreTrainedModel, Path]:
    _refuse_adapter(finetuned)
    tuned = resolve_checkpoint(finetuned)
    return load_checked(tuned, device=choose_device(how.device)), tuned


def _refuse_adapter(finetuned: str) -> None:
    directory = Path(finetuned)
    if (directory / ADAPTER_CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).is_file():
        raise ValueError(
            f"'{finetuned}' is an adapter but the merged model is looked at; merge it and give the result."
        )


def _draw(tuned: Path, text: TextArguments, how: ScaleArguments, seed: int) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(tuned)
    length = choose_length(text.sequence_length, load_config(tuned), tokenizer)
    return draw_calibration(text, tokenizer, samples=how.samples, length=length, seed=seed, split=how.split)
