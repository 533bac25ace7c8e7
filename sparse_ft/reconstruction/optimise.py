"""Train one window: a few parameters, a function of the batch number, and targets to come close to.

The loss is the mean squared error in fp32, divided by what it was before training. So AdamW's epsilon means the same in
every window, whatever the scale of its activations: gradients of a mean over millions of outputs would otherwise come
close to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

#: What a window computes, or should compute, for the batch of a number.
OfBatch = Callable[[int], Tensor]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for matrix products in bfloat16, several times as fast as those in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # older releases of torch do not tell
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def squared_error(result: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences, in fp32 or wider."""
    dtype = torch.promote_types(result.dtype, torch.float32)
    difference = result.to(dtype) - target.to(device=result.device, dtype=dtype)
    return (difference * difference).sum()


class RunningLoss:
    """Mean squared error over batches that come one by one; every element counts the same."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0

    def add(self, result: Tensor, target: Tensor) -> None:
        """Take in one batch; both of the same shape."""
        self._sum += float(squared_error(result.detach(), target))
        self._count += target.numel()

    def mean(self) -> float:
        """The mean so far; 0 without any element."""
        return self._sum / self._count if self._count else 0.0


def learning_rates(peak: float, iterations: int, warmup: float) -> Iterator[float]:
    """The learning rate of each step: up to the peak in equal steps, then down towards 0 in equal steps.

    No step is wasted on a rate of 0.

    Args:
        peak: highest learning rate.
        iterations: number of steps.
        warmup: steps until the peak; below 1 a share of all.

    Example:
        >>> list(learning_rates(1.0, 4, 0.25))
        [0.5, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    rising = min(math.ceil(warmup * iterations) if warmup < 1 else int(warmup), iterations)
    for step in range(iterations):
        if step < rising:
            yield peak * (step + 1) / (rising + 1)
        else:
            yield peak * (iterations - step) / (iterations - rising)


def shuffled(batches: Sequence[int], iterations: int, generator: torch.Generator) -> Iterator[int]:
    """`iterations` batch numbers: every batch once per epoch, in another order each epoch."""
    left = iterations
    while left > 0:
        order = torch.randperm(len(batches), generator=generator).tolist()[:left]
        left -= len(order)
        yield from (batches[place] for place in order)


def train_window(
    parameters: Sequence[Tensor],
    forward: OfBatch,
    target: OfBatch,
    batches: Sequence[int],
    *,
    iterations: int,
    learning_rate: float,
    generator: torch.Generator,
    warmup: float = 0.1,
    before: float = 1.0,
    autocast: torch.dtype | None = None,
) -> int:
    """AdamW without weight decay on the mean squared error; linear warm-up and decay, no clipping.

    Args:
        parameters: what is trained, in fp32. Hooks on their gradients are the caller's.
        forward: the window's result for a batch, with gradients.
        target: what it should be, of the same shape.
        batches: their numbers; not empty.
        iterations: number of steps, of one batch each.
        learning_rate: at its peak.
        generator: of the order of the batches.
        warmup: as in `learning_rates`.
        before: the loss before training, which the loss is divided by.
        autocast: dtype of matrix products in the forward; None for that of the weights.

    Returns:
        The number of steps made: fewer than `iterations` if the loss was not finite any more.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    device = parameters[0].device.type
    # Each weight is used once per step, and a cached cast would be that of the step before in an outer autocast.
    narrow = autocast is not None
    products = torch.autocast(device, dtype=autocast, cache_enabled=False) if narrow else nullcontext()
    steps = zip(
        learning_rates(learning_rate, iterations, warmup), shuffled(batches, iterations, generator), strict=True
    )
    for step, (rate, number) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate
        with products:
            result = forward(number)
        loss = squared_error(result, target(number)) / (result.numel() * before)
        if not math.isfinite(loss.item()):
            return step
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return iterations
