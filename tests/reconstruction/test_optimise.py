"""The training loop of one window on functions with known answers, and where activations lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_ft.reconstruction.activations import in_file, keeper
from sparse_ft.reconstruction.optimise import (
    RunningLoss,
    learning_rates,
    multiplies_bfloat16,
    shuffled,
    squared_error,
    train_window,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("iterations", "warmup", "rising"), [(64, 0.1, 7), (64, 5, 5), (1, 0.1, 1), (10, 0, 0)])
def test_learning_rates(iterations: int, warmup: float, rising: int) -> None:
    rates = list(learning_rates(3.0, iterations, warmup))
    assert len(rates) == iterations and all(0 < rate <= 3 for rate in rates)
    steps = torch.tensor(rates, dtype=torch.float64).diff()
    assert torch.allclose(steps[:rising], torch.full_like(steps[:rising], 3 / (rising + 1)))
    if iterations > rising:
        assert rates[rising] == 3 and rates[-1] == pytest.approx(3 / (iterations - rising))
        assert torch.allclose(steps[rising:], torch.full_like(steps[rising:], -3 / (iterations - rising)))


def test_every_batch_is_used_once_per_epoch_in_another_order() -> None:
    drawn = list(shuffled([2, 3, 5, 7, 11], 13, generator()))
    epochs = [drawn[:5], drawn[5:10]]
    assert all(sorted(epoch) == [2, 3, 5, 7, 11] for epoch in epochs) and epochs[0] != epochs[1]
    assert len(drawn) == 13 and max(Counter(drawn).values()) == 3
    assert drawn == list(shuffled([2, 3, 5, 7, 11], 13, generator()))


def test_the_error_of_16_bit_activations_does_not_overflow() -> None:
    """300² is above the largest fp16 number, and the sum of a thousand of them even more."""
    result, target = torch.full((1000,), 300.0, dtype=torch.float16), torch.zeros(1000, dtype=torch.float16)
    assert float(squared_error(result, target)) == 1000 * 300.0**2


def test_a_mean_over_batches_counts_elements() -> None:
    loss = RunningLoss()
    loss.add(torch.ones(6, 2), torch.zeros(6, 2))
    loss.add(torch.full((1, 2), 3.0), torch.zeros(1, 2))
    assert loss.mean() == pytest.approx((12 * 1 + 2 * 9) / 14)


def fit(scale: float, **options: object) -> tuple[nn.Linear, int]:
    """A linear layer that has to become another one; outputs are scaled."""
    torch.manual_seed(0)
    data, layer, goal = torch.randn(4, 32, 8), nn.Linear(8, 3), nn.Linear(8, 3)
    with torch.no_grad():
        before = float((scale * (layer(data) - goal(data))).square().mean())
        targets = [scale * goal(part) for part in data]
    settings = dict(iterations=40, learning_rate=0.02, before=before) | options
    steps = train_window(
        list(layer.parameters()), lambda n: scale * layer(data[n]), targets.__getitem__, range(4),
        generator=generator(), **settings,
    )  # fmt: skip
    return layer, steps


def test_training_does_not_depend_on_the_scale_of_the_activations() -> None:
    """Without the division by the first loss, AdamW's epsilon would stop small windows."""
    one, tiny = fit(1.0)[0], fit(1e-8)[0]
    assert torch.allclose(one.weight, tiny.weight, atol=1e-5)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    data, layer, goal = torch.randn(4, 32, 8), nn.Linear(8, 3), nn.Linear(8, 3)
    trained, steps = fit(1.0, iterations=200)
    assert steps == 200

    def loss(of: nn.Linear) -> float:
        return float((of(data) - goal(data)).square().mean().detach())

    assert loss(trained) < 0.01 * loss(layer)


def test_training_stops_when_the_loss_is_not_finite() -> None:
    assert fit(1.0, learning_rate=1e38)[1] < 40


@pytest.mark.parametrize(
    ("found", "expected"), [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({}, False)]
)
def test_processors_that_multiply_bfloat16(
    found: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **found}, raising=False)
    assert multiplies_bfloat16(torch.device("cpu")) is expected
    assert not multiplies_bfloat16(torch.device("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_activations_in_files(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(3, 4, 5).mul(3).to(dtype).transpose(0, 1)
    kept = in_file(tensor, directory=tmp_path / "new")
    assert torch.equal(kept, tensor) and kept.dtype == dtype
    assert kept.data_ptr() != tensor.data_ptr()
    assert not list((tmp_path / "new").iterdir()), "the file has no name, so nothing is left behind"
    kept.zero_()
    assert bool(tensor.any())


def test_empty_activations(tmp_path: Path) -> None:
    assert in_file(torch.empty(0, 4), directory=tmp_path).shape == (0, 4)


def test_in_memory_activations_are_copies() -> None:
    tensor = torch.ones(3)
    assert keeper("cpu")(tensor).data_ptr() != tensor.data_ptr()
