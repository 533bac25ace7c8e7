"""What becomes of each tensor of a fine-tune: pruned as a delta, kept whole, or left to the base; from headers alone.

The first rule that fits decides:

1. no floating point, or a table computed from the configuration (rotary frequencies): the fine-tune's, whole;
2. not in the base (a new head): the fine-tune's, whole;
3. not in the fine-tune: the base's, with a warning;
4. excluded by name: the fine-tune's whole, or the base's;
5. other number of rows, outside the repeated blocks (a resized vocabulary): a delta on the common leading rows, the
   fine-tune's rows behind them whole;
6. any other difference in shape is an error;
7. the rest, a delta.

A tensor that is stored twice (tied embeddings) is dealt with once, under one of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.naming import check_choice

#: dtype and shape of every tensor by name.
Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Kind = Literal["delta", "resized", "finetuned", "base"]

#: What happens to an excluded tensor.
POLICIES = ("keep-finetuned", "take-base")
#: Which tensors are pruned: all but task heads; all but `classifier` (encoders); attention and MLP only (decoders).
PRESETS: dict[str, tuple[str, str]] = {
    "all": ("", r"(^|\.)(classifier|score)\."),
    "encoder": ("", "classifier"),
    "decoder": ("mlp|self_attn", ""),
}
#: Words that `exclude` knows beside regular expressions.
GROUPS = {
    "embeddings": r"embed|(^|\.)(wte|wpe|shared)\.weight$",
    "norms": r"norm|(^|\.)ln_",
    "lm_head": r"(^|\.)lm_head\.",
}

_TABLES = re.compile(r"(^|\.)((inv_freq|cos_cached|sin_cached|masked_bias|position_ids)$|rotary_emb\.)")
_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
_SAMPLES = 1024


@dataclass(frozen=True)
class Entry:
    """One tensor of the result.

    Attributes:
        name: its name in the files.
        kind: `"delta"`, `"resized"` (a delta on the first `rows` rows), `"finetuned"` (whole) or `"base"`.
        dtype: of the result: the fine-tune's, or the base's if that is taken.
        shape: of the result.
        rows: leading rows that base and fine-tune have in common; of kind `"resized"` only.
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int = 0


@dataclass(frozen=True)
class Scope:
    """Every tensor of the result.

    Attributes:
        entries: by name, sorted.
        aliases: further names of tied tensors, and the entry each stands for.
        warnings: sentences for the user.
    """

    entries: dict[str, Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """Which tensors are pruned, as the user said it.

    Attributes:
        preset: a key of `PRESETS`.
        exclude: more regular expressions, searched in names, or words of `GROUPS`.
        excluded: one of `POLICIES`.
    """

    preset: str = "all"
    exclude: tuple[str, ...] = ()
    excluded: str = "keep-finetuned"

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, PRESETS)
        if self.excluded not in POLICIES:
            raise ValueError(f"excluded is '{self.excluded}'; it must be {' or '.join(POLICIES)}.")
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"exclude '{pattern}' is no regular expression: {error}.") from None

    def takes(self, name: str) -> bool:
        """Whether the tensor of this name is pruned."""
        include, exclude = PRESETS[self.preset]
        patterns = [exclude] * bool(exclude) + [GROUPS.get(pattern, pattern) for pattern in self.exclude]
        return re.search(include, name) is not None and not any(re.search(pattern, name) for pattern in patterns)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a pattern of `exclude` that fits no name.

        Raises:
            ValueError: with the pattern and a name as an example.
        """
        names = list(names)
        for pattern in self.exclude:
            if not any(re.search(GROUPS.get(pattern, pattern), name) for name in names):
                raise ValueError(f"exclude '{pattern}' fits none of the {len(names)} tensors, like '{names[0]}'.")


def is_table(name: str) -> bool:
    """Whether a floating point buffer follows from the configuration (rotary frequencies): no weight, never changed."""
    return _TABLES.search(name) is not None


def headers_of(reader: CheckpointReader) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor of a checkpoint; no tensor is read."""
    return {name: (reader.dtype(name), reader.shape(name)) for name in reader.names()}


