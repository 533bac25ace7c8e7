"""Which weights a forward uses without calling the module that holds them.

Mamba multiplies with `dt_proj.weight` itself; a hook on `dt_proj` then sees no input though every token passes through
the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class WeightUse(TorchFunctionMode):
    """Context manager that notes which of some weights are handed to torch functions.

    Args:
        weights: by name.

    Attributes:
        used: names of those that were.

    Example:
        >>> with WeightUse({"w": weight}) as use:
        ...     _ = inputs @ weight.T
        >>> use.used
        {'w'}
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.used: set[str] = set()
        self._names = {id(weight): name for name, weight in weights.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            name = self._names.get(id(value))
            if name is not None:
                self.used.add(name)
        return func(*args, **kwargs)
