"""Soups of models that share a mask."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from sparse_ft.masks import MaskSet
from sparse_ft.merging.soups import greedy_soup, soup


def test_average_keeps_the_shared_mask_and_copies_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(16, 16, generator=generator) < 0.5
    models = [
        {"w": torch.where(mask, torch.randn(16, 16, generator=generator), 0.0).bfloat16(), "steps": torch.tensor(i)}
        for i in range(3)
    ]
    masks = MaskSet({"w": mask})
    averaged = soup(models, masks)
    assert int((averaged["w"] != 0).sum()) == int(mask.sum())
    expected = torch.stack([model["w"].double() for model in models]).mean(0)
    torch.testing.assert_close(averaged["w"].double(), expected, rtol=2**-8, atol=0)
    assert averaged["steps"] == 0 and averaged["w"].dtype == torch.bfloat16
    models[1]["w"][~mask] = 1.0
    with pytest.raises(RuntimeError, match="are not zero"):
        soup(models, masks)
    with pytest.raises(ValueError, match="do not both have 'steps'"):
        soup([models[0], {"w": models[1]["w"]}])


def test_greedy_soup_takes_what_does_not_hurt() -> None:
    values = [3.0, 9.0, 8.0, 1.0]
    asked: list[list[int]] = []

    def evaluate(members: Sequence[int]) -> float:
        asked.append(list(members))
        return {(1, 2): 10.0, (1, 2, 0): 9.5, (1, 2, 3): 10.0}[tuple(members)]

    assert greedy_soup(values, evaluate) == ([1, 2, 3], 10.0)
    assert asked == [[1, 2], [1, 2, 0], [1, 2, 3]]
    with pytest.raises(ValueError, match="score of each model"):
        greedy_soup([], evaluate)
