"""What shape of zeros a mask must have: `unstructured`, or `n:m` with n weights KEPT of every m along the input.

Several public pruning scripts write the number of REMOVED weights first; the two readings agree only at 50%.
Here, as in NVIDIA's documentation and MaskLLM, `1:4` keeps one weight of four and so means 75% sparsity.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv 2104.08378), for 2:4.
"""

from __future__ import annotations

import re
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
