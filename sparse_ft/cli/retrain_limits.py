"""What `retrain` accepts of `transformers.TrainingArguments`, checked on the plain values before they are built.

TrainingArguments, the optimizer and the Trainer check some of these late and in their own words, and others not at all:
a weight decay of NaN trains to the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparse_ft.cli.limits import Limit, check_limits

__all__ = ["check_training_values"]

_LIMITS: dict[str, Limit] = {
    "per_device_train_batch_size": (1, math.inf, False, "give at least 1"),
    "per_device_eval_batch_size": (1, math.inf, False, "give at least 1"),
    "gradient_accumulation_steps": (1, math.inf, False, "give at least 1"),
    "num_train_epochs": (-math.inf, math.inf, False, "give a positive number, or --max_steps"),
    "warmup_steps": (0, math.inf, False, "give a number of steps, or a share of all below 1"),
    "weight_decay": (0, math.inf, False, "give 0, or a small number such as 0.01"),
    "adam_beta1": (0, 1, False, "give a number in [0, 1), usually 0.9"),
    "adam_beta2": (0, 1, False, "give a number in [0, 1), usually 0.999"),
    "adam_epsilon": (0, math.inf, False, "give a small number, usually 1e-8"),
    "max_grad_norm": (0, math.inf, False, "give a positive number, or 0 to clip nothing"),
    "label_smoothing_factor": (0, 1, True, "give a number in [0, 1]"),
    "neftune_noise_alpha": (0, math.inf, False, "give a positive number, or leave it out"),
    "logging_steps": (0, math.inf, False, "give a number of steps"),
    "save_steps": (0, math.inf, False, "give a number of steps"),
    "eval_steps": (0, math.inf, False, "give a number of steps"),
    "dataloader_num_workers": (0, math.inf, False, "give 0 or more"),
    "seed": (0, 2**32 - 1, True, "give a whole number from 0 to 4294967295"),
    "data_seed": (0, 2**32 - 1, True, "give a whole number from 0 to 4294967295"),
}
_SHARDING = {"deepspeed": "DeepSpeed", "fsdp": "FSDP"}


def check_training_values(values: Mapping[str, Any]) -> None:
    """Refuse values that cannot train, and strategies that shard the model. Absent options and None pass.

    Args:
        values: options by name, as parsed.

    Raises:
        ValueError: naming the option, its value and what to give.

    Example:
        >>> check_training_values({"weight_decay": float("nan")})
        Traceback (most recent call last):
        ValueError: --weight_decay nan cannot train; give 0, or a small number such as 0.01.
    """
    for option, name in _SHARDING.items():
        if values.get(option):
            given = values[option]
            shown = " ".join(map(str, given)) if isinstance(given, (list, tuple)) else given
            raise ValueError(
                f"--{option} {shown} asks for {name}, which shards the model, but masked training keeps a whole copy "
                f"in every process; leave it out, or start with `accelerate launch --config_file launch/ddp.yaml`."
            )
    check_limits(values, _LIMITS, "cannot train")
