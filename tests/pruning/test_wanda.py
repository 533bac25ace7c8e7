"""Wanda masks and the second moment they rest on."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparse_ft.pruning.statistics import Hessian, SecondMoment
from sparse_ft.pruning.wanda import wanda_mask, wanda_scores


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 300, size: int = 24) -> torch.Tensor:
    return randn(tokens, size, seed=1) * torch.linspace(0.1, 3.0, size)


def moment_of(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    moment = SecondMoment(x.shape[1])
    for part in x.split(list(sizes) or len(x)):
        moment.add(part)
    return moment.second_moment()


REQUESTS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "1:8"}]


@pytest.mark.parametrize("statistic", [SecondMoment, Hessian])
@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 0, 50, 150], [60] * 5])
def test_second_moment_is_the_token_mean_however_batched(statistic, sizes):
    x = inputs()
    moment = statistic(24)
    for part in x.split(sizes):
        moment.add(part)
    torch.testing.assert_close(moment.second_moment().double(), x.double().square().mean(0), rtol=1e-5, atol=0)
    assert moment.tokens == 300
    assert moment.second_moment().dtype == torch.float32


@pytest.mark.parametrize("statistic", [SecondMoment, Hessian])
def test_half_precision_inputs_do_not_overflow(statistic):
    moment = statistic(4)
    moment.add(torch.full((5000, 4), 300.0, dtype=torch.float16))  # squares and sums exceed 65504
    torch.testing.assert_close(moment.second_moment(), torch.full((4,), 90000.0))


@pytest.mark.parametrize("statistic", [SecondMoment, Hessian])
def test_statistics_refuse_inputs_of_another_layer(statistic):
    for wrong in (torch.zeros(3, 5), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"\(tokens, features\)"):
            statistic(4).add(wrong)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("size", [24, 25, 100])
def test_every_row_loses_the_same_count(sparsity, size):
    mask = wanda_mask(randn(9, size), moment_of(inputs(size=size)), sparsity=sparsity)
    removed = {(0.29, 100): 29}.get((sparsity, size), int(size * sparsity))  # 0.29 * 100 is just below 29 in binary
    assert ((~mask).sum(1) == removed).all()


def test_every_group_keeps_the_same_count_and_the_tail_is_dense():
    mask = wanda_mask(randn(9, 27), moment_of(inputs(size=27)), pattern="2:4")
    assert (mask[:, :24].reshape(9, 6, 4).sum(-1) == 2).all()
    assert mask[:, 24:].all()


@pytest.mark.parametrize("request_", REQUESTS)
def test_mask_ignores_input_scale_row_scale_token_order_and_batching(request_):
    weight, x = randn(10, 24), inputs()
    expected = wanda_mask(weight, moment_of(x), **request_)
    scale = torch.rand(10, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(wanda_mask(weight, moment_of(x * 37), **request_), expected)
    assert torch.equal(wanda_mask(weight * scale, moment_of(x), **request_), expected)
    assert torch.equal(wanda_mask(weight, moment_of(x[order]), **request_), expected)
    assert torch.equal(wanda_mask(weight, moment_of(x, 7, 93, 200), **request_), expected)


@pytest.mark.parametrize("request_", REQUESTS)
def test_columns_with_equal_norms_give_row_wise_magnitude(request_):
    weight = randn(10, 24)
    mask = wanda_mask(weight, torch.full((24,), 2.5), **request_)
    size = 24 if "sparsity" in request_ else int(request_["pattern"][2:])
    groups, kept = weight.abs().view(-1, size), mask.view(-1, size)
    for values, keep in zip(groups, kept, strict=True):
        assert values[keep].min() > values[~keep].max()


def test_permuting_the_columns_permutes_the_mask():
    weight, moment = randn(10, 24), moment_of(inputs())
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    permuted = wanda_mask(weight[:, order], moment[order], sparsity=0.5)
    assert torch.equal(permuted, wanda_mask(weight, moment, sparsity=0.5)[:, order])


def test_group_choice_removes_the_least_of_all_choices():
    weight, x = randn(4, 8), inputs(size=8)
    mask = wanda_mask(weight, moment_of(x), pattern="2:4")
    score = (weight.abs() * x.norm(dim=0)).square()
    for values, keep in zip(score.view(-1, 4), mask.view(-1, 4), strict=True):
        best = min(itertools.combinations(range(4), 2), key=lambda c: float(values[list(c)].sum()))
        assert (~keep).nonzero().flatten().tolist() == list(best)


def test_scores_are_weight_times_norm_in_fp32():
    weight, x = randn(6, 24).bfloat16(), inputs()
    scores = wanda_scores(weight, moment_of(x))
    assert scores.dtype == torch.float32
    expected = weight.double().abs() * x.double().norm(dim=0) / 300**0.5
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=0)


def test_a_dead_input_goes_first_in_every_row():
    x = inputs()
    x[:, 5] = 0
    assert not wanda_mask(randn(10, 24), moment_of(x), sparsity=0.1)[:, 5].any()


def test_weight_is_left_unchanged():
    weight = randn(10, 24)
    before = weight.clone()
    wanda_mask(weight, moment_of(inputs()), sparsity=0.5)
    assert torch.equal(weight, before)


def test_refuses_statistics_that_do_not_fit():
    weight = randn(10, 24)
    bad = torch.ones(24)
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="12 inputs"):
        wanda_mask(weight, torch.ones(12), sparsity=0.5)
    with pytest.raises(ValueError, match="second moment contains NaN"):
        wanda_mask(weight, bad, sparsity=0.5)
    with pytest.raises(ValueError, match="no calibration token"):
        wanda_mask(weight, SecondMoment(24).second_moment(), sparsity=0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        wanda_mask(weight / 0, torch.ones(24), sparsity=0.5)
    with pytest.raises(ValueError, match="sparsity"):
        wanda_mask(weight, torch.ones(24))
