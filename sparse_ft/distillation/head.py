"""The output head and the losses on its logits, a few tokens at a time.

No tensor of tokens × vocabulary is made. The loss is a scalar, so its gradient is known, up to a factor, as soon as a
chunk's logits are: the forward pass turns each chunk into its share of dL/dstates and dL/dhead, drops the logits, and
backward only multiplies by the factor. The student's head is multiplied three times, as in plain training, and the
teacher's once; nothing is computed twice. A chunk is large, so that these products are efficient; what happens between
them is done on blocks of it that stay in the processor's cache, and a block's gradient replaces its product.

Gradients of the head are summed in fp32. They live from the end of the forward pass to the start of backward, where
plain training makes them as well. Without gradients (`torch.no_grad`) only the values are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_ft.distillation.states import wide

# A product of a head has this many values at a time (64 MiB in bf16), whatever the vocabulary and the batch.
LOGITS_PER_CHUNK = 2**25

# Logits are in fp32 this many values at a time: 1 MiB for each core of a CPU, 64 MiB on other devices.
_PER_BLOCK_AND_THREAD, _PER_BLOCK = 2**18, 2**24

# (a block of a chunk, log softmax of the student's logits / temperature (n, V)) -> (KL (n,), probabilities p (n, V)),
# where the gradient of KL by the logits / temperature is softmax - p; p is new memory that the caller may overwrite
Comparison: TypeAlias = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
# A chunk's positions -> how its blocks are compared
Target: TypeAlias = Callable[[Tensor], Comparison]


class Head(NamedTuple):
    """logits = cap(scale · (x Wᵀ + b)), cap(z) = softcap · tanh(z / softcap).

    Attributes:
        weight: (V, h), not quantised and not sharded.
        bias: (V,) or None.
        scale: what the model multiplies logits by, or states before a head without bias: d_model^-0.5 in a tied T5.
        softcap: as in Gemma 2; None: no cap.

    Example:
        >>> head = Head(model.lm_head.weight, softcap=model.config.final_logit_softcapping)
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class TokenLoss(NamedTuple):
    """What `ce_kl_loss` returns.

    Attributes:
        total: scalar, ce_weight · ce + kl_weight · kl; gradients flow to the student's states and head.
        ce: scalar, detached, for logs; 0 where its weight is 0.
        kl: scalar, detached, for logs, temperature squared included; 0 where its weight is 0.
    """

    total: Tensor
    ce: Tensor
    kl: Tensor


@dataclass(frozen=True)
class TokenTask:
    """What is computed from the logits.

    Attributes:
        positions: (N,) int64, rows of the flattened states that have a label.
        labels: (N,) int64.
        target: the teacher's side of KL; None: no KL.
        ce_weight: factor of cross-entropy.
        kl_weight: factor of temperature² · KL.
        temperature: what logits are divided by in KL.
        label_smoothing: share of cross-entropy's target that is spread evenly over the vocabulary.
        chunk: positions at a time.
    """

    positions: Tensor
    labels: Tensor
    target: Target | None
    ce_weight: float
    kl_weight: float
    temperature: float
    label_smoothing: float
    chunk: int


def vocabulary(states: Tensor, head: Head | None) -> int:
    """Number of logits per token."""
    return states.shape[-1] if head is None else head.weight.shape[0]


def product_dtype(states: Tensor) -> torch.dtype:
    """What the head's product is computed in: autocast's dtype where that is on, else that of the states."""
    device = states.device.type
    if torch.is_autocast_enabled(device) and states.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return states.dtype


