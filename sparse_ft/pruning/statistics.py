"""Running calibration statistics of a layer's inputs: second moment (Wanda) and Hessian (SparseGPT).

One accumulator belongs to one input; every linear layer that receives this input (q, k and v; gate and up) uses the
same one. Both count TOKENS, so the result does not depend on order or batching beyond fp32 rounding.

Example:
    >>> hessian = Hessian(64)
    >>> hessian.add(torch.randn(128, 64))
    >>> hessian.tokens, hessian.matrix().shape, hessian.second_moment().shape
    (128, torch.Size([64, 64]), torch.Size([64]))
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ft.pruning.precision import full_precision

_ROWS = 128  # tokens squared together: the temporary stays in cache, 8 times faster than one pass over all tokens
_SLAB = 256  # columns of H per product: wide enough for full gemm speed, narrow enough to skip most of the lower half


class SecondMoment:
    """Token mean of x_j^2 for each of d input features, in fp32.

    Args:
        input_size: d, the number of input features.
        device: where the statistic lives; give the device of the inputs.

    Attributes:
        tokens: number of tokens seen so far.

    Source: Wanda, Sun et al. 2023, eq. (1); ||X_j||_2 is sqrt(tokens * mean), and the factor does not change a mask.
    """

    def __init__(self, input_size: int, *, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._mean = torch.zeros(input_size, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs` (T, d) of any float dtype, pad rows already dropped. T = 0 changes nothing.

        Raises:
            ValueError: if `inputs` is not (T, d).
        """
        _check_inputs(inputs, self._mean.shape[0])
        self.tokens += len(inputs)
        if not len(inputs):
            return
        total = torch.zeros_like(self._mean)
        for rows in inputs.detach().split(_ROWS):
            total += rows.float().square().sum(0)
        self._mean.mul_(1 - len(inputs) / self.tokens).add_(total, alpha=1 / self.tokens)

    def second_moment(self) -> Tensor:
        """Mean of x_j^2 over all tokens, (d,) fp32; zeros when no token was seen."""
        return self._mean


class Hessian:
    """H = (2 / tokens) * X^T X over all tokens, (d, d) in fp32, TF32 off.

    Only the blocks on and above the diagonal are multiplied; the rest follows from symmetry.

    Args:
        input_size: d, the number of input features.
        device: where the statistic lives; give the device of the inputs.

    Attributes:
        tokens: number of tokens seen so far.

    Source: SparseGPT, Frantar & Alistarh 2023, section 3.
    """

    def __init__(self, input_size: int, *, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._upper = torch.zeros(input_size, input_size, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs` (T, d) of any float dtype, pad rows already dropped. T = 0 changes nothing.

        Raises:
            ValueError: if `inputs` is not (T, d).
        """
        size = self._upper.shape[0]
        _check_inputs(inputs, size)
        self.tokens += len(inputs)
        if not len(inputs):
            return
        rows = inputs.detach().float()
        old, new = 1 - len(inputs) / self.tokens, 2 / self.tokens
        with full_precision():
            for start in range(0, size, _SLAB):
                slab = self._upper[start : start + _SLAB, start:]
                slab.addmm_(rows[:, start : start + _SLAB].T, rows[:, start:], beta=old, alpha=new)

    def matrix(self) -> Tensor:
        """H, (d, d) fp32 and symmetric; zeros when no token was seen. It is the accumulator's own memory: read only."""
        for start in range(0, self._upper.shape[0], _SLAB):
            stop = start + _SLAB
            self._upper[stop:, start:stop] = self._upper[start:stop, stop:].T
        return self._upper

    def second_moment(self) -> Tensor:
        """diag(H) / 2, the (d,) second moment that Wanda needs; zeros when no token was seen."""
        return self._upper.diagonal() / 2


def _check_inputs(inputs: Tensor, input_size: int) -> None:
    if inputs.dim() != 2 or inputs.shape[1] != input_size:
        raise ValueError(
            f"Calibration inputs have shape {tuple(inputs.shape)} but the layer takes {input_size} features; "
            "flatten them to (tokens, features)."
        )
