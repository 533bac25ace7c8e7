"""The merge methods by name: each makes a `Merge` of the job of one tensor."""

from __future__ import annotations

from collections.abc import Callable

from sparse_ft.merging.breadcrumbs import merge_breadcrumbs, merge_breadcrumbs_ties
from sparse_ft.merging.chunks import Job, Merge
from sparse_ft.merging.dare import merge_dare_linear, merge_dare_ties, merge_darex_q
from sparse_ft.merging.della import merge_della, merge_della_linear
from sparse_ft.merging.linear import merge_linear
from sparse_ft.merging.slerp import merge_slerp
from sparse_ft.merging.task_arithmetic import merge_task_arithmetic
from sparse_ft.merging.ties import merge_ties

METHODS: dict[str, Callable[[Job], Merge]] = {
    "linear": merge_linear,
    "slerp": merge_slerp,
    "task_arithmetic": merge_task_arithmetic,
    "ties": merge_ties,
    "dare_linear": merge_dare_linear,
    "dare_ties": merge_dare_ties,
    "darex_q": merge_darex_q,
    "della": merge_della,
    "della_linear": merge_della_linear,
    "breadcrumbs": merge_breadcrumbs,
    "breadcrumbs_ties": merge_breadcrumbs_ties,
}

#: Methods whose random numbers are uniform on [0, 1) instead of masks of one density, and whose chunks are whole rows.
BY_ROWS = frozenset({"della", "della_linear"})
