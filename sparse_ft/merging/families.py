"""What each merge method asks for: its inputs, its parameters and their defaults; and what is said of the others.

Parameters of a model (`weight`, `density`, ...) may differ from model to model, those of the whole tensor (`normalize`,
`lambda`, `t`) may not. Defaults are mergekit's, but for `dare_ties`, whose paper divides by the number of models that
agree (`normalize`), and for what `compat` changes inside a method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.merging.plan import Compatibility
from sparse_ft.merging.settings import Scalar

#: Stands where a default would stand for a parameter that has to be given.
REQUIRED: Any = object()


@dataclass(frozen=True)
class Family:
    """What a method asks for.

    Attributes:
        needs_base: it works on differences to `base_model`.
        of_models: parameters of each model and their defaults.
        of_tensor: parameters of the whole tensor and their defaults.
        models: exactly so many models besides the base; None for one or more.
    """

    needs_base: bool
    of_models: Mapping[str, Any]
    of_tensor: Mapping[str, Any] = field(default_factory=dict)
    models: int | None = None


_WEIGHT = {"weight": REQUIRED}
_SUM = {"normalize": False, "lambda": 1.0}
_MEAN = {"normalize": True, "lambda": 1.0}
_DROP = {**_WEIGHT, "density": 1.0}
_OUTLIERS = {**_DROP, "gamma": 0.01}
_WINDOW = {**_DROP, "epsilon": 0.15}
# One draw for all models instead of one each: the merged delta is then as sparse as each of them. Not mergekit's.
_AT_RANDOM = {"shared_drop": False}

FAMILIES: dict[str, Family] = {
    "linear": Family(False, _WEIGHT, {"normalize": True}),
    "slerp": Family(True, {}, {"t": REQUIRED}, models=1),
    "task_arithmetic": Family(True, _WEIGHT, _SUM),
    "ties": Family(True, _DROP, {**_MEAN, "rescale": False}),
    "dare_linear": Family(True, _DROP, {**_SUM, "rescale": True, **_AT_RANDOM}),
    "dare_ties": Family(True, _DROP, {**_MEAN, "rescale": True, **_AT_RANDOM}),
    "della": Family(True, _WINDOW, {**_MEAN, "rescale": True}),
    "della_linear": Family(True, _WINDOW, {**_SUM, "rescale": True}),
    "breadcrumbs": Family(True, _OUTLIERS, {**_SUM, "rescale": False}),
    "breadcrumbs_ties": Family(True, _OUTLIERS, {**_SUM, "rescale": False}),
    "darex_q": Family(True, {**_DROP, "q": REQUIRED}, {**_SUM, **_AT_RANDOM}),
}

#: Where `compat: mergekit` has another default.
MERGEKIT_DEFAULTS: dict[str, dict[str, Scalar]] = {"dare_ties": {"normalize": False}}

#: Methods of mergekit that are not here, and what comes nearest.
REFUSED: dict[str, str] = {
    "nuslerp": "use slerp for two models",
    "multislerp": "use linear, or slerp for two models",
    "karcher": "use linear, or slerp for two models",
    "model_stock": "use linear with weights of your own",
    "sce": "use ties",
    "nearswap": "use slerp with a small t",
    "arcee_fusion": "use breadcrumbs or ties",
    "ram": "use ties",
    "ramplus_tl": "use ties",
    "passthrough": "use linear with one source per slice, each with weight 1",
}

#: Parameters that some method reads; one that the chosen method does not read is noted, not refused.
PARAMETERS: tuple[str, ...] = (
    "weight", "density", "gamma", "epsilon", "q", "t", "normalize", "rescale", "lambda", "int8_mask", "shared_drop",
)  # fmt: skip
_FLAGS = ("normalize", "rescale", "int8_mask", "shared_drop")
# lowest, highest, whether the lowest itself is allowed
_RANGES: dict[str, tuple[float, float, bool]] = {
    "density": (0.0, 1.0, True),
    "gamma": (0.0, 1.0, True),
    "epsilon": (0.0, 1.0, True),
    "q": (0.0, 1.0, False),
    "t": (0.0, 1.0, True),
}


def default_of(method: str, parameter: str, compatibility: Compatibility) -> Any:
    """A method's default for a parameter, or `REQUIRED`."""
    family = FAMILIES[method]
    if compatibility == "mergekit" and parameter in MERGEKIT_DEFAULTS.get(method, {}):
        return MERGEKIT_DEFAULTS[method][parameter]
    return {**family.of_models, **family.of_tensor}[parameter]


def check_value(parameter: str, value: Scalar, where: str) -> float | bool:
    """A parameter's value as a number or flag in its range.

    Raises:
        ValueError: if it is neither, or out of range.
    """
    if parameter in _FLAGS:
        if value not in (0, 1):
            raise ValueError(f"{where} must be true or false, got {value!r}.")
        return bool(value)
    if isinstance(value, str) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}.")
    low, high, included = _RANGES.get(parameter, (-math.inf, math.inf, True))
    if not low <= value <= high or (value == low and not included):
        interval = f"between {low:g} and {high:g}{'' if included else ' and not be 0'}"
        hint = " It is the share that is kept, no percentage." if parameter == "density" else ""
        raise ValueError(f"{where} must lie {interval}, got {value}.{hint}")
    return float(value)


def check_window(density: float, epsilon: float, where: str) -> None:
    """DELLA's keep probabilities run from density - epsilon to density + epsilon and must be probabilities.

    Raises:
        ValueError: if they are not; a density of 0 or 1 has no window and is allowed.
    """
    if 0.0 < density < 1.0 and not (density - epsilon > 0.0 and density + epsilon < 1.0):
        raise ValueError(
            f"{where}: density {density:g} with epsilon {epsilon:g} gives keep probabilities from "
            f"{density - epsilon:g} to {density + epsilon:g}, outside 0..1; lower epsilon."
        )
