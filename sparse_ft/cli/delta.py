"""`sparse-ft delta`: what a fine-tune changed, pruned to a few percent of its size, and put back.

    sparse-ft delta --base B --finetuned F --method dare --density 0.01 --output_dir D
    sparse-ft delta search D --base B --dataset wikitext      # another scale, by perplexity
    sparse-ft delta apply D --base B --output_dir F2          # base + delta, an ordinary checkpoint
    sparse-ft delta info D

The first word is the action; without one it is `prune`. Nothing but files is opened for dare, magnitude and apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_ft.cli.arguments import TextArguments
from sparse_ft.cli.delta_arguments import (
    DeltaApplyArguments,
    DeltaArguments,
    DeltaInfoArguments,
    DeltaSearchArguments,
    ScaleArguments,
)

__all__ = ["run"]

ACTIONS = ("prune", "search", "apply", "info")
GROUPS = (
    DeltaArguments,
    TextArguments,
    ScaleArguments,
    DeltaSearchArguments,
    DeltaApplyArguments,
    DeltaInfoArguments,
)

_DESCRIPTION = (
    "Prune the delta of a fine-tune, and put it back. Actions: prune (the default, below), search, apply, info; "
    "sparse-ft delta ACTION --help lists the options of each."
)


def run(argv: Sequence[str]) -> int:
    """Carry out one action; the exit code."""
    words = list(argv)
    action = words.pop(0) if words and not words[0].startswith("-") else "prune"
    if action == "search":
        return _search(words)
    if action == "apply":
        return _apply(words)
    if action == "info":
        return _info(words)
    if action != "prune":
        from sparse_ft.cli.parser import suggest

        raise ValueError(f"Unknown action {action!r}.{suggest(action, ACTIONS)}")
    return _prune(words)


def _prune(words: Sequence[str]) -> int:
    from sparse_ft.cli.arguments import parse

    groups = parse(words, (DeltaArguments, TextArguments, ScaleArguments), verb="delta", description=_DESCRIPTION)
    from sparse_ft.cli.delta_prune import prune

    output = prune(*groups, command=["sparse-ft", "delta", *words])
    print_info(output)
    return 0


def _search(words: Sequence[str]) -> int:
    from sparse_ft.cli.arguments import parse

    what, text, how = parse(
        _first_is_delta(words),
        (DeltaSearchArguments, TextArguments, ScaleArguments),
        verb="delta search",
        description="Find the scale that suits a text; only the delta's metadata changes.",
    )
    from sparse_ft.cli.delta_search import search
    from sparse_ft.deltas.store import DeltaFile, rescale

    before = DeltaFile(what.delta).header.scale
    found = search(what.delta, what.base, what.finetuned, text, how, seed=what.seed)
    rescale(what.delta, scale=found.scale, scales={})
    print(f"\n{what.delta}  scale {before:.6g} -> {found.scale:.6g}")
    return 0


def _apply(words: Sequence[str]) -> int:
    from sparse_ft.cli.plain_options import dtype_called, parse_plain

    how = parse_plain(
        words,
        DeltaApplyArguments,
        verb="delta apply",
        description="Write base + delta as an ordinary checkpoint, in memory that does not grow with the model.",
        words=("delta",),
    )
    from sparse_ft.deltas.apply import apply_checkpoint

    assert how.output_dir is None or isinstance(how.output_dir, str)
    apply_checkpoint(
        how.base,
        how.delta,
        how.output_dir or "",
        dtype=dtype_called(how.dtype),
        scale=how.scale,
        check_base=how.check_base,
        overwrite=how.overwrite,
    )
    print(how.output_dir)
    return 0


def _info(words: Sequence[str]) -> int:
    from sparse_ft.cli.plain_options import parse_plain

    how = parse_plain(
        words, DeltaInfoArguments, verb="delta info", description="Show what a delta holds.", words=("delta",)
    )
    print_info(how.delta)
    return 0


def print_info(directory: Any) -> None:
    """What a delta holds, one fact per line."""
    from sparse_ft.deltas.store import DeltaFile, read_record

    delta = DeltaFile(directory)
    header, record = delta.header, read_record(directory)
    pruned = {name: part for name, part in header.tensors.items() if part.mask != "none"}
    kept, total = sum(map(delta.kept, pruned)), sum(part.numel for part in pruned.values())
    model = sum(part.numel * part.torch_dtype.itemsize for part in header.tensors.values())
    kinds = [part.kind for part in header.tensors.values()]
    own = sum(part.scale is not None for part in pruned.values())
    print(f"{directory}  {delta.nbytes:,} bytes, {delta.nbytes / max(model, 1):.2%} of the model's {model:,}")
    print(f"method {header.method}  density {header.density:g}  scale {header.scale:.6g}  seed {header.seed}")
    if own:
        print(f"{own} tensors have a scale of their own")
    print(f"kept {kept:,} of {total:,} entries in {len(pruned)} tensors ({kept / max(total, 1):.4%})")
    print(f"stored whole {kinds.count('finetuned')} tensors, as in the base {kinds.count('base')}")
    if "mean_absolute_delta" in record:
        print(f"mean |delta| {float(record['mean_absolute_delta']):.3g} before pruning")
    print(f"base {record.get('base', '?')}  digest {header.base_digest[:16]}")


def _first_is_delta(words: Sequence[str]) -> list[str]:
    return ["--delta", *words] if words and not words[0].startswith("-") else list(words)
