"""`sparse_ft.json`: how a sparse checkpoint came to be, and which masks and weights belong together.

It holds the command and its arguments, versions, a sparsity table, evaluations, what training left, the digest of the
masks and of the weights they belong to, and the same for every earlier step (prune, then retrain, then merge, ...).
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from sparse_ft.masks import MaskSet

FORMAT_VERSION = 1
_DISTRIBUTIONS = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
_SECRETS = frozenset({"token", "hub_token", "push_to_hub_token", "use_auth_token", "api_key"})
_IN_HISTORY = (
    "command", "arguments", "versions", "pattern", "sparsity", "masks_digest", "weights_digest", "evaluation",
    "training",
)  # fmt: skip


@dataclass
class Record:
    """The content of `sparse_ft.json`.

    Attributes:
        command: verb that made the checkpoint, e.g. `"prune"`.
        arguments: its arguments by name, without access tokens.
        versions: version of Python and of each library, by name.
        pattern: `"unstructured"`, `"n:m"`, or several joined by `+`.
        sparsity: share of zeros over the masked tensors, 0 to 1.
        tensors: one `{name, shape, pattern, kept, total, sparsity}` per masked tensor.
        masks_digest: `MaskSet.digest()` of the masks beside the record.
        weights_digest: `MaskSet.weights_digest()` of the weights beside it.
        evaluation: results, each a flat mapping that names its protocol.
        history: earlier steps, oldest first: the same fields without the tensors.
        training: what training left, empty where there was none: `logs` (the Trainer's log history by name of the run),
            `trainable` (how many weights were trained, by group) and `reconstruction` (one entry per window:
            `block`, `window`, `loss_before`, `loss_after`, `iterations`), each only if there is something to say.
        format_version: of this file.
    """

    command: str
    arguments: dict[str, Any]
    versions: dict[str, str]
    pattern: str
    sparsity: float
    tensors: list[dict[str, Any]]
    masks_digest: str
    weights_digest: str
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """JSON text; anything JSON lacks is written as text (paths, dtypes, infinite perplexities as `"inf"`)."""
        content = asdict(self)
        content = {"format_version": content.pop("format_version"), **content}
        return json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "The record") -> Record:
        """Read `to_json`'s text.

        Args:
            text: the file's content.
            source: its name, for errors.

        Raises:
            ValueError: if it is not JSON, of a newer format, or a field is missing or of another type.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} is not valid JSON ({error}); restore it or run again.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{source} holds a {type(content).__name__}, not an object; run again.")
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has format {version!r}, this version reads {FORMAT_VERSION}; upgrade sparse-ft."
            )
        expected: dict[str, Any] = {
            "sparsity": (int, float),
            "arguments": dict,
            "versions": dict,
            "tensors": list,
            "evaluation": list,
            "training": dict,
        }
        content.setdefault("training", {})
        for entry in fields(cls):
            kind = expected.get(entry.name, list if entry.name == "history" else str)
            if entry.name != "format_version" and not isinstance(content.get(entry.name), kind):
                raise ValueError(
                    f"{source} has no proper '{entry.name}' (found {content.get(entry.name)!r:.60}); "
                    f"restore it or run again."
                )
        return cls(**{entry.name: content[entry.name] for entry in fields(cls)})

    def step(self) -> dict[str, Any]:
        """This step as an entry of a later record's `history`."""
        return {name: getattr(self, name) for name in _IN_HISTORY}


def make_record(
    masks: MaskSet,
    weights: nn.Module | Mapping[str, Tensor],
    *,
    command: str,
    arguments: Mapping[str, Any],
    evaluation: Iterable[Mapping[str, Any]] = (),
    previous: Record | None = None,
    training: Mapping[str, Any] | None = None,
) -> Record:
    """Describe a sparse checkpoint.

    Args:
        masks: the masks.
        weights: the model, or its tensors by name (a `CheckpointReader` is read one tensor at a time).
        command: verb that made it.
        arguments: its arguments; access tokens are left out.
        evaluation: results to note.
        previous: the record of the checkpoint this one was made from; it becomes the end of `history`.
        training: what training left, as in `Record`.

    Raises:
        ValueError: if a masked tensor is absent from `weights`, or has another shape.
    """
    return Record(
        command=command,
        arguments={name: value for name, value in arguments.items() if name not in _SECRETS},
        versions=versions(),
        pattern="+".join(sorted({str(pattern) for pattern in masks.patterns.values()})),
        sparsity=masks.sparsity(),
        tensors=[
            {
                "name": name,
                "shape": list(masks.shape(name)),
                "pattern": str(masks.patterns[name]),
                "kept": kept,
                "total": total,
                "sparsity": 1 - kept / total if total else 0.0,
            }
            for name, (kept, total) in masks.counts().items()
        ],
        masks_digest=masks.digest(),
        weights_digest=masks.weights_digest(weights),
        evaluation=[dict(result) for result in evaluation],
        history=[*previous.history, previous.step()] if previous else [],
        training=dict(training or {}),
    )


def versions() -> dict[str, str]:
    """Version of Python, sparse_ft and the libraries it stands on, without importing them; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in ("sparse_ft", *_DISTRIBUTIONS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
