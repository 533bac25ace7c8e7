"""Which tensors of a model are prunable, their orientation, their names, and how models are opened."""

from sparse_ft.models.loading import load_model, load_skeleton, load_tokenizer, model_class
from sparse_ft.models.names import canonical_name, named_weights
from sparse_ft.models.targets import Target, find_blocks, find_targets, matrix_view

__all__ = [
    "Target",
    "canonical_name",
    "find_blocks",
    "find_targets",
    "load_model",
    "load_skeleton",
    "load_tokenizer",
    "matrix_view",
    "model_class",
    "named_weights",
]
