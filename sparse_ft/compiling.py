"""Compiled loops, kept on disk where a place can be written to. Every room may use it; it knows none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(**options: Any) -> Callable[[F], F]:
    """Numba's `njit` without the interpreter's lock, cached beside the source or in the user's cache.

    Where neither can be written, as in a container with a read-only file system and no home, Numba refuses to decorate
    at all; the loops are then compiled anew in each process. `NUMBA_CACHE_DIR` names another place.

    Args:
        options: further ones of `njit`.

    Example:
        >>> @compiled(error_model="numpy")
        ... def double(values):
        ...     for i in range(values.size):
        ...         values[i] *= 2
    """

    def decorate(function: F) -> F:
        try:
            loop: F = njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:
            loop = njit(nogil=True, **options)(function)
        return loop

    return decorate
