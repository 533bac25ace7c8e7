"""`sparse-ft delta prune`: read what the method needs, write the delta, and look for its scale where asked to."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import atomic_directory, check_output_dir
from sparse_ft.cli.arguments import TextArguments
from sparse_ft.cli.delta_arguments import DeltaArguments, ScaleArguments
from sparse_ft.cli.plain_options import dtype_called
from sparse_ft.deltas.extract import METHODS, Settings, write_delta
from sparse_ft.deltas.scope import Selection
from sparse_ft.deltas.store import rescale, write_record
from sparse_ft.naming import check_choice

__all__ = ["prune"]

AXES = ("row", "column", "neuron")


def prune(what: DeltaArguments, text: TextArguments, how: ScaleArguments, *, command: Sequence[str]) -> Path:
    """Make the delta directory; its path."""
    check_choice("method", what.method, list(METHODS))
    check_choice("axis", what.axis, AXES)
    searched = what.method == "darex_q" and what.scale is None
    _check_text(what, text, searched)
    if searched:
        from sparse_ft.cli.delta_search import check_search, search

        check_search(what.method, what.density, what.finetuned, text, how)
    selection = Selection(what.preset, tuple(what.exclude or ()), what.excluded)
    settings: dict[str, Any] = {"density": what.density, "seed": what.seed, "scale": what.scale, "selection": selection}
    settings["dtype"] = dtype_called(what.values_dtype)
    # What can be refused is refused before a model is loaded for its inputs.
    Settings(method="magnitude" if what.method == "wanda" else what.method, **settings)
    output = check_output_dir(what.output_dir, inputs=[what.base, what.finetuned], overwrite=what.overwrite)
    if what.method == "wanda":
        from sparse_ft.cli.delta_search import input_moments

        settings["moments"] = input_moments(what.finetuned, text, how, seed=what.seed)
    if what.method == "structural":
        settings["slices"] = _slices(what.base, what.axis)
    with atomic_directory(output, overwrite=what.overwrite) as directory:
        write_delta(what.base, what.finetuned, directory, Settings(method=what.method, **settings))
        if searched:
            found = search(directory, what.base, what.finetuned, text, how, seed=what.seed)
            rescale(directory, scale=found.scale)
        write_record(directory, {"command": shlex.join(command)})
    return output


def _check_text(what: DeltaArguments, text: TextArguments, searched: bool) -> None:
    if searched and text.dataset is None:
        raise ValueError("darex_q searches its scale on a text; name one with --dataset, or give the scale by --scale.")
    if what.method == "wanda" and text.dataset is None:
        raise ValueError("wanda looks at the fine-tune's activations; name a text with --dataset.")
    if not searched and what.method != "wanda" and text.dataset is not None:
        raise ValueError(f"Method {what.method!r} looks at no text; leave out --dataset, or use darex_q.")


def _slices(base: str, axis: str) -> dict[str, tuple[str, int]]:
    """For each matrix in the blocks what its mask is drawn by, and the axis that is counted."""
    from sparse_ft.checkpoints import resolve_checkpoint
    from sparse_ft.deltas import neuron_groups
    from sparse_ft.models import find_targets, load_skeleton

    model = load_skeleton(resolve_checkpoint(base))
    found = {}
    for target in find_targets(model):
        outputs = len(target.shape) - 2 if target.input_dim == len(target.shape) - 1 else len(target.shape) - 1
        found[target.name] = (target.name, target.input_dim if axis == "column" else outputs)
    if axis == "neuron":
        for group in neuron_groups(model):
            members = {**group.outputs, **group.inputs}
            found |= {name: (group.name, along) for name, along in members.items()}
    return found
