"""One-shot pruning: magnitude, random, Wanda, SparseGPT; start reading in `prune.py`."""

from sparse_ft.pruning.allocation import erk, global_magnitude, uniform
from sparse_ft.pruning.cycles import Cycle, PruneRetrainResult, prune_retrain
from sparse_ft.pruning.magnitude import magnitude_mask, magnitude_scores
from sparse_ft.pruning.prune import METHODS, prune
from sparse_ft.pruning.random import named_generator, random_mask, random_scores
from sparse_ft.pruning.sparsegpt import InverseFactor, SparseGPTResult, factorize, sparsegpt
from sparse_ft.pruning.statistics import Hessian, SecondMoment
from sparse_ft.pruning.streaming import prune_checkpoint
from sparse_ft.pruning.wanda import wanda_mask, wanda_scores

__all__ = [
    "METHODS",
    "Cycle",
    "Hessian",
    "InverseFactor",
    "PruneRetrainResult",
    "SecondMoment",
    "SparseGPTResult",
    "erk",
    "factorize",
    "global_magnitude",
    "magnitude_mask",
    "magnitude_scores",
    "named_generator",
    "prune",
    "prune_checkpoint",
    "prune_retrain",
    "random_mask",
    "random_scores",
    "sparsegpt",
    "uniform",
    "wanda_mask",
    "wanda_scores",
]
