"""What `reconstruct` is asked for, checked before any work: arguments, the two models, masks, calibration data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import canonical_name, find_blocks
from sparse_ft.naming import check_choice
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.reconstruction.streams import STREAMS
from sparse_ft.reconstruction.trained import Training, grouped_names, parse_training
from sparse_ft.reconstruction.windows import GRANULARITIES

Batch = dict[str, Any]
_TRAINED_IN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Settings:
    """Checked arguments of `reconstruct`; see there for their meaning."""

    train: Training
    granularity: str
    stream: str
    iterations: int | None
    batch_size: int
    learning_rate: float | None
    warmup: float
    autocast: bool | None
    r: int
    lora_alpha: int | None
    seed: int
    progress: bool


@dataclass(frozen=True)
class Task:
    """What is to be done to a model, wherever its weights are.

    Attributes:
        masks: of the model.
        settings: checked.
        calibration: data as given.
        activations_dir: directory for activations; None for memory.
    """

    masks: MaskSet
    settings: Settings
    calibration: Iterable[Any] | None
    activations_dir: str | Path | None


def check_settings(
    *,
    train: str,
    granularity: str,
    stream: str,
    iterations: int | None,
    batch_size: int,
    learning_rate: float | None,
    warmup: float,
    autocast: bool | None,
    r: int,
    lora_alpha: int | None,
    seed: int,
    progress: bool,
) -> Settings:
    """Check the arguments of `reconstruct` that need no model.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    training = parse_training(train)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("stream", stream, STREAMS)
    if granularity == "linear" and "norms" in training.groups:
        raise ValueError("granularity 'linear' trains single matrices, which have no norms; leave norms out of train.")
    if granularity == "linear" and stream == "sparse_to_dense":
        raise ValueError(
            "stream 'sparse_to_dense' needs windows with a nonlinearity, which granularity 'linear' has not; use "
            "stream 'sparse' or 'dense', or granularity 'attn_mlp'."
        )
    rate = learning_rate
    if rate is not None and not (_is_number(rate) and 0 < rate < math.inf):
        raise ValueError(f"The learning rate is {rate!r} but must be a positive number, such as 1e-4.")
    for name, value, least in (("iterations", iterations, 0), ("batch_size", batch_size, 1), ("r", r, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r} but must be an integer of at least {least}.")
    if not (_is_number(warmup) and 0 <= warmup < math.inf):
        raise ValueError(f"warmup is {warmup!r} but must be a number of steps, or a share of all in [0, 1).")
    if autocast not in (None, True, False):
        raise ValueError(f"autocast is {autocast!r} but must be True (bfloat16), False, or None to go by the model.")
    if lora_alpha is not None and training.weights in (None, "full", "scale_lora"):
        raise ValueError(
            f"lora_alpha is given, but train (--reconstruct_with) '{training}' has no adapter it applies to; leave it "
            f"out."
        )
    if lora_alpha is not None and not (_is_number(lora_alpha) and 0 < lora_alpha < math.inf):
        raise ValueError(f"lora_alpha is {lora_alpha!r} but must be a positive number; 2 r is usual.")
    return Settings(
        training, granularity, stream, iterations, batch_size, rate, float(warmup), autocast, r, lora_alpha,
        seed, progress,
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_models(model: nn.Module, dense: nn.Module) -> None:
    """Check that the dense model has the sparse one's tensors, in the same shapes and dtypes. Meta tensors will do.

    Raises:
        ValueError: naming the tensor that differs, with both shapes or dtypes, or one that is quantised.
    """
    if model is dense:
        raise ValueError("The dense model is the sparse model itself; load the model it was pruned from once more.")
    for what, one in (("sparse", model), ("dense", dense)):
        if getattr(one, "peft_config", None):
            raise ValueError(f"The {what} model has an adapter; merge it first.")
        _check_plain(what, one)
    ours, theirs = _tensors(model), _tensors(dense)
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            has, lacks = ("sparse", "dense") if name in ours else ("dense", "sparse")
            raise ValueError(
                f"The {has} model has a tensor '{name}' and the {lacks} model has none; give the dense model that the "
                f"sparse one was pruned from."
            )
        if ours[name].shape != theirs[name].shape:
            raise ValueError(
                f"'{name}' has shape {tuple(ours[name].shape)} in the sparse model but {tuple(theirs[name].shape)} in "
                f"the dense one; give the dense model that the sparse one was pruned from."
            )
        if ours[name].dtype != theirs[name].dtype:
            raise ValueError(
                f"'{name}' is {ours[name].dtype} in the sparse model but {theirs[name].dtype} in the dense one; load "
                f"both in the same dtype."
            )


def _check_plain(what: str, model: nn.Module) -> None:
    """Refuse weights that are stored as codes, whatever library packed them."""
    for name, weight in _tensors(model).items():
        if weight.dtype not in _TRAINED_IN:
            form = f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)}"
            raise ValueError(
                f"The {what} model is quantised: '{name}' is a {form}; reconstruction works on the unquantised model, "
                f"so load it in float32, bfloat16 or float16, and quantise the result."
            )


def check_trained(model: nn.Module, masks: MaskSet, settings: Settings) -> frozenset[str]:
    """Check that there is something to train; the names of the groups' parameters.

    Raises:
        ValueError: if no mask lies in a block, or there is nothing to train.
    """
    blocks = [name for name, _ in find_blocks(model)]
    inside = tuple(f"{block}." for block in blocks)
    if not any(name.startswith(inside) for name in masks):
        raise ValueError(
            f"None of the {len(masks)} masked tensors, such as '{next(iter(masks))}', lies in a block of "
            f"{type(model).__name__}; there is nothing to reconstruct."
        )
    if settings.granularity == "linear":
        warnings.warn(
            "granularity 'linear' fits each matrix by itself: without a nonlinearity in the window errors build up, "
            "and the result is worse than with 'attn_mlp'.",
            stacklevel=4,
        )
    return grouped_names(model, settings.train, masks, blocks)


def check_calibration(model: nn.Module, calibration: Iterable[Any] | None, batch_size: int) -> list[Batch]:
    """Calibration data as batches without padding, one per training step.

    Raises:
        ValueError: if there is none, or not enough for one batch.
    """
    if calibration is None:
        raise ValueError(
            "Reconstruction needs calibration data; pass calibration=[batches of token ids], for example from "
            "sparse_ft.data.calibration_batches."
        )
    batches = prepare_calibration(model, calibration, "reconstruct", rows_per_batch=batch_size)
    rows = count_rows(batches)
    if rows < batch_size:
        raise ValueError(f"There are {rows} calibration sequences but a batch takes {batch_size}; give more of them.")
    return batches


def count_rows(batches: Sequence[Batch]) -> int:
    """Sequences in batches."""
    return sum(next(len(value) for value in batch.values() if isinstance(value, Tensor)) for batch in batches)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {canonical_name(name): tensor for name, tensor in model.named_parameters(remove_duplicate=False)}
