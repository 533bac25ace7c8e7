"""What is said of a name that does not exist: the nearest one that does, or all of them. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """A sentence that helps with a misspelt name.

    Args:
        name: as it was given.
        known: names that exist.
        otherwise: what to say if none of them is near; by default all of them.

    Example:
        >>> did_you_mean("magnitud", ["magnitude", "wanda"])
        "Did you mean 'magnitude'?"
        >>> did_you_mean("xyz", ["magnitude", "wanda"])
        'Known: magnitude, wanda.'
    """
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(names)}." if otherwise is None else otherwise


def check_choice(what: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is one of `known`.

    Args:
        what: is chosen, for the message.
        value: the choice.
        known: names that exist.

    Raises:
        ValueError: if it is not; the nearest is named.

    Example:
        >>> check_choice("method", "wnda", ["magnitude", "wanda"])
        Traceback (most recent call last):
        ValueError: Unknown method 'wnda'. Did you mean 'wanda'?
    """
    names = list(known)
    if value not in names:
        raise ValueError(f"Unknown {what} {value!r}. {did_you_mean(value, names)}")
    return value
