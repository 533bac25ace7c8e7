"""SparseGPT: prune column by column and let the columns to the right make up for the error (blocked OBS).

With H = (2/n) X^T X + damping * mean(diag H) * I and H^-1 = U^T U, U upper triangular:

    score_ij = W_ij^2 / U_jj^2                     the error of removing W_ij when the columns > j are free
    e_j      = (W_j - keep_j * W_j) / U_jj         W_{>j} -= outer(e_j, U_{j,>j})         loss = sum(e^2) / 2

Unstructured masks are chosen for `block_size` columns at a time over all rows; n:m masks group by group from the
weights as updated so far.

Example:
    >>> hessian = Hessian(64)
    >>> hessian.add(inputs)                                            # (T, 64)
    >>> factor = factorize(hessian.matrix())                           # once for all linears that share the input
    >>> result = sparsegpt(weight, factor, pattern="2:4")
    >>> weight.copy_(result.weight)                                    # cast once, at the end; the mask is result.mask

Limits: the update compensates to the right only, so it is not the least-squares optimum on its mask; sparsity is exact
per tensor, not per row; costs O(d^3 + o d^2) time and about 3 d^2 fp32 values beside H.

Source: Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft.masks import Pattern, keep_largest
from sparse_ft.masks.selection import keep_largest_of_group
from sparse_ft.pruning.inside import check_room
from sparse_ft.pruning.precision import full_precision
from sparse_ft.pruning.validation import (
    MAX_DAMPING,
    check_block_size,
    check_damping,
    check_matrix,
    check_statistic,
    resolve_pattern,
)

_LEAF = 8  # columns handled one after the other before the rest of the block is updated by a matrix product


@dataclass(frozen=True)
class InverseFactor:
    """What SparseGPT needs of a Hessian; it depends on the inputs only, so linears that share an input share it.

    Attributes:
        upper: (d, d) fp32 upper triangular U with (damped H)^-1 = U^T U.
        dead: (d,) bool, inputs that were zero in every token.
        damping: the relative damping that was used (larger than asked for when the factorisation had to be retried).
    """

    upper: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPTResult:
    """Outcome for one layer.

    Attributes:
        weight: (o, d) fp32, exactly zero where `mask` is False. Cast it to the parameter's dtype once.
        mask: (o, d) bool, True = keep; the truth even where a kept weight is zero or becomes so by the cast.
        loss: 1/2 tr(D H D^T) of the damped H, D = change of the weights (weights of dead inputs not counted).
    """

    weight: Tensor
    mask: Tensor
    loss: float


@torch.no_grad()
def factorize(hessian: Tensor, *, damping: float = 0.01) -> InverseFactor:
    """Damp `hessian` (d, d) and return the upper factor U of its inverse; `hessian` is left unchanged.

    Dead inputs (diagonal 0) get diagonal 1. `damping` is relative to the mean of the diagonal after that; it is
    multiplied by 10 until the Cholesky factorisation succeeds.

    Raises:
        ValueError: not square, NaN/Inf, invalid damping, or all zero (no token reached the layer: use magnitude).
        RuntimeError: if no damping makes it positive definite.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"The Hessian must be square (d, d), got shape {tuple(hessian.shape)}; use Hessian.matrix().")
    check_damping(damping)
    check_statistic(hessian, "Hessian")
    dead = hessian.diagonal() == 0
    # Reversed in both axes, H = L L^T with L lower triangular gives H^-1 = U^T U with U = reversed(L^-1): one
    # factorisation and one triangular inverse, where inverting H and factorising the inverse costs two and an inverse.
    reverse = hessian.float().flip(0, 1)
    diagonal = torch.where(dead, 1.0, hessian.diagonal().float()).flip(0)
    while damping <= MAX_DAMPING:
        reverse.diagonal().copy_(diagonal + damping * diagonal.mean())
        lower, failure = torch.linalg.cholesky_ex(reverse)
        if not bool(failure):
            del reverse
            with full_precision():
                return InverseFactor(_invert_lower(lower).flip(0, 1), dead, damping)
        damping = damping * 10 if damping else 0.01
    raise RuntimeError("The Hessian is not positive semi-definite; build it as X^T X, for example with Hessian.add().")


