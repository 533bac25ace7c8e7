"""Fine-tunes on one resident base: put a delta onto a loaded model, take it off, swap it for another, all in place.

    kept entries:  weight = base + delta / q, added in fp32 and cast once        all others: not touched

Floating-point addition cannot be undone by subtraction, so the base's values at the kept entries are set aside when a
delta is applied and put back when it is subtracted: the base returns bit for bit, in any dtype. Values, positions and
room for what is set aside take 8 bytes per kept entry of a 16-bit model, whether it is applied or not: 4% of the
model's memory at a density of 0.01, 40% at 0.1. Where more than one entry in eight is kept, positions are held as one
bit per entry. Tensors the delta replaces whole are set aside whole.

The weights of a bfloat16 model in the memory of this machine are worked on by compiled loops, on as many threads as
torch has; others by torch's own indexing, several times slower on a CPU.

    first, second = Delta.load("math-delta"), Delta.load("code-delta")
    first.apply(model)
    swap(model, first, second)
    second.subtract(model)        # the base again
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparse_ft.deltas.checks import check_scale
from sparse_ft.deltas.delta_header import Header, Part
from sparse_ft.deltas.entries import add_entries, add_kept, has_loop, put_entries
from sparse_ft.deltas.fingerprint import base_digest
from sparse_ft.deltas.store import DeltaFile
from sparse_ft.masks import pack_bits, unpack_bits
from sparse_ft.models import canonical_name

_Item = TypeVar("_Item")


@dataclass
class _Change:
    """One live tensor that a delta changed: what it had, and how it looked right after."""

    tensor: Tensor
    old: Tensor
    version: int = 0
    pointer: int = 0


@dataclass
class _Applied:
    """A delta on a model: the scale it was given, and what it changed."""

    scale: float | None
    changes: dict[str, _Change]


class Delta:
    """A delta held in memory, to be applied to loaded models.

    Args:
        file: the delta on disk. Values are read now; which entries they belong to is found at first use.

    Attributes:
        header: method, density, scale, seed and what is said of each tensor.

    Example:
        >>> delta = Delta.load("delta")
        >>> delta.apply(model)
        >>> delta.subtract(model)
    """

    def __init__(self, file: DeltaFile) -> None:
        self.header: Header = file.header
        self._file = file
        parts = file.header.tensors
        self._values = {name: file.values(name) for name, part in parts.items() if part.mask != "none"}
        self._whole = {name: file.whole(name) for name, part in parts.items() if part.kind in ("finetuned", "resized")}
        self._positions: dict[str, Tensor] = {}
        self._room: dict[str, Tensor] = {}  # what was set aside is kept as room for the next time
        self._applied: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()

    @classmethod
    def load(cls, path: str | Path) -> Delta:
        """Open a delta directory.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged or of another kind.
        """
        return cls(DeltaFile(path))

    def is_applied(self, model: nn.Module) -> bool:
        """Whether the model holds this delta."""
        return model in self._applied

    def applied_scale(self, model: nn.Module) -> float | None:
        """The scale that `apply` was given; None for the stored one, or where the delta is not applied."""
        return self._applied[model].scale if self.is_applied(model) else None

    @property
    def nbytes(self) -> int:
        """Bytes held: values and tensors stored whole, positions found so far, and what is set aside in models."""
        aside = [change.old for applied in self._applied.values() for change in applied.changes.values()]
        held = (*self._values.values(), *self._whole.values(), *self._positions.values(), *self._room.values(), *aside)
        return sum(tensor.nbytes for tensor in held)

    @torch.no_grad()
    def apply(self, model: nn.Module, *, scale: float | None = None, check_base: bool = True) -> None:
        """Add the delta to a model that holds the base.

        Args:
            model: a loaded model in any floating dtype, on any device.
            scale: q to use in place of the stored ones.
            check_base: refuse weights other than those the delta was taken from. Turn it off to add a second delta.

        Raises:
            ValueError: if the model lacks a tensor, has another shape, or holds another base, or the scale is not
                positive; nothing is changed then.
            RuntimeError: if the delta is applied already.
        """
        if scale is not None:
            check_scale(scale)
        if self.is_applied(model):
            raise RuntimeError("This delta is applied to the model already; subtract it first.")
        live = live_tensors(model, self.header)
        self._check(live, type(model).__name__)
        if check_base:
            self._check_digest(live)
        applied = _Applied(scale, {})
        try:
            _each(live.values(), live, lambda name: self._put_on(name, live[name], applied))
        except BaseException:
            for name in applied.changes:
                self._take_off(name, applied)
            raise
        finally:
            torch.clear_autocast_cache()
        self._applied[model] = applied

    @torch.no_grad()
    def subtract(self, model: nn.Module) -> None:
        """Take the delta off again: every weight has the bits it had before `apply`.

        Raises:
            RuntimeError: if the delta is not applied, or one of its weights was changed since; nothing is changed then.
        """
        applied, live = self._untouched(model)
        _each(live.values(), applied.changes, lambda name: self._take_off(name, applied))
        torch.clear_autocast_cache()
        del self._applied[model]

    def prepare(self, device: torch.device | str = "cpu") -> None:
        """Find the kept entries and make room for the base's values now, so that the first `apply` is as fast as the
        next ones."""
        for name, values in self._values.items():
            self._index(name, torch.device(device))
            room = torch.empty(len(values), dtype=self.header.tensors[name].torch_dtype, device=device)
            if has_loop(room):
                self._room.setdefault(name, room.fill_(0))  # memory is there once it was written to

    def _untouched(self, model: nn.Module) -> tuple[_Applied, dict[str, Tensor]]:
        """What was applied, after a look whether all of it is still there, and the tensors as they are now."""
        if not self.is_applied(model):
            raise RuntimeError("This delta is not applied to the model; nothing to subtract.")
        applied, live = self._applied[model], live_tensors(model, self.header)
        for name, change in applied.changes.items():
            self._check_untouched(name, change, live[name], applied.scale)
        for name, change in applied.changes.items():
            change.tensor = live[name]
        return applied, live

    def _put_on(
        self, name: str, tensor: Tensor, applied: _Applied, leaving: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Change one tensor and note it, after the entries that are leaving; if that fails, it is as before without
        them."""
        part = self.header.tensors[name]
        if part.kind == "finetuned":
            change = _Change(tensor, tensor.clone())
            tensor.copy_(self._whole[name])
        else:
            index = self._index(name, tensor.device)
            rest = tensor[part.rows :].clone() if part.kind == "resized" else None
            divisor = self.header.scale_of(name) if applied.scale is None else applied.scale
            try:
                flat, room = _delta_part(tensor, part), self._room.pop(name, None)
                old = add_entries(flat, index, self._values[name], divisor, leaving=leaving, room=room)
            except ValueError as error:
                raise ValueError(f"'{name}': {error}") from None
            if rest is not None:
                tensor[part.rows :] = self._whole[name].to(tensor)
            change = _Change(tensor, old if rest is None else torch.cat([old, rest.reshape(-1)]))
        change.version, change.pointer = _version(tensor), tensor.data_ptr()
        applied.changes[name] = change

    def _leaving(self, name: str, applied: _Applied) -> tuple[Tensor, Tensor] | None:
        """Entries and what they were, of a tensor in which nothing else was changed; None of another."""
        change = applied.changes[name]
        if self.header.tensors[name].kind != "delta" or change.old.device != change.tensor.device:
            return None
        return self._index(name, change.tensor.device), change.old

    def _take_off(self, name: str, applied: _Applied) -> None:
        change, part = applied.changes[name], self.header.tensors[name]
        tensor = change.tensor
        old = change.old.to(tensor.device)
        if part.kind == "finetuned":
            tensor.copy_(old)
            return
        index = self._index(name, tensor.device)
        put_entries(_delta_part(tensor, part), index, old[: len(index)])
        if part.kind == "resized":
            tensor[part.rows :] = old[len(index) :].view_as(tensor[part.rows :])
        elif has_loop(tensor):
            self._room[name] = old

    def _check_untouched(self, name: str, change: _Change, tensor: Tensor, scale: float | None) -> None:
        if change.version >= 0 and (change.version, change.pointer) == (_version(tensor), tensor.data_ptr()):
            return
        # It was moved, or written to: the kept entries tell.
        part = self.header.tensors[name]
        same = tensor.dtype == change.old.dtype
        if same and part.kind == "finetuned":
            same = torch.equal(tensor, self._whole[name].to(tensor))
        elif same:
            index = self._index(name, tensor.device)
            old = change.old[: len(index)].to(tensor.device)
            found = _delta_part(tensor, part).index_select(0, index)
            divisor = self.header.scale_of(name) if scale is None else scale
            same = torch.equal(found, add_kept(old, self._values[name], divisor, tensor.dtype))
        if not same:
            raise RuntimeError(
                f"'{name}' was changed after the delta was applied, so the base cannot be restored; load it again."
            )

    def _index(self, name: str, device: torch.device) -> Tensor:
        """Kept entries of a tensor on a device, held as positions or, where that is smaller, as bits."""
        held, numel = self._positions.get(name), self.header.tensors[name].numel
        if held is None:
            held = torch.from_numpy(self._file.positions(name))
            held = held.int() if numel < 2**31 else held
            if 8 * len(held) > numel:
                held = pack_bits(torch.zeros(numel, dtype=torch.bool).index_fill_(0, held.long(), True))
        self._positions[name] = held = held.to(device)
        if held.dtype == torch.uint8:
            return unpack_bits(held, (numel,)).nonzero().view(-1)
        return held

    def _check(self, live: Mapping[str, Tensor], model: str) -> None:
        owners: dict[int, str] = {}
        for name, tensor in live.items():
            part = self.header.tensors[name]
            if tuple(tensor.shape) != part.shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(tensor.shape)} in the {model} and {part.shape} in the delta; resize "
                    f"the model first (resize_token_embeddings), or make a checkpoint with apply_checkpoint."
                )
            if tensor.is_meta or not tensor.is_contiguous() or tensor.is_floating_point() != _is_float(part):
                raise ValueError(
                    f"'{name}' of the {model} is {tensor.dtype} on {tensor.device} and cannot take a delta; load the "
                    f"model unquantised and whole."
                )
            other = owners.setdefault(tensor.data_ptr(), name)
            if other != name and tensor.numel():
                raise ValueError(
                    f"'{name}' and '{other}' are one tensor in the {model} but two in the delta, which was taken from "
                    f"models that do not tie them; load the model with tie_word_embeddings=False."
                )

    def _check_digest(self, live: Mapping[str, Tensor]) -> None:
        pruned = {name: part for name, part in self.header.tensors.items() if part.mask != "none"}
        found = base_digest(pruned, live) if pruned else self.header.base_digest
        if found == self.header.base_digest:
            return
        if any(tensor.dtype == torch.float16 != self.header.tensors[name].torch_dtype for name, tensor in live.items()):
            # Rounded twice, so the digest of the right base is another one too.
            sentence = "The model was cast to float16, so whether it holds the base of the delta cannot be told."
            warnings.warn(sentence, stacklevel=3)
        else:
            raise ValueError(
                f"The delta belongs to a base with digest {self.header.base_digest[:12]} but the model has "
                f"{found[:12]}: it is another model or revision, or holds another delta; load the base, or pass "
                f"check_base=False."
            )


