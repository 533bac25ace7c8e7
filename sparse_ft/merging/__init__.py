"""Merge checkpoints by streaming them tensor by tensor; start in `plan.py`."""

from sparse_ft.merging.plan import Compatibility, MergeInput, MergePlan, Source, TensorPlan

__all__ = ["Compatibility", "MergeInput", "MergePlan", "Source", "TensorPlan"]
