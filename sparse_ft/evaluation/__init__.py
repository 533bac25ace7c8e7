"""Numbers and pictures about a sparse model: perplexity, zero-shot tasks, sparsity tables, reports, plots."""

from sparse_ft.evaluation.perplexity import EvaluationProtocol, PerplexityResult, perplexity
from sparse_ft.evaluation.plots import plot_curves
from sparse_ft.evaluation.report import (
    REPORT_HTML,
    REPORT_JSON,
    ComparisonRow,
    ReportData,
    mask_sample,
    recovered_share,
    report_numbers,
    write_comparison,
    write_report,
)
from sparse_ft.evaluation.sparsity import SparsityRow, sparsity_table, sparsity_totals
from sparse_ft.evaluation.tasks import (
    PERP_TASKS,
    TaskResult,
    load_tasks,
    perp_means,
    task_protocol,
    zero_shot,
)

__all__ = [
    "PERP_TASKS",
    "REPORT_HTML",
    "REPORT_JSON",
    "ComparisonRow",
    "EvaluationProtocol",
    "PerplexityResult",
    "ReportData",
    "SparsityRow",
    "TaskResult",
    "load_tasks",
    "mask_sample",
    "perp_means",
    "perplexity",
    "plot_curves",
    "recovered_share",
    "report_numbers",
    "sparsity_table",
    "sparsity_totals",
    "task_protocol",
    "write_comparison",
    "write_report",
    "zero_shot",
]
