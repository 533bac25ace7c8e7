"""Merge checkpoints by streaming them tensor by tensor.

`merge_checkpoints` does what a mergekit YAML says; `plan.py` is what stands between the configuration and the engine.
"""

from sparse_ft.merging.merge import PreparedMerge, merge_checkpoints, prepare_merge
from sparse_ft.merging.plan import Compatibility, MergeInput, MergePlan, Source, TensorPlan

__all__ = [
    "Compatibility",
    "MergeInput",
    "MergePlan",
    "PreparedMerge",
    "Source",
    "TensorPlan",
    "merge_checkpoints",
    "prepare_merge",
]
