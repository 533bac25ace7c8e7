"""`MaskSet`: one bool mask per prunable weight, the truth about which weights are pruned.

`weight != 0` is not a mask: weights can be zero by chance, by bf16 underflow or in dead columns, and a pruned weight
that came back is no longer zero. The stored mask is what every command enforces and verifies.

Example:
    >>> masks = MaskSet.from_zeros(model)           # the model is sparse already
    >>> masks.apply_(model)                         # zero what is pruned, in place
    >>> masks.verify(model)                         # raises if one weight revived
    >>> masks.save("checkpoint")
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft.masks import mask_file
from sparse_ft.masks.blocks import PIECE, violations
from sparse_ft.masks.making import masks_of_scores, masks_of_zeros
from sparse_ft.masks.packing import count_bits, pack_bits, unpack_bits
from sparse_ft.masks.pattern import Pattern, pattern_for
from sparse_ft.models.names import canonical_name, named_weights
from sparse_ft.models.targets import Target, find_targets


class Surprise(NamedTuple):
    """Where a mask and the zeros of a weight disagree: counts of weights."""

    kept_zero: int
    pruned_nonzero: int


class MaskSet(Mapping[str, Tensor]):
    """Immutable mapping from canonical parameter name to its bool mask, True = keep.

    Masks have their parameter's own layout and are held as bits, one per weight; reading an item unpacks it to a new
    tensor.

    Args:
        masks: bool tensors by parameter name.
        pattern: one pattern for all tensors, or one per name.
        input_dims: axis of the inputs per name where it is not the last (Conv1D: 0).

    Raises:
        ValueError: if there is no mask, one is not bool, or one breaks its n:m pattern.
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        *,
        pattern: str | Pattern | Mapping[str, str | Pattern] = "unstructured",
        input_dims: Mapping[str, int] | None = None,
    ) -> None:
        packed: dict[str, Tensor] = {}
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"Mask of '{name}' must be torch.bool, got {mask.dtype}; use `mask != 0`.")
            packed[name] = pack_bits(mask).cpu()
        self._take(packed, {name: mask.shape for name, mask in masks.items()}, pattern, input_dims)

    @classmethod
    def from_packed(
        cls,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        *,
        pattern: str | Pattern | Mapping[str, str | Pattern] = "unstructured",
        input_dims: Mapping[str, int] | None = None,
    ) -> MaskSet:
        """Take over masks that are bits already; the bits are kept as they are, not copied.

        Args:
            packed: `pack_bits` of each mask, by parameter name.
            shapes: of the masks, by parameter name.
            pattern: as in `MaskSet`; a mask with an n:m pattern is checked, piece by piece.
            input_dims: as in `MaskSet`.

        Raises:
            ValueError: as `MaskSet`, or if bits do not fit their shape.

        Example:
            >>> MaskSet.from_packed({"w": pack_bits(mask)}, {"w": mask.shape}) == MaskSet({"w": mask})
            True
        """
        masks = cls.__new__(cls)
        masks._take(packed, shapes, pattern, input_dims)
        return masks

    def _take(
        self,
        packed: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]],
        pattern: str | Pattern | Mapping[str, str | Pattern],
        input_dims: Mapping[str, int] | None,
    ) -> None:
        """Check and hold packed masks."""
        if not packed:
            raise ValueError("A MaskSet needs at least one mask, got none.")
        self.patterns = {name: pattern_for(name, pattern) for name in packed}
        self._shapes = {name: torch.Size(shapes[name]) for name in packed}
        self.input_dims = {n: (input_dims or {}).get(n, len(shape) - 1) for n, shape in self._shapes.items()}
        self._packed = dict(packed)
        self._kept = {name: count_bits(bits, self._shapes[name]) for name, bits in packed.items()}
        for name, parsed in self.patterns.items():
            axis = self.input_dims[name]
            if not 0 <= axis < max(1, len(self._shapes[name])):
                raise ValueError(f"Mask of '{name}' has no axis {axis} of inputs; its shape is {self.shape(name)}.")
            if not parsed.is_structured:
                continue
            broken = violations(self._packed[name], self._shapes[name], axis, parsed)
            if broken:
                raise ValueError(
                    f"Mask of '{name}' breaks pattern {parsed} in {broken} groups; "
                    f"use pattern 'unstructured', or prune the tensor again."
                )

    # -- reading -----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(self._packed[name], self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __repr__(self) -> str:
        patterns = ", ".join(sorted({str(p) for p in self.patterns.values()}))
        return f"MaskSet({len(self)} tensors, {patterns}, sparsity {self.sparsity():.4f})"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor's mask, without unpacking it."""
        return tuple(self._shapes[name])

    def packed(self, name: str) -> Tensor:
        """One tensor's mask as `pack_bits` makes it, not a copy: for work that takes it piece by piece."""
        return self._packed[name]

    def counts(self) -> dict[str, tuple[int, int]]:
        """(kept, total) number of weights per tensor."""
        return {name: (self._kept[name], self._shapes[name].numel()) for name in self}

    def sparsity(self, name: str | None = None) -> float:
        """Share of pruned weights, of one tensor or of all of them together."""
        names = list(self) if name is None else [name]
        total = sum(self._shapes[n].numel() for n in names)
        return 1 - sum(self._kept[n] for n in names) / total

    def digest(self) -> str:
        """SHA-256 over names, shapes, patterns, orientations and bits; the order of the tensors does not matter."""
        sha = hashlib.sha256()
        for name in sorted(self):
            header = f"{name}|{tuple(self._shapes[name])}|{self.patterns[name]}|{self.input_dims[name]}|"
            sha.update(header.encode())
            sha.update(self._packed[name].numpy().tobytes())
        return sha.hexdigest()

    # -- against a model ---------------------------------------------------------------------------------------------

    def weights_in(self, model: nn.Module | Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, weight) of every masked tensor of a model, each checked to have its mask's shape.

        A mapping may read its tensors from disk: they are asked for one at a time and not held.

        Raises:
            ValueError: if a weight is absent or has another shape.
        """
        tensors: Mapping[str, Tensor] = named_weights(model) if isinstance(model, nn.Module) else model
        keys = {canonical_name(key): key for key in tensors}
        absent = next((name for name in self if name not in keys), None)
        if absent is not None:
            raise ValueError(f"The model has no tensor '{absent}' but there is a mask for it. Another model's masks?")
        for name, shape in self._shapes.items():
            weight = tensors[keys[name]].detach()
            if weight.shape != shape:
                raise ValueError(
                    f"Mask for '{name}' has shape {tuple(shape)} but the weight has {tuple(weight.shape)}. "
                    f"Was it made for another model?"
                )
            yield name, weight

    @torch.no_grad()
    def apply_(self, model: nn.Module | Mapping[str, Tensor]) -> MaskSet:
        """Set every pruned weight to +0 in place; kept weights are not touched. Returns self."""
        for name, weight in self.weights_in(model):
            weight.masked_fill_(~self[name].to(weight.device), 0)
        return self

    def surprises(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, Surprise]:
        """Where mask and zeros disagree, per tensor; tensors without disagreement are left out."""
        found = {}
        for name, weight in self.weights_in(model):
            mask, zero = self[name].to(weight.device), weight == 0
            surprise = Surprise(int((mask & zero).sum()), int((~mask & ~zero).sum()))
            if any(surprise):
                found[name] = surprise
        return found

    def revived(self, model: nn.Module | Mapping[str, Tensor]) -> dict[str, int]:
        """Number of pruned weights that are not zero, per tensor that has any."""
        return {name: s.pruned_nonzero for name, s in self.surprises(model).items() if s.pruned_nonzero}

    def verify(self, model: nn.Module | Mapping[str, Tensor]) -> None:
        """Check that every pruned weight is exactly zero.

        Raises:
            RuntimeError: naming the first tensor with a revived weight and the total number of them.
            ValueError: if a weight is absent or has another shape.
        """
        revived = self.revived(model)
        if revived:
            name = next(iter(revived))
            raise RuntimeError(
                f"{sum(revived.values())} pruned weights in {len(revived)} tensors are not zero, the first "
                f"{revived[name]} in '{name}'; train with MaskCallback or MaskLoRA, or prune again with masks.apply_()."
            )

    def weights_digest(self, model: nn.Module | Mapping[str, Tensor]) -> str:
        """SHA-256 over the fp32 values of the masked weights: the same for any order, device or wider dtype."""
        parts = {name: tensor_digest(weight) for name, weight in self.weights_in(model)}
        return hashlib.sha256("".join(f"{name}|{parts[name]}|" for name in sorted(parts)).encode()).hexdigest()

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_zeros(
        cls,
        model: nn.Module | Mapping[str, Tensor],
        *,
        pattern: str | Pattern | None = None,
        targets: Sequence[Target] | None = None,
        min_sparsity: float = 0.01,
    ) -> MaskSet:
        """Take the zeros of an already sparse model as its mask.

        Kept weights that happen to be zero cannot be told from pruned ones in an unstructured model. With an n:m
        pattern they can: every whole group keeps exactly n, so `surprises()` then lists the kept-but-zero weights. A
        tensor with a share of zeros below `min_sparsity` is taken as dense, its zeros as kept.

        Args:
            model: a model, or tensors by name (then `targets` must be given).
            pattern: n:m the zeros must have; None and `"unstructured"` accept any.
            targets: which tensors; by default all prunable weights of the model.
            min_sparsity: least share of zeros that counts as pruned.

        Raises:
            ValueError: if the whole is dense, or a group has more than n non-zero weights.
        """
        parsed = Pattern.parse(pattern or "unstructured")
        if targets is None:
            if not isinstance(model, nn.Module):
                raise ValueError("from_zeros needs `targets` when given tensors instead of a model.")
            targets = find_targets(model)
        masks = masks_of_zeros(named_weights(model), targets, parsed, min_sparsity)
        dense_or = {n: parsed if not bool(m.all()) else Pattern() for n, m in masks.items()}
        return cls(masks, pattern=dense_or, input_dims={t.name: t.input_dim for t in targets})

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        *,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
        scope: str = "tensor",
        input_dims: Mapping[str, int] | None = None,
    ) -> MaskSet:
        """Keep the weights with the largest scores.

        Args:
            scores: real tensors in their parameter's layout, by name.
            pattern: n:m keeps n of every m inputs and needs no `sparsity`.
            sparsity: share to prune, in [0, 1), for `unstructured`.
            scope: what the share is taken of: each `"tensor"` (round(s·numel) pruned), each output `"row"`
                (floor(s·d) pruned), or all tensors together, `"global"`.
            input_dims: axis of the inputs where it is not the last.

        Raises:
            ValueError: on a sparsity outside [0, 1), an unknown scope, or NaN scores.

        Example:
            >>> MaskSet.from_scores({"w": weight.abs()}, sparsity=0.5).sparsity()
            0.5
        """
        parsed = Pattern.parse(pattern)
        dims = {n: (input_dims or {}).get(n, s.ndim - 1) for n, s in scores.items()}
        return cls(masks_of_scores(scores, parsed, sparsity, scope, dims), pattern=parsed, input_dims=dims)

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def __or__(self, other: MaskSet) -> MaskSet:
        """Keep what either keeps. A tensor that only one set lists counts as wholly kept in the other."""
        return self._combine(other, union=True)

    def __and__(self, other: MaskSet) -> MaskSet:
        """Keep what both keep. A tensor that only one set lists counts as wholly kept in the other."""
        return self._combine(other, union=False)

    def __le__(self, other: MaskSet) -> bool:
        """True if everything this set keeps is kept by `other` too: a later, sparser mask of the same model."""
        return all(not bool((self._or_all(n, other) & ~other._packed[n]).any()) for n in other)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskSet) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def _or_all(self, name: str, other: MaskSet) -> Tensor:
        """The packed mask, or one that keeps everything if only `other` has one."""
        if name not in self._packed:
            return pack_bits(torch.ones(other._shapes[name], dtype=torch.bool))
        if name in other._shapes and self._shapes[name] != other._shapes[name]:
            raise ValueError(
                f"Masks of '{name}' have shapes {self.shape(name)} and {other.shape(name)}; they are of two models."
            )
        return self._packed[name]

    def _combine(self, other: MaskSet, *, union: bool) -> MaskSet:
        packed, patterns, dims = {}, {}, {**other.input_dims, **self.input_dims}
        shapes = {**other._shapes, **self._shapes}
        for name in dict.fromkeys([*self, *other]):
            mine, theirs = self._or_all(name, other), other._or_all(name, self)
            packed[name] = mine | theirs if union else mine & theirs
            both = {self.patterns.get(name, Pattern()), other.patterns.get(name, Pattern())} - {Pattern()}
            holds = len(both) == 1 and not violations(packed[name], shapes[name], dims[name], next(iter(both)))
            patterns[name] = both.pop() if holds else Pattern()
        return MaskSet.from_packed(packed, shapes, pattern=patterns, input_dims=dims)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write `sparse_masks.safetensors` into a directory, or to the given file; the old file stays until the end."""
        layout = mask_file.Layout(
            {n: str(p) for n, p in self.patterns.items()},
            {n: tuple(s) for n, s in self._shapes.items()},
            dict(self.input_dims),
            self.digest(),
        )
        return mask_file.write(path, self._packed, layout)

    @classmethod
    def load(cls, path: str | Path) -> MaskSet:
        """Read masks from a directory, a file, or a Hub repository.

        Raises:
            FileNotFoundError: if there are none.
            ValueError: if the file is damaged, or its digest does not fit its content.
        """
        file, packed, layout = mask_file.read(path)
        try:
            loaded = cls.from_packed(packed, layout.shapes, pattern=layout.patterns, input_dims=layout.input_dims)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:  # a header that no `save` wrote
            raise ValueError(f"'{file}' is damaged ({error}); restore it or prune again.") from error
        if loaded.digest() != layout.digest:
            raise ValueError(
                f"Masks in '{file}' have digest {loaded.digest()[:12]} but the file says {layout.digest[:12]}; "
                f"it was changed after it was written, prune again or restore it."
            )
        return loaded

    def push_to_hub(self, repo_id: str, *, token: str | None = None, commit_message: str = "Upload masks") -> str:
        """Upload the masks to a Hub repository (made when it is not there). Returns the commit's address."""
        return mask_file.push(self.save, repo_id, token=token, commit_message=commit_message)


def tensor_digest(weight: Tensor) -> str:
    """SHA-256 over the values of one tensor as contiguous fp32."""
    sha = hashlib.sha256()
    for piece in weight.detach().reshape(-1).split(PIECE):
        values = piece.to(device="cpu", dtype=torch.float32).contiguous()
        sha.update(values.view(torch.uint8).numpy().data)
    return sha.hexdigest()