def _invert_lower(lower: Tensor) -> Tensor:
    """Inverse of a lower triangular (d, d) matrix by halving: most of the work is matrix products."""
    size = lower.shape[0]
    if size <= 128:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, identity, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = -(inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half]))
    return inverse


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor | InverseFactor,
    *,
    pattern: str | Pattern = "unstructured",
    sparsity: float | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    update: bool = True,
    inside: Tensor | None = None,
) -> SparseGPTResult:
    """Prune one (o, d) matrix with SparseGPT. `weight` and `hessian` are left unchanged.

    Args:
        weight: (o, d), any float dtype; computed in fp32.
        hessian: (d, d) fp32 from `Hessian.matrix()`, or its `factorize(...)` when several linears share the input.
        pattern: `"unstructured"` or `"n:m"` (n kept of m). With n:m a tail of d % m columns is kept, but updated.
        sparsity: share removed. Exactly round(sparsity * o * d) entries of the tensor go; the columns up to the end
            of each block hold round(sparsity * o * columns) of them.
        block_size: columns whose unstructured mask is chosen together. For n:m it changes nothing but speed, and is
            rounded up to a multiple of m.
        damping: passed to `factorize` when `hessian` is a tensor, otherwise unused.
        update: with False the mask is the one that the run WITH updates chooses (column by column from the updated
            weights), but the kept weights returned are the original ones, bit for bit, and `loss` is theirs.
        inside: (o, d) bool, an older mask of the weight; what it removed stays removed. A block that it emptied more
            than the new sparsity would takes its share from the other blocks.

    Raises:
        ValueError: invalid pattern, sparsity or block size, shapes that do not fit, NaN/Inf in either tensor, or a
            Hessian that is all zero (no token reached the layer: use magnitude), or no such mask inside the older one.
    """
    parsed, share = resolve_pattern(pattern, sparsity)
    check_block_size(block_size)
    if parsed.m is not None:  # a block must not cut a group
        block_size = -(-block_size // parsed.m) * parsed.m
    factor = hessian if isinstance(hessian, InverseFactor) else factorize(hessian, damping=damping)
    check_matrix(weight, factor.upper, "Hessian")
    if inside is not None:
        check_room(inside, parsed, removed=round(share * weight.numel()))
    # Inputs first, so that a column of the paper is contiguous. Never a view: a Conv1D weight is stored like this.
    columns = torch.empty(weight.shape[::-1], dtype=torch.float32, device=weight.device).copy_(weight.T)
    columns[factor.dead] = 0
    with full_precision():
        mask, loss = _prune_columns(columns, factor.upper, parsed, share, block_size, inside)
        if not update:
            columns = weight.detach().float().T
            change = columns.masked_fill(mask | factor.dead[:, None], 0)
            # H = U^-1 U^-T, so tr(D H D^T) is the squared norm of D U^-1.
            loss = torch.linalg.solve_triangular(factor.upper.T, change, upper=False).square().sum() / 2
    pruned = columns.masked_fill(~mask, 0)
    return SparseGPTResult(pruned.T.contiguous(), mask.T.contiguous(), float(loss))


def _prune_columns(
    columns: Tensor, upper: Tensor, pattern: Pattern, sparsity: float, block_size: int, inside: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Update `columns` (d, o) in place, pruned entries excepted; return the mask (d, o) and the loss."""
    width, rows = columns.shape
    mask = torch.ones(columns.shape, dtype=torch.bool, device=columns.device)
    if inside is not None:
        mask.copy_(inside.T)
    ends = _removed_by_block((rows, width), sparsity, block_size, inside)
    diagonal = upper.diagonal()
    loss = torch.zeros((), dtype=torch.float64, device=columns.device)
    removed = 0
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        block = slice(start, stop)
        if not pattern.is_structured:
            scores = columns[block].abs() / diagonal[block, None]
            if inside is not None:
                scores.masked_fill_(~mask[block], -math.inf)
            total = ends[start // block_size]
            # Transposed: of equal scores the first rows go first, as everywhere else.
            mask[block] = keep_largest(scores.T, scores.numel() - (total - removed)).T
            removed = total
        errors = torch.empty_like(columns[block])
        _solve(columns[block], mask[block], errors, upper[block, block], pattern, inside is not None)
        loss += torch.linalg.vector_norm(errors, dtype=torch.float64).square() / 2
        columns[stop:].addmm_(upper[block, stop:].T, errors, alpha=-1)
    return mask, loss


def _removed_by_block(shape: tuple[int, int], sparsity: float, block_size: int, inside: Tensor | None) -> list[int]:
    """How many weights are removed up to the end of each block: the sparsity's share of the columns so far, but at
    least what an older mask (o, d) removed there, and leaving room for what it removed in the blocks behind.
    """
    rows, width = shape
    gone = [0] * width if inside is None else (~inside).sum(0).cumsum(0).tolist()
    final, removed, before = round(sparsity * rows * width), 0, 0
    ends = []
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        least, most = removed + gone[stop - 1] - before, final - (gone[-1] - gone[stop - 1])
        removed, before = min(max(round(sparsity * rows * stop), least), most), gone[stop - 1]
        ends.append(removed)
    return ends


def _solve(columns: Tensor, mask: Tensor, errors: Tensor, upper: Tensor, pattern: Pattern, constrained: bool) -> None:
    """Run the column loop on a block (b, o): left half, its effect on the right half as one product, right half.

    Fills `errors` (b, o), updates `columns`, and for n:m chooses `mask` of each group when its turn comes; if it is
    `constrained`, from what `mask` keeps already.
    """
    width = columns.shape[0]
    leaf = pattern.m or _LEAF
    if width <= leaf:
        _solve_leaf(columns, mask, errors, upper, pattern, constrained)
        return
    half = leaf * ((width // leaf + 1) // 2)
    _solve(columns[:half], mask[:half], errors[:half], upper[:half, :half], pattern, constrained)
    columns[half:].addmm_(upper[:half, half:].T, errors[:half], alpha=-1)
    _solve(columns[half:], mask[half:], errors[half:], upper[half:, half:], pattern, constrained)


def _solve_leaf(
    columns: Tensor, mask: Tensor, errors: Tensor, upper: Tensor, pattern: Pattern, constrained: bool
) -> None:
    """The textbook loop over a few columns (b, o)."""
    width = columns.shape[0]
    diagonal = upper.diagonal()[:, None]
    if pattern.n is not None and width == pattern.m:
        scores = columns.abs() / diagonal
        if constrained:
            scores.masked_fill_(~mask, -math.inf)
        mask.copy_(keep_largest_of_group(scores.T, pattern.n).T)
    removal = (~mask).float().div_(diagonal)
    for j in range(width):
        torch.mul(columns[j], removal[j], out=errors[j])
        columns[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