def head_product(rows: Tensor, head: Head | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b in `dtype`, in new memory unless `head` is None.

    Args:
        rows: (n, h), or the logits (n, V) themselves if `head` is None.
        head: the head, or None.
        dtype: what the product is computed in.
    """
    if head is None:
        return rows
    with torch.autocast(head.weight.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(head.weight.device, dtype)
        return F.linear(rows.to(head.weight.device, dtype), head.weight.to(dtype), bias)


def as_logits(product: Tensor, head: Head | None) -> Tensor:
    """Logits in fp32 (fp64 for fp64 input) of a product of the head, which is overwritten if it is in that dtype."""
    logits = product.to(wide(product.dtype))
    if head is None:
        return logits
    if head.scale != 1:
        logits.mul_(head.scale)
    return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)


def head_logits(rows: Tensor, head: Head | None, dtype: torch.dtype) -> Tensor:
    """Logits in fp32 (fp64 for fp64 input), in new memory unless `head` is None and the rows are in it already.

    Args:
        rows: (n, h), or the logits (n, V) themselves if `head` is None.
        head: the head, or None.
        dtype: what the product is computed in.
    """
    return as_logits(head_product(rows, head, dtype), head)


def token_loss(states: Tensor, head: Head | None, task: TokenTask) -> TokenLoss:
    """Sums over the positions of the task, not yet divided by their number.

    Args:
        states: (M, h), or logits (M, V) if `head` is None; on the device of the head.
        head: the student's head.
        task: what to compute.

    Returns:
        The sums in fp32, differentiable in states and head.
    """
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (states, weight, bias))
    return TokenLoss(*_TokenLoss.apply(states, weight, bias, head, task, needs))


def _blocks(products: Tensor) -> Iterator[slice]:
    """The rows of a chunk, a block at a time."""
    on_cpu = products.device.type == "cpu"
    values = _PER_BLOCK_AND_THREAD * torch.get_num_threads() if on_cpu else _PER_BLOCK
    rows = max(1, values // products.shape[-1])
    for start in range(0, len(products), rows):
        yield slice(start, start + rows)


def _block_loss(
    logits: Tensor, labels: Tensor, compare: Callable[[Tensor], Any] | None, task: TokenTask, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of CE, sum of temperature² · KL) and the gradient (n, V) of the weighted sum by the logits."""
    labels, smoothing, factor = labels.unsqueeze(-1), task.label_smoothing, task.ce_weight
    ce, kl, gradient = logits.new_zeros(()), logits.new_zeros(()), None
    log_probs = torch.log_softmax(logits, -1) if factor or task.temperature == 1 else logits
    tempered = log_probs if task.temperature == 1 else torch.log_softmax(logits / task.temperature, -1)
    if factor:
        ce = (smoothing - 1) * log_probs.gather(-1, labels).sum()
        if smoothing:
            ce = ce - smoothing * log_probs.mean(-1).sum()
    if compare is not None:
        rows, wanted = compare(tempered)
        kl = rows.sum() * task.temperature**2
        if with_gradient:
            gradient = torch.sub(tempered.exp_(), wanted, out=wanted).mul_(task.kl_weight * task.temperature)
    if factor and with_gradient:
        probabilities = log_probs if compare is not None and task.temperature == 1 else log_probs.exp_()
        gradient = probabilities.mul_(factor) if gradient is None else gradient.add_(probabilities, alpha=factor)
        if smoothing:
            gradient.sub_(factor * smoothing / logits.shape[-1])
        gradient.scatter_add_(-1, labels, torch.full_like(labels, factor * (smoothing - 1), dtype=gradient.dtype))
    return torch.stack([ce, kl]), gradient


def _through_cap(gradient: Tensor, logits: Tensor, head: Head) -> Tensor:
    """The gradient by the head's product, from that by the logits, in place."""
    if head.softcap is not None:
        gradient.mul_(1 - (logits / head.softcap).square_())
    return gradient if head.scale == 1 else gradient.mul_(head.scale)


class _TokenLoss(torch.autograd.Function):
    """See `token_loss`; keeps the gradients of the summed loss for a total gradient of 1."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        task: TokenTask,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = states.dtype if head is None else product_dtype(states)
        if head is not None:
            head = head._replace(weight=head.weight.to(dtype))  # once, not in every chunk
        sums = torch.zeros(2, dtype=wide(dtype), device=states.device)
        # positions without a label keep a gradient of 0
        gradients = [
            torch.zeros_like(states) if needs[0] else None,
            torch.zeros_like(weight, dtype=wide(dtype)) if needs[1] and weight is not None else None,
            torch.zeros_like(bias, dtype=wide(dtype)) if needs[2] and bias is not None else None,
        ]
        for start in range(0, len(task.positions), task.chunk):
            positions, labels = (every[start : start + task.chunk] for every in (task.positions, task.labels))
            rows = states[positions].to(dtype)
            products = head_product(rows, head, dtype)
            comparison = None if task.target is None else task.target(positions)
            for block in _blocks(products):
                logits = as_logits(products[block], head)
                compare = None if comparison is None else partial(comparison, block)
                values, gradient = _block_loss(logits, labels[block], compare, task, any(needs))
                sums += values
                if gradient is not None:
                    gradient = gradient if head is None else _through_cap(gradient, logits, head)
                    if gradients[2] is not None:
                        gradients[2].add_(gradient.sum(0))
                    products[block] = gradient
            if any(needs) and (comparison is not None or task.ce_weight):
                _spread(products, rows, head, positions, gradients)
        ctx.save_for_backward(*gradients)
        ctx.values_at_a_time = task.chunk * vocabulary(states, head)
        ctx.dtypes = [None if t is None else t.dtype for t in (states, weight, bias)]
        ce, kl = sums.unbind()
        ctx.mark_non_differentiable(ce, kl)
        return task.ce_weight * ce + task.kl_weight * kl, ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if kept is None else _scaled(kept, grad, dtype, ctx.values_at_a_time)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _scaled(kept: Tensor, grad: Tensor, dtype: torch.dtype, values: int) -> Tensor:
    """kept · grad in `dtype`, multiplied in fp32, `values` at a time: bf16 · fp32 scalar may round the scalar first."""
    result = torch.empty_like(kept, dtype=dtype)
    rows = max(1, values // max(1, kept[:1].numel()))
    for part, into in zip(kept.split(rows), result.split(rows), strict=True):
        into.copy_(part.to(grad.dtype) * grad)
    return result


def _spread(
    gradient: Tensor, rows: Tensor, head: Head | None, positions: Tensor, gradients: list[Tensor | None]
) -> None:
    """Add what a chunk's gradient by its products (n, V) means for states and weight."""
    to_states, to_weight, _ = gradients
    if head is None:
        if to_states is not None:
            to_states.index_copy_(0, positions, gradient.to(to_states.dtype))
        return
    with torch.autocast(rows.device.type, enabled=False):
        if to_states is not None:
            to_states.index_copy_(0, positions, (gradient @ head.weight).to(to_states.dtype))
        if to_weight is not None and to_weight.dtype == rows.dtype:
            to_weight.addmm_(gradient.t(), rows)
        elif to_weight is not None:
            to_weight.add_(gradient.t() @ rows)
