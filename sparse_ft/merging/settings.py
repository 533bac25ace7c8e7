"""A merge parameter as mergekit's YAML writes it, and its value for one tensor of one layer.

A setting is a scalar, a gradient over the layers, or a list of cases that look at the tensor's name:

    weight: 0.4                                                    # the same everywhere
    density: [0.9, 0.5, 0.3]                                       # first, middle and last layer, linear between
    t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.3}]     # first case whose filter is a part of the name

Example:
    >>> setting = parse_setting([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}], "weight")
    >>> evaluate(setting, "model.layers.1.mlp.up_proj.weight", 0.25), evaluate(setting, "lm_head.weight", 0.0)
    (0.25, 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_ft.naming import did_you_mean

Scalar = bool | int | float | str
#: Values at evenly spaced positions of the layers, or one value.
Values = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class Case:
    """One entry of a conditional setting: `values` for tensors whose name contains `filter`; None takes all."""

    filter: str | None
    values: Values

    def takes(self, tensor: str) -> bool:
        """Whether the case is for this tensor."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


#: The cases in order; an unconditional setting is a single case without a filter. No case: the setting is not given.
Setting = tuple[Case, ...]
#: Settings by parameter name, as one place of the configuration gives them.
Settings = Mapping[str, Setting]


def parse_setting(raw: object, where: str) -> Setting:
    """Check what YAML gave and put it into one form.

    Args:
        raw: scalar, list of scalars, mapping `{filter, value}`, or list of such mappings. None is no setting.
        where: place in the configuration, for errors.

    Raises:
        ValueError: if it is anything else, or mixes kinds.
    """
    if raw is None:
        return ()
    if isinstance(raw, Mapping):
        return (_case(raw, where),)
    if isinstance(raw, list) and any(isinstance(entry, Mapping) for entry in raw):
        if not all(isinstance(entry, Mapping) for entry in raw):
            raise ValueError(f"{where} mixes plain values and filters; give the plain ones as '- value: ...'.")
        return tuple(_case(entry, f"{where}[{i}]") for i, entry in enumerate(raw))
    values = _values(raw, where)
    return () if values == () else (Case(None, values),)


def evaluate(setting: Setting, tensor: str, t: float) -> Scalar | None:
    """The value of a setting for one tensor, or None if no case takes it.

    Args:
        setting: the setting.
        tensor: the tensor's name in the input it comes from.
        t: position of its layer, 0 (first) to 1 (last).
    """
    case = next((case for case in setting if case.takes(tensor)), None)
    if case is None or case.values == ():
        return None
    return interpolate(case.values, t) if isinstance(case.values, tuple) else case.values


def interpolate(values: Sequence[Scalar], t: float) -> Scalar:
    """A gradient at position t: numbers on straight lines between n evenly spaced points, flags and words of the
    point at or before it.

    Args:
        values: n >= 1 numbers, or n flags, or n words.
        t: 0 to 1.

    Example:
        >>> interpolate([0.0, 0.5, 0.0], 0.25)
        0.25
    """
    place = t * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    first, second = values[low], values[min(low + 1, len(values) - 1)]
    if isinstance(first, (bool, str)) or isinstance(second, (bool, str)):
        return first
    share = place - low
    return first if share == 0 or first == second else (1 - share) * first + share * second


def layer_position(index: int, layers: int) -> float:
    """Position of a layer in its output slice: 0 for the first, 1 for the last, 1 for the only one."""
    return index / (layers - 1) if layers > 1 else 1.0


def resolve(name: str, levels: Iterable[Settings], tensor: str, t: float) -> Scalar | None:
    """The value of a parameter: the first level that has one for this tensor decides.

    Args:
        name: of the parameter.
        levels: settings from the most to the least particular: source, slice, module, whole merge.
        tensor: as in `evaluate`.
        t: as in `evaluate`.

    Returns:
        None if no level has a value; the method's default is the caller's.
    """
    for settings in levels:
        value = evaluate(settings.get(name, ()), tensor, t)
        if value is not None:
            return value
    return None


def _case(raw: Mapping[Any, Any], where: str) -> Case:
    for key in raw:
        if key not in ("filter", "value"):
            raise ValueError(f"{where} has the unknown key '{key}'. {did_you_mean(key, ('filter', 'value'))}")
    if raw.get("value") is None:
        raise ValueError(f"{where} has a filter but no value; add 'value: ...'.")
    filter_ = raw.get("filter")
    if filter_ is not None and not isinstance(filter_, str):
        raise ValueError(f"{where}.filter must be a part of a tensor's name, got {filter_!r}.")
    return Case(filter_, _values(raw["value"], f"{where}.value"))


def _values(raw: object, where: str) -> Values:
    if not isinstance(raw, list):
        return _scalar(raw, where)
    values = tuple(_scalar(entry, f"{where}[{i}]") for i, entry in enumerate(raw))
    kinds = {bool if isinstance(v, bool) else str if isinstance(v, str) else float for v in values}
    if len(kinds) > 1:
        raise ValueError(f"{where} mixes numbers with flags or words ({raw}); a gradient has one kind.")
    return values


def _scalar(raw: object, where: str) -> Scalar:
    if isinstance(raw, str):
        return _number(raw)
    if not isinstance(raw, (bool, int, float)):
        raise ValueError(f"{where} must be a number, a flag, a gradient or a list of filters, got {raw!r:.60}.")
    if not math.isfinite(raw):
        raise ValueError(f"{where} is {raw}; give a finite number.")
    return raw


def _number(text: str) -> Scalar:
    """YAML 1.1 reads 1e-3 as text: what float() reads is a number all the same."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if math.isfinite(value) else text