def align(
    base: Headers,
    finetuned: Headers,
    *,
    selection: Selection | None = None,
    base_tied: Sequence[Sequence[str]] = (),
    finetuned_tied: Sequence[Sequence[str]] = (),
) -> Scope:
    """Decide what becomes of every tensor.

    Args:
        base: dtypes and shapes of the base.
        finetuned: those of the fine-tune.
        selection: which tensors are pruned; by default all but task heads.
        base_tied: groups of names under which the base stores one tensor, see `find_tied`.
        finetuned_tied: the same of the fine-tune.

    Raises:
        ValueError: if the two are of different architectures, a shape differs other than in rows outside the blocks, or
            a pattern of the selection fits no name.

    Example:
        >>> header = {"w": (torch.float32, (2, 2))}
        >>> align(header, header).entries["w"].kind
        'delta'
    """
    selection = selection or Selection()
    selection.check_names([*finetuned, *base])
    _check_same_family(base, finetuned)
    aliases = _aliases(base, finetuned, base_tied, finetuned_tied)
    entries, notes, bad = {}, [], []
    for name in sorted({*base, *finetuned} - aliases.keys()):
        try:
            entries[name] = _entry(name, base.get(name), finetuned.get(name), selection)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        more = f" (and {len(bad) - 1} more tensors differ)" if len(bad) > 1 else ""
        raise ValueError(bad[0] + more + "; give the base this fine-tune was trained from.")
    absent = sorted(set(base) - set(finetuned) - aliases.keys())
    if absent:
        notes.append(
            f"The fine-tune lacks {len(absent)} tensors of the base, among them '{absent[0]}': the base's stay."
        )
    return Scope(entries, dict(sorted(aliases.items())), tuple(notes))


def _entry(
    name: str,
    base: tuple[torch.dtype, tuple[int, ...]] | None,
    finetuned: tuple[torch.dtype, tuple[int, ...]] | None,
    selection: Selection,
) -> Entry:
    if finetuned is None:
        assert base is not None
        return Entry(name, "base", *base)
    if base is None or not (base[0].is_floating_point and finetuned[0].is_floating_point) or is_table(name):
        return Entry(name, "finetuned", *finetuned)
    if not selection.takes(name):
        return Entry(name, "finetuned", *finetuned) if selection.excluded == POLICIES[0] else Entry(name, "base", *base)
    if min(base[0].itemsize, finetuned[0].itemsize) < 2:
        raise ValueError(
            f"'{name}' is {base[0]} in the base and {finetuned[0]} in the fine-tune; deltas need 16 or 32 bit weights"
        )
    if base[1] == finetuned[1]:
        return Entry(name, "delta", *finetuned)
    same_width = len(base[1]) == len(finetuned[1]) > 0 and base[1][1:] == finetuned[1][1:]
    if not same_width or _IN_BLOCK.search(name):
        raise ValueError(f"'{name}' has shape {base[1]} in the base and {finetuned[1]} in the fine-tune")
    return Entry(name, "resized", *finetuned, rows=min(base[1][0], finetuned[1][0]))


def _check_same_family(base: Headers, finetuned: Headers) -> None:
    floats = [name for name, (dtype, _) in finetuned.items() if dtype.is_floating_point]
    shared = sum(name in base for name in floats)
    if not floats or not base:
        raise ValueError(f"The fine-tune has {len(floats)} weights and the base {len(base)} tensors; both need some.")
    if 2 * shared < len(floats):
        stranger = next(name for name in floats if name not in base)
        raise ValueError(
            f"The base has only {shared} of the fine-tune's {len(floats)} weights by name: the fine-tune has "
            f"'{stranger}', the base '{next(iter(base))}'; they are of different architectures, give the right base."
        )


def _aliases(
    base: Headers, finetuned: Headers, base_tied: Sequence[Sequence[str]], finetuned_tied: Sequence[Sequence[str]]
) -> dict[str, str]:
    tied_in_base = {name: set(group) for group in base_tied for name in group}
    aliases: dict[str, str] = {}
    for group in finetuned_tied:
        first = next((name for name in sorted(group) if name in base), None)
        for name in group:
            if first is None or name == first:
                continue
            if name not in base or first in tied_in_base.get(name, ()):
                aliases[name] = first
    for group in base_tied:
        kept = next((name for name in sorted(group) if name in finetuned), None)
        for name in group:
            if kept is not None and name not in finetuned:
                aliases[name] = aliases.get(kept, kept)
    return aliases


def find_tied(reader: CheckpointReader) -> list[tuple[str, ...]]:
    """Groups of names under which a checkpoint stores the same matrix several times, bit for bit.

    Only evenly spaced samples are read of matrices that have no equal. Constant matrices are not taken for tied.
    """
    groups: dict[tuple[torch.dtype, tuple[int, ...], bytes], list[str]] = {}
    for name in reader.names():
        dtype, shape = reader.dtype(name), reader.shape(name)
        if dtype.is_floating_point and len(shape) == 2 and dtype.itemsize > 1 and not _IN_BLOCK.search(name):
            sample = sample_values(reader.get(name))
            if sample.numel() and bool((sample != sample[0]).any()):
                groups.setdefault((dtype, shape, sample.view(torch.uint8).numpy().tobytes()), []).append(name)
    found = []
    for names in groups.values():
        first = reader.get(names[0])
        same = [name for name in sorted(names) if name == names[0] or torch.equal(first, reader.get(name))]
        if len(same) > 1:
            found.append(tuple(same))
    return found


def sample_values(tensor: Tensor, count: int = _SAMPLES) -> Tensor:
    """At most `count` evenly spaced values of a tensor, flat, on the CPU."""
    flat = tensor.detach().reshape(-1)
    count = min(count, flat.numel())
    places = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
    return flat[places].cpu()
