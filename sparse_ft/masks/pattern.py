"""What shape of zeros a mask must have: `unstructured`, or `n:m` with n weights KEPT of every m along the input.

Several public pruning scripts write the number of REMOVED weights first; the two readings agree only at 50%.
Here, as in NVIDIA's documentation and MaskLLM, `1:4` keeps one weight of four and so means 75% sparsity.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), for 2:4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """The zero pattern of a weight: unstructured when `n` and `m` are None, else n kept of each m inputs.

    Raises:
        ValueError: unless 1 <= n <= m, or if only one of the two is given.

    Example:
        >>> Pattern.parse("2:4").sparsity
        0.5
    """

    n: int | None = None
    m: int | None = None

    def __post_init__(self) -> None:
        if (self.n is None) != (self.m is None):
            raise ValueError(f"A pattern needs both n and m, got n={self.n} and m={self.m}; write it as 'n:m'.")
        if self.n is not None and self.m is not None and not 1 <= self.n <= self.m:
            raise ValueError(
                f"Pattern '{self.n}:{self.m}' keeps {self.n} of every {self.m} weights, which is impossible; "
                f"n must be between 1 and m, as in '2:4'."
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read `"unstructured"` or `"n:m"`; a Pattern is returned as it is.

        Raises:
            ValueError: if the text is neither, or n:m is impossible.
        """
        if isinstance(text, Pattern):
            return text
        written = str(text).strip()
        if written == "unstructured":
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", written)
        if match is None:
            raise ValueError(
                f"Unknown pattern '{written}'; use 'unstructured' or 'n:m' (n kept of every m), as in '2:4'."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def is_structured(self) -> bool:
        """True for n:m patterns."""
        return self.n is not None

    @property
    def sparsity(self) -> float | None:
        """Share of zeros that n:m fixes, 1 - n/m; None for `unstructured`, where it is free."""
        return None if self.n is None or self.m is None else 1 - self.n / self.m

    def violations(self, mask: Tensor) -> int:
        """Number of groups of `mask` that keep more than n weights.

        Args:
            mask: bool `(..., d)`, inputs last. The last d % m columns form no group and are not counted.
        """
        if self.n is None or self.m is None:
            return 0
        whole = mask.shape[-1] // self.m * self.m
        kept = mask[..., :whole].unflatten(-1, (-1, self.m)).sum(-1, dtype=torch.int32)
        return int((kept > self.n).sum())

    def __str__(self) -> str:
        return "unstructured" if self.n is None else f"{self.n}:{self.m}"


def pattern_for(name: str, given: str | Pattern | Mapping[str, str | Pattern]) -> Pattern:
    """The pattern of one tensor: the one given for all, or its own.

    Raises:
        ValueError: if there is none for it, or it is no pattern.
    """
    if not isinstance(given, Mapping):
        return Pattern.parse(given)
    if name not in given:
        raise ValueError(
            f"There is a mask of '{name}' but no pattern for it, only for {len(given)} other tensors; "
            f"add one, or give one pattern for all, such as 'unstructured'."
        )
    return Pattern.parse(given[name])


def check_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The share to prune for a pattern: the given one, or the one n:m fixes.

    Raises:
        ValueError: if it is missing, not a number, outside [0, 1), or contradicts n:m.
    """
    fixed = pattern.sparsity
    if sparsity is None:
        if fixed is not None:
            return fixed
        raise ValueError(
            "Pattern 'unstructured' needs a sparsity in [0, 1), got none; 0.5 removes half of the weights."
        )
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), got {sparsity!r}; 0.6 removes 60% of the weights.")
    if fixed is not None and not math.isclose(sparsity, fixed):
        raise ValueError(f"Pattern {pattern} fixes sparsity at {fixed:g}, got {sparsity}; leave sparsity out.")
    return float(sparsity) if fixed is None else fixed
