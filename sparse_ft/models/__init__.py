"""Which tensors of a model are prunable, their orientation, their names, and how models are opened.

Opening models needs transformers, which is imported on first use: masks and merges work without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_ft.models.dtypes import HALF_DTYPES
from sparse_ft.models.names import canonical_name, named_weights
from sparse_ft.models.targets import Target, find_blocks, find_targets, matrix_view

if TYPE_CHECKING:
    from sparse_ft.models.loading import (
        load_config,
        load_model,
        load_skeleton,
        load_tokenizer,
        make_skeleton,
        model_class,
    )

_LOADING = ("load_config", "load_model", "load_skeleton", "load_tokenizer", "make_skeleton", "model_class")

__all__ = [
    "HALF_DTYPES",
    "Target",
    "canonical_name",
    "find_blocks",
    "find_targets",
    "load_config",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "make_skeleton",
    "matrix_view",
    "model_class",
    "named_weights",
]


def __getattr__(name: str) -> Any:
    if name in _LOADING:
        from sparse_ft.models import loading

        return getattr(loading, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
