"""A look at the models of a merge before any work: do they fit each other, is the base right, what will it cost.

Only headers, small files and a sample of each model's weights are read. What cannot work is refused; what probably is
not meant (a wrong base, tokens without a row) is a warning with its numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_ft.checkpoints.header import tensor_bytes
from sparse_ft.checkpoints.resolve import member
from sparse_ft.deltas.fingerprint import LARGE_DELTA
from sparse_ft.merging.inputs import OpenModel
from sparse_ft.merging.output_tokenizer import tokenizer_directory
from sparse_ft.merging.planning import Planned
from sparse_ft.merging.structure import layer_of, stacks_of

_SAMPLED_TENSORS = 4
_SAMPLED_ROWS = 64
_SAMPLED_NUMEL = 1 << 18
_WIDTH_KEYS = ("hidden_size", "n_embd", "d_model")


@dataclass(frozen=True)
class ModelFacts:
    """What the report says of a model.

    Attributes:
        label: how the configuration names it.
        architecture: of config.json.
        layers: of its stacks, together.
        width: hidden size.
        dtype: dtypes of its weights.
        rows: rows of its token embedding.
        tokens: one more than the highest id of its tokenizer; None without tokenizer.json.
        tied: whether its head is its token embedding.
        bytes: of its weights.
        delta: mean |model - base| over the sample; None for the base and without one.
    """

    label: str
    architecture: str
    layers: int
    width: int | None
    dtype: str
    rows: int | None
    tokens: int | None
    tied: bool
    bytes: int
    delta: float | None


@dataclass(frozen=True)
class Preflight:
    """The report.

    Attributes:
        models: facts of each model.
        notes: what the user should know; warnings begin with "warning: ".
        output_bytes: size of the output's weights.
        peak_bytes: estimate of the memory needed.
        tensors: number of tensors of the output.
        copied: how many of them are copied, not merged.
    """

    models: tuple[ModelFacts, ...]
    notes: tuple[str, ...]
    output_bytes: int
    peak_bytes: int
    tensors: int
    copied: int

    @property
    def warnings(self) -> list[str]:
        """The notes that are warnings, without the word."""
        return [note.removeprefix("warning: ") for note in self.notes if note.startswith("warning: ")]

    def lines(self) -> list[str]:
        """The report as text."""
        width = max(5, *(len(facts.label) for facts in self.models))
        head = f"{'model':<{width}}  {'architecture':<24}{'layers':>7}{'width':>7}{'rows':>8}{'tokens':>8}"
        lines = [f"{head}  {'dtype':<10}{'size':>9}  mean |delta|"]
        for f in self.models:
            delta = "" if f.delta is None else f"{f.delta:.2e}"
            counts = f"{f.layers:>7}{_or_dash(f.width):>7}{_or_dash(f.rows):>8}{_or_dash(f.tokens):>8}"
            lines.append(f"{f.label:<{width}}  {f.architecture:<24}{counts}  {f.dtype:<10}{_size(f.bytes):>9}  {delta}")
        lines.append(
            f"output: {self.tensors} tensors ({self.copied} copied), {_size(self.output_bytes)}; "
            f"memory about {_size(self.peak_bytes)}"
        )
        return lines + [note if note.startswith("warning: ") else f"note: {note}" for note in self.notes]


def check_models(models: Mapping[str, OpenModel], reference: OpenModel) -> None:
    """Refuse models of different architecture or width.

    Raises:
        ValueError: with both values.
    """
    for label, model in models.items():
        for key in ("model_type", *_WIDTH_KEYS):
            mine, theirs = reference.config.get(key), model.config.get(key)
            if mine is not None and theirs is not None and mine != theirs:
                what = "architecture" if key == "model_type" else "size"
                raise ValueError(
                    f"'{label}' has another {what} than '{reference.label}': {key} is {theirs!r}, not {mine!r}; "
                    f"only models of one architecture and size can be merged."
                )
        shared = sum(name in reference.shapes for name in model.names)
        if 2 * shared < len(model.names):
            stranger = next(name for name in model.names if name not in reference.shapes)
            raise ValueError(
                f"'{label}' shares only {shared} of its {len(model.names)} tensor names with '{reference.label}', "
                f"which has no '{stranger}'; only models of one architecture can be merged."
            )


def preflight(planned: Planned, models: Mapping[str, OpenModel], peak: int, notes: Sequence[str] = ()) -> Preflight:
    """Gather the report of a planned merge.

    Args:
        planned: the merge.
        models: every model, by label.
        peak: bytes of memory it needs, see `memory.peak_bytes`.
        notes: more to be said.
    """
    base = list(models.values())[planned.base] if planned.base is not None else None
    facts = tuple(_facts(model, base) for model in models.values())
    found = [*planned.notes, *notes, *_warnings(facts, models)]
    tensors = planned.plan.tensors
    return Preflight(
        facts,
        tuple(sorted(dict.fromkeys(found), key=lambda note: not note.startswith("warning: "))),
        sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in tensors),
        peak,
        len(tensors),
        sum(tensor.copy is not None for tensor in tensors),
    )


def mean_delta(model: OpenModel, base: OpenModel) -> float | None:
    """Mean |model - base| over a sample of the layers' matrices, fp32; None if they have none in common.

    An adapter is part of the model: its product is added to the sampled rows.
    """
    names = [n for n, shape in base.shapes.items() if len(shape) == 2 and layer_of(n) and model.shapes.get(n) == shape]
    step = max(1, -(-len(names) // _SAMPLED_TENSORS))
    total, count = 0.0, 0
    for name in names[step // 2 :: step]:
        if name not in model.reader or name not in base.reader:
            continue
        rows = max(1, min(_SAMPLED_ROWS, _SAMPLED_NUMEL // base.shapes[name][1]))
        every = max(1, base.shapes[name][0] // rows)
        mine, theirs = (one.reader.get(name)[::every].float() for one in (model, base))
        difference = mine - theirs
        if model.adapter is not None and name in model.adapter:
            whole = model.reader.get(name) if model.adapter[name].magnitude else None
            difference += model.adapter.delta(name, whole)[::every]
        total, count = total + float(difference.abs().sum(dtype=torch.float64)), count + difference.numel()
    return total / count if count else None


def tokenizer_length(directory: Path) -> int | None:
    """One more than the highest id in tokenizer.json; None if there is none that can be read."""
    try:
        content: Any = json.loads(member(directory, "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = [int(entry["id"]) for entry in content.get("added_tokens", ())]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ids.append(max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1)
    return max(ids) + 1


def _facts(model: OpenModel, base: OpenModel | None) -> ModelFacts:
    dtypes = {str(model.dtype(n)).removeprefix("torch.") for n in model.names if model.dtype(n).is_floating_point}
    width = next((model.config[key] for key in _WIDTH_KEYS if isinstance(model.config.get(key), int)), None)
    names = model.config.get("architectures")
    return ModelFacts(
        model.label,
        str(names[0]) if isinstance(names, list) and names else str(model.config.get("model_type", "unknown")),
        sum(stacks_of(model.names).values()),
        width,
        "+".join(sorted(dtypes)) or "none",
        model.vocabulary_rows,
        tokenizer_length(tokenizer_directory(model)),
        model.head is None and model.embedding is not None,
        sum(tensor_bytes(model.dtype(name), model.shapes[name]) for name in model.names),
        mean_delta(model, base) if base is not None and base is not model else None,
    )


def _warnings(facts: Sequence[ModelFacts], models: Mapping[str, OpenModel]) -> list[str]:
    found = []
    for f in facts:
        if f.delta is not None and not f.delta <= LARGE_DELTA:
            found.append(
                f"warning: '{f.label}' differs from the base by {f.delta:.3g} per weight on average, more than "
                f"{LARGE_DELTA:g}: it probably comes from another base."
            )
        size = models[f.label].config.get("vocab_size")
        if isinstance(size, int) and f.rows is not None and size != f.rows:
            found.append(f"warning: '{f.label}' has {f.rows} embedding rows but its config says {size}.")
        if f.tokens is not None and f.rows is not None and f.tokens > f.rows:
            found.append(
                f"warning: the tokenizer of '{f.label}' has ids up to {f.tokens - 1} but its embedding {f.rows} rows."
            )
    for what, values in (
        ("architecture", {f.label: f.architecture for f in facts}),
        ("dtype", {f.label: f.dtype for f in facts}),
        ("tied head", {f.label: "yes" if f.tied else "no" for f in facts}),
    ):
        if len(set(values.values())) > 1:
            shown = ", ".join(f"'{label}' {value}" for label, value in values.items())
            found.append(f"The models differ in {what}: {shown}.")
    return found


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)
