"""How sparse a model is, counted in its weights and compared with its masks.

    for row in sparsity_table(masks, model):
        row.name, row.sparsity, row.kept_but_zero, row.revived

A mask says which weights were pruned; the weights say what is there now. Both are counted: `zeros` and `sparsity` come
from the weights, `kept` from the mask, and `kept_but_zero` and `revived` are where the two disagree, so that
`zeros == total - kept + kept_but_zero - revived` always holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks import MaskSet
from sparse_ft.models import matrix_view


@dataclass(frozen=True)
class SparsityRow:
    """Counts of one tensor, or of several together (then `name` is what they share and `shape` is empty).

    Attributes:
        name: canonical parameter name, `"model.layers.0.self_attn.q_proj.weight"`.
        block: the repeated block it lies in, `"model.layers.0"`; empty outside any.
        role: what it is in its block, `"q_proj"`; experts of one kind share a role.
        shape: the parameter's own shape.
        pattern: `"unstructured"` or `"n:m"`.
        kept: weights the mask keeps.
        total: all weights.
        zeros: weights that are zero (-0 counts); without weights, those the mask prunes.
        kept_but_zero: kept by the mask, yet zero; None when no weights were given.
        revived: pruned by the mask, yet not zero; None when no weights were given.
        violations: groups with more than n non-zero weights of m; None for `unstructured`.
    """

    name: str
    block: str
    role: str
    shape: tuple[int, ...]
    pattern: str
    kept: int
    total: int
    zeros: int
    kept_but_zero: int | None
    revived: int | None
    violations: int | None

    @property
    def sparsity(self) -> float:
        """Share of zeros in the weights, 0 to 1."""
        return self.zeros / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values with the sparsity, as stored in `report.json`."""
        return {**asdict(self), "shape": list(self.shape), "sparsity": self.sparsity}


def sparsity_table(masks: MaskSet, weights: nn.Module | Mapping[str, Tensor] | None = None) -> list[SparsityRow]:
    """Count zeros, kept weights and disagreements of every masked tensor, block by block.

    Args:
        masks: the masks.
        weights: the model, or its tensors by name (read one at a time); None counts in the masks only.

    Raises:
        ValueError: if a masked tensor is absent from the weights or has another shape.

    Example:
        >>> rows = sparsity_table(masks, model)
        >>> sparsity_totals(rows)["all"].sparsity
        0.5
    """
    blocks = {name: block_of(name) for name in masks}
    roles = _roles(blocks)
    rows = [_count(name, masks, weight, blocks[name], roles[name]) for name, weight in _with_weights(masks, weights)]
    first_seen: dict[str, int] = {}
    for block in blocks.values():
        first_seen.setdefault(_stack(block), len(first_seen))
    return sorted(rows, key=lambda row: (first_seen[_stack(row.block)], _depth(row.block), role_order(row)))


def sparsity_totals(rows: Iterable[SparsityRow], by: str = "all") -> dict[str, SparsityRow]:
    """Sum rows by `"block"`, by `"role"`, by `"block_role"` (keys `"block|role"`), or `"all"` together.

    Sums have the common block, role and pattern of their rows, empty or `"mixed"` where those differ.

    Raises:
        ValueError: on another `by`.
    """
    keys = {
        "all": lambda row: "all",
        "block": lambda row: row.block,
        "role": lambda row: row.role,
        "block_role": lambda row: f"{row.block}|{row.role}",
    }
    if by not in keys:
        raise ValueError(f"Cannot sum rows by '{by}'; use one of {', '.join(keys)}.")
    sums: dict[str, SparsityRow] = {}
    for row in rows:
        key = keys[by](row)
        sums[key] = _add(key, sums[key], row) if key in sums else replace(row, name=key, shape=())
    return sums


def block_of(name: str) -> str:
    """The block in a parameter's name: all up to its first number, `"model.layers.0"`; empty when it has none."""
    match = re.match(r"(.*?\.\d+|\d+)(?=\.|$)", name)
    return match[1] if match else ""


def role_order(row: SparsityRow) -> tuple[bool, int, str, str, str]:
    """Sort key that puts attention first and query, key, value, output, gate, up, down in that order."""
    last = row.role.rsplit(".", 1)[-1]
    letter = "qkvogud".find(last[0].lower())
    return ("att" not in row.name.lower(), letter if letter >= 0 else 9, last, row.role, row.name)


def _with_weights(
    masks: MaskSet, weights: nn.Module | Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor | None]]:
    if weights is None:
        yield from ((name, None) for name in masks)
    else:
        yield from masks.weights_in(weights)


@torch.no_grad()
def _count(name: str, masks: MaskSet, weight: Tensor | None, block: str, role: str) -> SparsityRow:
    pattern, mask = masks.patterns[name], masks[name]
    kept, total = masks.counts()[name]
    live = mask if weight is None else weight != 0
    mask = mask.to(live.device)
    return SparsityRow(
        name=name,
        block=block,
        role=role,
        shape=masks.shape(name),
        pattern=str(pattern),
        kept=kept,
        total=total,
        zeros=total - int(live.sum()),
        kept_but_zero=None if weight is None else int((mask & ~live).sum()),
        revived=None if weight is None else int((~mask & live).sum()),
        violations=pattern.violations(matrix_view(live, masks.input_dims[name])) if pattern.is_structured else None,
    )


def _add(key: str, a: SparsityRow, b: SparsityRow) -> SparsityRow:
    return SparsityRow(
        name=key,
        block=a.block if a.block == b.block else "",
        role=a.role if a.role == b.role else "",
        shape=(),
        pattern=a.pattern if a.pattern == b.pattern else "mixed",
        kept=a.kept + b.kept,
        total=a.total + b.total,
        zeros=a.zeros + b.zeros,
        kept_but_zero=_plus(a.kept_but_zero, b.kept_but_zero),
        revived=_plus(a.revived, b.revived),
        violations=_plus(a.violations, b.violations),
    )


def _plus(a: int | None, b: int | None) -> int | None:
    return a if b is None else b if a is None else a + b


def _roles(blocks: Mapping[str, str]) -> dict[str, str]:
    """Shortest tail of each name that tells it from the other weights of a block, without the numbers of experts."""
    paths = {name: _path_in_block(name, block) for name, block in blocks.items()}
    distinct = set(paths.values())
    role_of = {}
    for path in distinct:
        tails = (path[-length:] for length in range(1, len(path) + 1))
        unique = (tail for tail in tails if sum(other[-len(tail) :] == tail for other in distinct) == 1)
        role_of[path] = ".".join(next(unique, path))
    return {name: role_of[path] for name, path in paths.items()}


def _path_in_block(name: str, block: str) -> tuple[str, ...]:
    parts = name.removeprefix(block).strip(".").removesuffix(".weight").split(".")
    return tuple(part for part in parts if not part.isdigit()) or (name,)


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


def _depth(block: str) -> int:
    number = block.rpartition(".")[2]
    return int(number) if number.isdigit() else -1
