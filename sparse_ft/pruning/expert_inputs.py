"""What reaches each expert of a fused stack `(E, o, d)`, taken from the call of the module that holds the stack.

Three ways of calling such modules exist in transformers; they are told apart by the second argument:

    forward(hidden (T, d), routing (T, k) of expert numbers, …)     most models: tokens are gathered inside
    forward(inputs (S, d), sizes)                                   inputs sorted by expert, `sizes[e]` rows each
    forward(inputs (E·T, d))                                        all T rows for each expert, 0 if not meant for it
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

#: The stack that receives the intermediate activations; any other receives the module's input.
LAST_PROJECTION = "down_proj"
_FIRST_PROJECTIONS = ("gate_up_proj", "up_proj")


def expert_inputs(
    module: nn.Module, experts: int, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (expert, inputs (t, d)) for each expert with inputs; nothing if the call is of an unknown kind.

    Args:
        module: holds the stacks.
        experts: their number E.
        args: positional arguments of its call.
        kwargs: keyword arguments of its call.
    """
    values = list(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments.values())[1:]
    hidden = values[0]
    if not isinstance(hidden, Tensor):
        return
    hidden = hidden.reshape(-1, hidden.shape[-1])
    second = values[1] if len(values) > 1 else None
    if second is None and len(hidden) % experts == 0:
        for expert, rows in enumerate(hidden.view(experts, -1, hidden.shape[-1])):
            yield from _unless_empty(expert, rows[rows.any(-1)])
    elif isinstance(second, Tensor) and second.ndim == 2 and not second.is_floating_point():
        for expert in range(experts):
            yield from _unless_empty(expert, hidden[(second == expert).any(-1)])
    elif isinstance(second, (Tensor, list, tuple)) and len(second) == experts:
        for expert, rows in enumerate(hidden.split([int(size) for size in second])):
            yield from _unless_empty(expert, rows)


def between_projections(module: Any, expert: int, inputs: Tensor, *, transposed: bool) -> Tensor:
    """What the last projection of one expert receives when its first one gets `inputs` (t, d): (t, intermediate).

    The module's own activation and gating are called.

    Args:
        module: holds `gate_up_proj` or `up_proj`, and `down_proj`.
        expert: which.
        inputs: (t, d).
        transposed: True if the stacks are (E, in, out).
    """
    name = next(name for name in _FIRST_PROJECTIONS if hasattr(module, name))
    weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    out = inputs.to(weight.dtype) @ (weight if transposed else weight.T)
    if bias is not None:
        out = out + bias[expert]
    if name == "up_proj":
        return module.act_fn(out)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(out)
    gate, up = out.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _unless_empty(expert: int, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    if len(rows):
        yield expert, rows
