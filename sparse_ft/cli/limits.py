"""The numbers that verbs accept, checked when a command line is parsed: before a model or a text is opened."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["OPTION_LIMITS", "Limit", "check_limits"]

#: Least value, greatest value, whether the greatest is itself allowed, and what to do instead.
Limit = tuple[float, float, bool, str]

#: Of our own options, by name; a name means the same in every verb. What `prune` alone takes, the library checks.
OPTION_LIMITS: dict[str, Limit] = {
    "sequence_length": (2, math.inf, False, "give at least 2 tokens"),
    "samples": (1, math.inf, False, "give at least 1, usually 128"),
    "eval_windows": (1, math.inf, False, "give at least 1, or leave it out to use the whole split"),
    "eval_batch_size": (1, math.inf, False, "give at least 1, usually 8"),
    "stride": (1, math.inf, False, "give at least 1 and at most the sequence length, or leave it out for no overlap"),
    "max_windows": (1, math.inf, False, "give at least 1, or leave it out to use the whole text"),
    "batch_size": (1, math.inf, False, "give at least 1, usually 8"),
    "limit": (1, math.inf, False, "give at least 1, or leave it out to ask every question"),
    "num_fewshot": (0, math.inf, False, "give 0 or more"),
    "r": (1, math.inf, False, "give at least 1, usually 16"),
    "lora_alpha": (1, math.inf, False, "give at least 1, usually 2 r"),
    "lora_dropout": (0, 1, False, "give a share in [0, 1)"),
    "learning_rate": (sys.float_info.min, math.inf, False, "give a positive number"),
    "ce_weight": (0, math.inf, False, "give 0 or more"),
    "kl_weight": (0, math.inf, False, "give 0 or more"),
    "squarehead_weight": (0, math.inf, False, "give 0 or more"),
    "mse_weight": (0, math.inf, False, "give 0 or more"),
    "cosine_weight": (0, math.inf, False, "give 0 or more"),
    "temperature": (sys.float_info.min, math.inf, False, "give a positive number, usually 1"),
    "energy_samples": (1, math.inf, False, "give at least 1, usually 64"),
    "teacher_top_k": (1, math.inf, False, "give at least 1, usually 64"),
    "retrain_steps": (1, math.inf, False, "give at least 1, usually 100"),
    "seed": (0, 2**32 - 1, True, "give a whole number from 0 to 4294967295"),
}


def check_limits(values: Mapping[str, Any], limits: Mapping[str, Limit], complaint: str = "is out of range") -> None:
    """Refuse numbers outside their limits, NaN and infinity. Absent options and None pass.

    Args:
        values: options by name, as parsed.
        limits: by the option's name.
        complaint: what the message says of the value.

    Raises:
        ValueError: naming the option, its value and what to give.

    Example:
        >>> check_limits({"samples": 0}, OPTION_LIMITS)
        Traceback (most recent call last):
        ValueError: --samples 0 is out of range; give at least 1, usually 128.
    """
    for option, (least, greatest, closed, fix) in limits.items():
        value = values.get(option)
        if value is None:
            continue
        below = value <= greatest if closed else value < greatest
        if not (math.isfinite(value) and least <= value and below):
            raise ValueError(f"--{option} {value} {complaint}; {fix}.")
