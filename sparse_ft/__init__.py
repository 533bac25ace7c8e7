"""sparse_ft: prune Hugging Face models, fine-tune them and merge adapters and deltas with the zeros exactly kept.

    import sparse_ft

    masks = sparse_ft.prune(model, pattern="2:4", method="wanda", calibration=batches)   # in place
    trainer = Trainer(model=model, ..., callbacks=[sparse_ft.MaskCallback(masks)])       # zeros stay
    masks.verify(model)                                                                  # raises if one came back

Importing the package is free: a name is looked up in its room when it is first used, so ``import sparse_ft`` loads
neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparse_ft.adapters import LoraPruneConfig as LoraPruneConfig
    from sparse_ft.adapters import LoraPruneModel as LoraPruneModel
    from sparse_ft.adapters import MaskLoraConfig as MaskLoraConfig
    from sparse_ft.adapters import MaskLoraModel as MaskLoraModel
    from sparse_ft.adapters import ScaleLoraConfig as ScaleLoraConfig
    from sparse_ft.adapters import ScaleLoraModel as ScaleLoraModel
    from sparse_ft.adapters import merge_into_base as merge_into_base
    from sparse_ft.deltas import Delta as Delta
    from sparse_ft.deltas import extract_delta as extract_delta
    from sparse_ft.distillation import DistillationConfig as DistillationConfig
    from sparse_ft.distillation import distilling as distilling
    from sparse_ft.evaluation import perplexity as perplexity
    from sparse_ft.evaluation import sparsity_table as sparsity_table
    from sparse_ft.masks import MaskSet as MaskSet
    from sparse_ft.masks import Pattern as Pattern
    from sparse_ft.merging import merge_checkpoints as merge_checkpoints
    from sparse_ft.models import find_targets as find_targets
    from sparse_ft.pruning import prune as prune
    from sparse_ft.pruning import prune_checkpoint as prune_checkpoint
    from sparse_ft.pruning import prune_retrain as prune_retrain
    from sparse_ft.reconstruction import reconstruct as reconstruct
    from sparse_ft.reconstruction import reconstruct_checkpoint as reconstruct_checkpoint
    from sparse_ft.training import AdamR as AdamR
    from sparse_ft.training import MaskCallback as MaskCallback

# public name -> the room that defines it
_ROOM_OF = {
    "AdamR": "training",
    "Delta": "deltas",
    "DistillationConfig": "distillation",
    "LoraPruneConfig": "adapters",
    "LoraPruneModel": "adapters",
    "MaskCallback": "training",
    "MaskLoraConfig": "adapters",
    "MaskLoraModel": "adapters",
    "MaskSet": "masks",
    "Pattern": "masks",
    "ScaleLoraConfig": "adapters",
    "ScaleLoraModel": "adapters",
    "distilling": "distillation",
    "extract_delta": "deltas",
    "find_targets": "models",
    "merge_checkpoints": "merging",
    "merge_into_base": "adapters",
    "perplexity": "evaluation",
    "prune": "pruning",
    "prune_checkpoint": "pruning",
    "prune_retrain": "pruning",
    "reconstruct": "reconstruction",
    "reconstruct_checkpoint": "reconstruction",
    "sparsity_table": "evaluation",
}

__all__ = [
    "AdamR",
    "Delta",
    "DistillationConfig",
    "LoraPruneConfig",
    "LoraPruneModel",
    "MaskCallback",
    "MaskLoraConfig",
    "MaskLoraModel",
    "MaskSet",
    "Pattern",
    "ScaleLoraConfig",
    "ScaleLoraModel",
    "__version__",
    "distilling",
    "extract_delta",
    "find_targets",
    "merge_checkpoints",
    "merge_into_base",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "prune_retrain",
    "reconstruct",
    "reconstruct_checkpoint",
    "sparsity_table",
]


def __getattr__(name: str) -> Any:
    """Import ``name`` from its room on first use (PEP 562) and keep it.

    Raises:
        AttributeError: the package has no such public name.
    """
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'sparse_ft' has no attribute {name!r}")
    value = getattr(import_module(f"sparse_ft.{room}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, including those not imported yet."""
    return sorted({*globals(), *__all__})