@torch.no_grad()
def swap(model: nn.Module, old: Delta, new: Delta, *, check_base: bool = True) -> None:
    """Take one delta off a model and put another on; if the other does not fit, the first one stays.

    Two deltas of one digest change the same tensors of one base, which was looked at when the first was applied and is
    not looked at again; each weight is then visited once. With `check_base=False` that is so for any two.

    Raises:
        ValueError: as `Delta.apply`.
        RuntimeError: as `Delta.subtract`.

    Example:
        >>> swap(model, math, code)
    """
    if new is not old and new.is_applied(model):
        raise RuntimeError("The second delta is applied to the model already; subtract it first.")
    scale = old.applied_scale(model)
    if new is not old and (new.header.base_digest == old.header.base_digest or not check_base):
        _swap_each(model, old, new)
        return
    old.subtract(model)
    try:
        new.apply(model, check_base=check_base and new is not old)
    except BaseException:
        old.apply(model, scale=scale, check_base=False)
        raise


def _swap_each(model: nn.Module, old: Delta, new: Delta) -> None:
    """`swap` tensor by tensor, so that a tensor is still in the cache when the second delta comes."""
    leaving, there = old._untouched(model)
    live = live_tensors(model, new.header)
    new._check(live, type(model).__name__)
    coming = _Applied(None, {})
    # A tied tensor can have one name in the first delta and another in the second.
    pairs: dict[object, list[str | None]] = {tensor.data_ptr() or name: [name, None] for name, tensor in there.items()}
    for name, tensor in live.items():
        pairs.setdefault(tensor.data_ptr() or name, [None, None])[1] = name
    off: set[str] = set()

    def visit(names: list[str | None]) -> None:
        first, second = names
        together = None
        if first is not None and second is not None and new.header.tensors[second].kind == "delta":
            together = old._leaving(first, leaving)
        try:
            if first is not None and together is None:
                old._take_off(first, leaving)
            if second is not None:
                new._put_on(second, live[second], coming, together)
        except BaseException:
            if first is not None:
                old._take_off(first, leaving)  # however far it came; twice does no harm
            raise
        finally:
            off.update(name for name in (first,) if name is not None)
        if first is not None and together is not None and has_loop(there[first]):
            old._room[first] = together[1]

    try:
        _each((*there.values(), *live.values()), pairs.values(), visit)
    except BaseException:
        for name in coming.changes:
            new._take_off(name, coming)
        for name in off:
            old._put_on(name, there[name], leaving)
        raise
    finally:
        torch.clear_autocast_cache()
    del old._applied[model]
    new._applied[model] = coming


