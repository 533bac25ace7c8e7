"""Numbers and pictures about a sparse model: perplexity with its protocol, sparsity tables, reports, plots."""

from sparse_ft.evaluation.perplexity import EvaluationProtocol, PerplexityResult, perplexity

__all__ = ["EvaluationProtocol", "PerplexityResult", "perplexity"]
