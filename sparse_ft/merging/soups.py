"""Sparse model soups: average models that were retrained from one pruned checkpoint; their common mask stays.

    W <- dense
    for phase in 1..P:
        mask = prune W;  W_i = retrain(W, mask, other seed, order, weight decay) for i in 1..m;  W <- average of W_i

Here is the average: of all models, or of those that a greedy search on a validation score takes. Independently pruned
models do not share a mask; their average has the union of what they keep, so they are refused.

Source: Zimmer, Spiegel, Pokutta 2024, Sparse Model Soups, arXiv 2306.16788; greedy: arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from sparse_ft.masks import MaskSet
from sparse_ft.merging.linear import linear


def soup(models: Sequence[Mapping[str, Tensor]], masks: MaskSet | None = None) -> dict[str, Tensor]:
    """Average the tensors of several models.

    Args:
        models: tensors by name; the same names, shapes and dtypes in each.
        masks: the mask they share. It is checked in every model and imposed on the average.

    Returns:
        fp32 averages rounded once to the models' dtype. Tensors that are not floating point (counts of batches,
        position ids) are the first model's.

    Raises:
        ValueError: if there is no model, or names differ.
        RuntimeError: if a model has a weight that its mask prunes.

    Example:
        >>> soup([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])
        {'w': tensor([2., 0.])}
    """
    if not models:
        raise ValueError("A soup needs at least one model, got none.")
    for number, model in enumerate(models):
        other = sorted(set(model) ^ set(models[0]))
        if other:
            raise ValueError(f"Model {number} and model 0 of the soup do not both have '{other[0]}'.")
        if masks is not None:
            masks.verify(model)
    averaged = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            averaged[name] = first.clone()
            continue
        averaged[name] = linear([model[name] for model in models], [1.0] * len(models)).to(first.dtype)
    if masks is not None:
        masks.apply_(averaged)
    return averaged


def greedy_soup(scores: Sequence[float], evaluate: Callable[[Sequence[int]], float]) -> tuple[list[int], float]:
    """Choose the members of a soup: best model first, each next one kept if the score of the average does not drop.

    Args:
        scores: validation score of each model alone; higher is better.
        evaluate: score of the average of the models with these numbers.

    Returns:
        Numbers of the chosen models, in the order they were taken, and the score of their average.

    Raises:
        ValueError: if there is no model or a score is NaN.

    Example:
        >>> greedy_soup([0.5, 0.8], lambda members: 0.9 if len(members) == 2 else 0.8)
        ([1, 0], 0.9)
    """
    if not scores or any(score != score for score in scores):
        raise ValueError(f"A greedy soup needs the score of each model, got {list(scores)}.")
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    members, best = [order[0]], scores[order[0]]
    for candidate in order[1:]:
        score = evaluate([*members, candidate])
        if score >= best:
            members, best = [*members, candidate], score
    return members, best