def _each(tensors: Iterable[Tensor], items: Iterable[_Item], work: Callable[[_Item], None]) -> None:
    """Call `work` on every item: on as many threads as torch has if the tensors are those of compiled loops, else here,
    where torch's own threads share the work, and its modes are those of the caller."""
    threads = torch.get_num_threads()
    if threads == 1 or not all(has_loop(tensor) and not tensor.is_inference() for tensor in tensors):
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, list(items)):
            pass


def live_tensors(model: nn.Module, header: Header) -> dict[str, Tensor]:
    """The tensors of a model that a delta changes, by the delta's names; tied ones are found by any of their names.

    Raises:
        ValueError: if the model lacks one.
    """
    items = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    own = {canonical_name(name): tensor.detach() for name, tensor in items}
    prefix = getattr(model, "base_model_prefix", "")
    others: dict[str, list[str]] = {}
    for alias, name in header.aliases.items():
        others.setdefault(name, []).append(alias)
    found = {}
    for name, part in header.tensors.items():
        if part.kind == "base":
            continue
        spellings = [name, *others.get(name, ())]
        spellings += [f"{prefix}.{spelling}" for spelling in spellings] if prefix else []
        spellings += [spelling.removeprefix(f"{prefix}.") for spelling in spellings[:1]] if prefix else []
        tensor = next((own[spelling] for spelling in spellings if spelling in own), None)
        if tensor is not None:
            found[name] = tensor
        elif _is_float(part):
            raise ValueError(
                f"The delta changes '{name}', which this {type(model).__name__} does not have; load the base in the "
                f"class the fine-tune has, or make a checkpoint with apply_checkpoint."
            )
    return found


def _is_float(part: Part) -> bool:
    return part.torch_dtype.is_floating_point


def _delta_part(tensor: Tensor, part: Part) -> Tensor:
    """The part of a live tensor that is a delta, flat, writing through."""
    return (tensor[: part.rows] if part.kind == "resized" else tensor).view(-1)


def _version(tensor: Tensor) -> int:
    """torch's count of writes to the tensor; -1 where it keeps none."""
    return -1 if tensor.is_inference() else tensor._version
