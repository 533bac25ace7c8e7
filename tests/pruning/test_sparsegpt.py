"""SparseGPT against the textbook column loop in fp64, and the properties any correct implementation has."""

from __future__ import annotations

import pytest
import torch

from sparse_ft.pruning.precision import full_precision
from sparse_ft.pruning.sparsegpt import factorize, sparsegpt
from sparse_ft.pruning.statistics import Hessian

UNSTRUCTURED = {"sparsity": 0.6}
REQUESTS = [UNSTRUCTURED, {"pattern": "2:4"}, {"pattern": "1:4"}, {"pattern": "5:8"}]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(size: int, tokens: int | None = None) -> torch.Tensor:
    """Correlated features of different scale: with independent ones the update would have nothing to do."""
    mixing = randn(size, size, seed=1) / size**0.5 + torch.eye(size)
    return randn(tokens or 6 * size, size, seed=2) @ mixing * torch.linspace(0.3, 2.0, size)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian.matrix()


def damped(hessian: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """What the factor must invert, in fp64."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def textbook(weight, hessian, *, pattern=None, sparsity=None, block_size=128):
    """Column by column over whole rows in fp64; returns weight, mask and loss."""
    w = weight.double().clone()
    rows, width = w.shape
    w[:, hessian.diagonal() == 0] = 0
    u = torch.linalg.cholesky(torch.linalg.inv(damped(hessian)), upper=True)
    kept, group = (int(part) for part in pattern.split(":")) if pattern else (None, None)
    mask = torch.ones(rows, width, dtype=torch.bool)
    loss, gone = 0.0, 0
    for j in range(width):
        if group is None and j % block_size == 0:
            stop = min(j + block_size, width)
            want = round(sparsity * rows * stop) - gone
            gone += want
            score = (w[:, j:stop] ** 2 / u.diagonal()[j:stop] ** 2).flatten()
            slab = torch.ones(rows * (stop - j), dtype=torch.bool)
            slab[score.argsort(stable=True)[:want]] = False
            mask[:, j:stop] = slab.view(rows, -1)
        elif group is not None and j % group == 0 and j + group <= width:
            score = w[:, j : j + group] ** 2 / u.diagonal()[j : j + group] ** 2
            mask[:, j : j + group].scatter_(1, score.argsort(dim=1, stable=True)[:, : group - kept], False)
        error = torch.where(mask[:, j], 0.0, w[:, j]) / u[j, j]
        loss += float((error**2).sum()) / 2
        w[:, j:] -= torch.outer(error, u[j, j:])
        w[:, j] = torch.where(mask[:, j], w[:, j], 0.0)
    return w, mask, loss


def quadratic_error(change: torch.Tensor, h: torch.Tensor) -> float:
    """1/2 tr(D H D^T) in fp64."""
    change = change.double()
    return float(((change @ h) * change).sum() / 2)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(("rows", "size", "block_size"), [(24, 48, 16), (7, 45, 8), (40, 130, 128), (3, 8, 128)])
def test_equals_the_textbook(request_, rows, size, block_size):
    weight, hessian = randn(rows, size), hessian_of(inputs(size))
    result = sparsegpt(weight, hessian, block_size=block_size, **request_)
    expected, mask, loss = textbook(weight, hessian, block_size=block_size, **request_)
    assert torch.equal(result.mask, mask)
    torch.testing.assert_close(result.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert result.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("request_", REQUESTS)
def test_loss_is_the_quadratic_error_of_the_change(request_):
    x = inputs(64)
    x[:, [3, 40]] = 0
    weight, hessian = randn(32, 64), hessian_of(x)
    result = sparsegpt(weight, hessian, block_size=32, **request_)
    alive = weight.clone()
    alive[:, [3, 40]] = 0
    assert result.loss == pytest.approx(quadratic_error(result.weight - alive, damped(hessian)), rel=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_block_size_does_not_change_an_nm_result(pattern):
    weight, hessian = randn(16, 64), hessian_of(inputs(64))
    group = int(pattern[2:])
    results = [sparsegpt(weight, hessian, pattern=pattern, block_size=size) for size in (group, 2 * group, 64)]
    for other in results[1:]:
        assert torch.equal(other.mask, results[0].mask)
        torch.testing.assert_close(other.weight, results[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "block_size"), [("2:4", 6), ("3:5", 128), ("1:3", 1)])
def test_a_block_never_cuts_a_group(pattern, block_size):
    weight, hessian = randn(16, 150), hessian_of(inputs(150))
    result = sparsegpt(weight, hessian, pattern=pattern, block_size=block_size)
    _, mask, _ = textbook(weight, hessian, pattern=pattern)
    assert torch.equal(result.mask, mask)


@pytest.mark.parametrize("request_", REQUESTS)
def test_scale_of_the_hessian_does_not_matter(request_):
    weight, hessian = randn(16, 48), hessian_of(inputs(48))
    one, other = (sparsegpt(weight, scale * hessian, block_size=16, **request_) for scale in (1, 1000))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("request_", REQUESTS)
def test_permuting_the_rows_permutes_the_result(request_):
    weight, hessian = randn(16, 48), hessian_of(inputs(48))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    straight, permuted = (sparsegpt(w, hessian, block_size=16, **request_) for w in (weight, weight[order]))
    assert torch.equal(permuted.mask, straight.mask[order])
    torch.testing.assert_close(permuted.weight, straight.weight[order], rtol=1e-4, atol=1e-5)


def test_diagonal_hessian_leaves_kept_weights_and_ranks_like_squared_wanda():
    weight, moment = randn(16, 32), torch.linspace(0.1, 4.0, 32)
    result = sparsegpt(weight, torch.diag(2 * moment), sparsity=0.5, block_size=32)
    assert torch.equal(result.weight, weight * result.mask)
    score = weight**2 * (2 * moment + 0.01 * 2 * moment.mean())
    assert score[result.mask].min() > score[~result.mask].max()


def test_sparsity_zero_changes_only_dead_columns():
    x = inputs(24)
    x[:, 7] = 0
    weight = randn(8, 24)
    result = sparsegpt(weight, hessian_of(x), sparsity=0.0)
    expected = weight.clone()
    expected[:, 7] = 0
    assert result.mask.all()
    assert torch.equal(result.weight, expected)
    assert result.loss == 0


@pytest.mark.parametrize("request_", REQUESTS)
def test_better_than_no_update_and_no_better_than_least_squares(request_):
    weight, hessian = randn(12, 40), hessian_of(inputs(40))
    h = damped(hessian)
    result = sparsegpt(weight, hessian, block_size=8, **request_)
    optimum = torch.zeros(12, 40, dtype=torch.float64)
    for row, keep in enumerate(result.mask):  # normal equations of the row on its mask
        target = weight[row].double() @ h[:, keep]
        optimum[row, keep] = torch.linalg.solve(h[keep][:, keep], target)
    best = quadratic_error(optimum - weight, h)
    ours = quadratic_error(result.weight - weight, h)
    plain = quadratic_error(weight * result.mask - weight, h)
    assert best <= ours <= plain
    assert ours < 0.95 * plain


@pytest.mark.parametrize("request_", REQUESTS)
def test_without_update_the_mask_is_the_same_and_kept_weights_are_untouched(request_):
    x = inputs(40)
    x[:, 11] = 0
    weight, hessian = randn(12, 40).bfloat16(), hessian_of(x)
    updated = sparsegpt(weight, hessian, block_size=8, **request_)
    plain = sparsegpt(weight, hessian, block_size=8, update=False, **request_)
    assert torch.equal(plain.mask, updated.mask)
    assert torch.equal(plain.weight, weight.float() * plain.mask)
    change = (plain.weight - weight.float()).clone()
    change[:, 11] = 0
    assert plain.loss == pytest.approx(quadratic_error(change, damped(hessian)), rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_the_count_is_exact_over_the_tensor(sparsity, block_size):
    result = sparsegpt(randn(9, 37), hessian_of(inputs(37)), sparsity=sparsity, block_size=block_size)
    assert int((~result.mask).sum()) == round(sparsity * 9 * 37)
    assert not result.weight[~result.mask].any()
    assert not torch.signbit(result.weight[~result.mask]).any()


def test_equal_weights_and_zero_weights_keep_exact_counts():
    hessian = hessian_of(inputs(16))
    for weight in (torch.zeros(6, 16), torch.ones(6, 16)):
        result = sparsegpt(weight, torch.eye(16), sparsity=0.5)
        assert int(result.mask.sum()) == 48
        assert torch.equal(result.weight, weight * result.mask)
        assert not result.mask[:3].any(), "of equal scores the first rows go"
        assert (sparsegpt(weight, hessian, pattern="2:4").mask.view(6, 4, 4).sum(-1) == 2).all()


def test_tail_of_an_incomplete_group_is_kept_and_updated():
    weight = randn(10, 27)
    result = sparsegpt(weight, hessian_of(inputs(27)), pattern="2:4", block_size=8)
    assert (result.mask[:, :24].reshape(10, 6, 4).sum(-1) == 2).all()
    assert result.mask[:, 24:].all()
    assert (result.weight[:, 24:] != weight[:, 24:]).all()


def test_dead_columns_are_removed_first_and_zero():
    x = inputs(32)
    x[:, 4:10] = 0
    result = sparsegpt(randn(8, 32), hessian_of(x), sparsity=0.5, block_size=32)
    assert not result.mask[:, 4:10].any()
    assert torch.isfinite(result.weight).all()
    assert not result.weight[:, 4:10].any()


def test_mask_is_not_what_survives_the_cast():
    result = sparsegpt(randn(8, 32) * 1e-8, hessian_of(inputs(32)), sparsity=0.5)
    assert int(result.mask.sum()) == 128
    assert int((result.weight.half() != 0).sum()) < 128


@pytest.mark.parametrize("update", [True, False])
def test_arguments_are_left_unchanged_even_when_stored_transposed(update):
    stored, hessian = randn(32, 12), hessian_of(inputs(32))
    before, hessian_before = stored.clone(), hessian.clone()
    from_view = sparsegpt(stored.T, hessian, sparsity=0.5, update=update)
    assert torch.equal(stored, before)
    assert torch.equal(hessian, hessian_before)
    from_copy = sparsegpt(stored.T.contiguous(), factorize(hessian), sparsity=0.5, update=update)
    assert torch.equal(from_view.mask, from_copy.mask)
    assert torch.equal(from_view.weight, from_copy.weight)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_factor_squares_to_the_damped_inverse(size):
    x = inputs(size)
    x[:, 2] = 0
    factor = factorize(hessian_of(x), damping=0.05)
    u = factor.upper.double()
    assert torch.equal(u, u.triu())
    product = u.T @ u @ damped(hessian_of(x), 0.05)
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-4)
    assert factor.dead.nonzero().flatten().tolist() == [2]
    assert factor.damping == 0.05


def test_too_few_tokens_raise_the_damping_and_still_beat_magnitude():
    x = inputs(64, tokens=20)  # rank 20 of 64
    weight, hessian = randn(32, 64), hessian_of(x)
    factor = factorize(hessian, damping=0.0)
    assert factor.damping > 0
    result = sparsegpt(weight, factor, sparsity=0.5)
    count = int((~result.mask).sum())
    magnitude = weight.clone()
    magnitude.view(-1)[weight.abs().flatten().argsort()[:count]] = 0
    assert (x @ (result.weight - weight).T).norm() < 0.5 * (x @ (magnitude - weight).T).norm()


def test_hessian_is_the_mean_of_outer_products_however_batched():
    x = inputs(300, tokens=500)
    expected = 2 * x.double().T @ x.double() / 500
    for sizes in ([500], [1, 0, 99, 400]):
        hessian = Hessian(300)
        for part in x.split(sizes):
            hessian.add(part)
        torch.testing.assert_close(hessian.matrix().double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(hessian.matrix().triu(256), hessian.matrix().T.triu(256))
        assert hessian.tokens == 500
    hessian.add(x)  # reading the matrix does not disturb further accumulation
    torch.testing.assert_close(hessian.matrix().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch has one setting for all")
def test_full_precision_turns_tf32_and_bf16_products_off():
    """Looked at in the settings: a CPU without bf16 units computes the same either way."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, loose in zip(backends, ("tf32", "bf16"), strict=True):
            backend.fp32_precision = loose
        with pytest.raises(ZeroDivisionError), full_precision():
            assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
            _ = 1 / 0
        assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_full_precision_overrides_and_restores_the_settings():
    left = inputs(64)
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            product = left.T @ left
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(product.double(), left.double().T @ left.double(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "1.0"),
        ({"sparsity": float("nan")}, "nan"),
        ({"sparsity": None}, "sparsity"),
        ({"pattern": "half"}, "half"),
        ({"pattern": "2:4"}, "fixes sparsity|removes"),
        ({"block_size": 0}, "block_size"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
    ],
)
def test_refuses_what_makes_no_sense(change, message):
    arguments = {"sparsity": 0.6, **change}
    with pytest.raises(ValueError, match=message):
        sparsegpt(randn(4, 8), torch.eye(8), **arguments)


def test_refuses_tensors_that_do_not_fit():
    weight, hessian = randn(4, 8), hessian_of(inputs(8))
    broken = hessian.clone()
    broken[1, 2] = float("inf")
    with pytest.raises(ValueError, match="12 inputs"):
        sparsegpt(weight, torch.eye(12), sparsity=0.5)
    with pytest.raises(ValueError, match=r"square.*\(8,\)"):
        sparsegpt(weight, torch.ones(8), sparsity=0.5)
    with pytest.raises(ValueError, match="Hessian contains NaN or Inf"):
        sparsegpt(weight, broken, sparsity=0.5)
    with pytest.raises(ValueError, match="no calibration token"):
        sparsegpt(weight, Hessian(8).matrix(), sparsity=0.5)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sparsegpt(weight * float("nan"), hessian, sparsity=0.5)
    with pytest.raises(RuntimeError, match="positive semi-definite"):
        factorize(-hessian)
