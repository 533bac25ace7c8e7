"""DARE: identity, unbiasedness, exact bits off the mask, and masks that depend on their key alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from deltas.delta_models import bits, randn
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.deltas import add_delta, dare, keep_mask, random_keep

DENSITIES = (0.001, 0.01, 1 / 32, 0.1, 0.5, 0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_density_1_is_the_identity_and_density_0_gives_zeros(dtype: torch.dtype) -> None:
    delta = randn(7, 5).to(dtype)
    delta[0, 0] = -0.0
    assert torch.equal(bits(dare(delta, density=1.0, name="w")), bits(delta.float()))
    for scale in (None, 0.3):
        nothing = dare(delta, density=0.0, name="w", scale=scale)
        assert nothing.dtype == torch.float32 and torch.equal(nothing, torch.zeros(7, 5))


def test_the_fine_tuned_and_the_base_weights_come_back_at_the_ends() -> None:
    """The fp32 difference of two bf16 weights is exact enough for the sum to round to the fine-tuned value."""
    base = (randn(400, 50) * 0.02).bfloat16()
    finetuned = (base.float() + randn(400, 50, seed=1) * 1e-3).bfloat16()
    delta = finetuned.float() - base.float()
    assert torch.equal(bits(add_delta(base, dare(delta, density=1.0, name="w"))), bits(finetuned))
    assert torch.equal(bits(add_delta(base, dare(delta, density=0.0, name="w"))), bits(base))


@pytest.mark.parametrize("density", DENSITIES)
def test_the_formula_written_again(density: float) -> None:
    delta = randn(300, 70).numpy()
    keep = random_keep(delta.size, density, seed=3, name="a.weight", role="math").reshape(delta.shape)
    expected = np.where(keep, delta.astype(np.float64) / density, 0.0)
    found = dare(torch.from_numpy(delta), density=density, seed=3, name="a.weight", role="math")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=0)
    assert torch.equal(found != 0, torch.from_numpy(keep))
    assert torch.equal(torch.from_numpy(keep), keep_mask((300, 70), density, seed=3, name="a.weight", role="math"))


@pytest.mark.parametrize("density", DENSITIES)
def test_a_scale_equal_to_the_density_is_dare_bit_for_bit(density: float) -> None:
    delta = randn(100, 30)
    assert torch.equal(dare(delta, density=density, name="w"), dare(delta, density=density, name="w", scale=density))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0])
def test_times_the_scale_it_is_the_delta_on_the_mask_and_zero_off_it(density: float, scale: float) -> None:
    delta = randn(100, 30)
    keep = keep_mask(delta.shape, density, seed=0, name="w")
    for pruned in (
        dare(delta, density=density, name="w", scale=scale),
        dare(delta, density=density, keep=keep, scale=scale),
    ):
        torch.testing.assert_close((pruned * scale)[keep], delta[keep], rtol=1e-6, atol=0)
        assert not pruned[~keep].any()
    if scale == 1.0:
        assert torch.equal(dare(delta, density=density, name="w", scale=1.0)[keep], delta[keep])


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_the_mean_over_seeds_is_the_delta(density: float) -> None:
    """z-test over 96 masks: each entry's mean has the variance delta² (1 - d) / (96 d)."""
    seeds, delta = 96, randn(2000) + 0.5
    mean = sum(dare(delta, density=density, seed=seed, name="w").double() for seed in range(seeds)) / seeds
    deviation = delta.double().abs() * math.sqrt((1 - density) / (density * seeds))
    z = (mean - delta.double()) / deviation
    assert abs(float(z.mean())) < 5 / math.sqrt(2000)
    assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / 2000 + 1 / (density * seeds * 2000))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_kept_and_the_scale_do_not_depend_on_the_dtype(density: float, dtype: torch.dtype) -> None:
    """Rates of .99 and .999 do not exist in bf16: sampled there, 17% too many or no entries at all are kept."""
    n = 400_000
    pruned = dare(torch.ones(n, dtype=dtype), density=density, name="w")
    kept = int((pruned != 0).sum())
    assert abs(kept - n * density) < 5 * math.sqrt(n * density * (1 - density))
    torch.testing.assert_close(pruned[pruned != 0].double().mean(), torch.tensor(1 / density, dtype=torch.float64))


def test_bf16_and_fp32_deltas_of_equal_value_give_equal_results() -> None:
    delta = randn(64, 32).bfloat16()
    for density in (0.02, 0.4):
        assert torch.equal(dare(delta, density=density, name="w"), dare(delta.float(), density=density, name="w"))


def test_names_seeds_and_roles_give_other_masks_and_order_does_not_matter() -> None:
    ones = torch.ones(64, 64)
    first = dare(ones, density=0.3, seed=0, name="a")
    for other in (dict(seed=1, name="a"), dict(seed=0, name="b"), dict(seed=0, name="a", role="x")):
        assert not torch.equal(first, dare(ones, density=0.3, **other))  # type: ignore[arg-type]
    torch.manual_seed(12345)
    torch.rand(7)
    assert torch.equal(first, dare(ones, density=0.3, seed=0, name="a"))
    assert torch.equal(first, dare(ones.t().contiguous().t(), density=0.3, seed=0, name="a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_the_mask_the_weights_are_the_bases_bits(dtype: torch.dtype) -> None:
    base = (randn(200, 100) * 0.02).to(dtype)
    base[0, :50] = -0.0
    finetuned = (base.float() + randn(200, 100, seed=1) * 1e-3).to(dtype)
    keep = keep_mask(base.shape, 0.1, seed=0, name="w")
    merged = add_delta(base, dare(finetuned.float() - base.float(), density=0.1, keep=keep))
    assert merged.dtype == dtype
    assert torch.equal(bits(merged)[~keep], bits(base)[~keep])
    on = base.double() + (finetuned.float() - base.float()).double() / 0.1
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(merged[keep].double(), on[keep], rtol=tolerance, atol=1e-7)


def test_the_result_is_cast_once_to_the_dtype_asked_for() -> None:
    base, delta = torch.tensor([1.0, 1.0]).bfloat16(), torch.tensor([2.0**-9, 0.0])
    assert add_delta(base, delta, dtype=torch.float32).tolist() == [1 + 2.0**-9, 1.0]
    assert add_delta(base, delta).tolist() == [1.0, 1.0]


@given(st.integers(0, 40), st.floats(0, 1), st.floats(1e-3, 10))
def test_any_density_and_scale(numel: int, density: float, scale: float) -> None:
    delta = randn(numel)
    pruned = dare(delta, density=density, seed=1, name="w", scale=scale)
    keep = torch.from_numpy(random_keep(numel, density, seed=1, name="w"))
    assert pruned.shape == delta.shape and bool(pruned.isfinite().all())
    assert torch.equal(pruned != 0, keep & (delta != 0))


@pytest.mark.gpu
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_a_gpu_gives_the_same_bits(density: float) -> None:
    delta = randn(300, 70).bfloat16()
    for scale in (None, 0.37):
        here = dare(delta, density=density, seed=1, name="w", scale=scale)
        assert torch.equal(bits(dare(delta.cuda(), density=density, seed=1, name="w", scale=scale).cpu()), bits(here))


def test_tiny_and_all_zero_tensors() -> None:
    assert dare(torch.tensor(2.0), density=0.5, keep=torch.tensor(True)).item() == 4.0
    assert torch.equal(dare(torch.zeros(5, 5), density=0.01, name="w"), torch.zeros(5, 5))
    assert dare(torch.empty(0, 3), density=0.5, name="w").shape == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_nan_and_inf_raise_and_are_not_masked_away(bad: float, density: float) -> None:
    delta = randn(50)
    delta[17] = bad
    with pytest.raises(ValueError, match="delta of 'w' contains NaN or infinite"):
        dare(delta, density=density, name="w")


def test_refusals() -> None:
    delta = randn(4)
    with pytest.raises(ValueError, match=r"density .* 0\.\.1, got 1\.2"):
        dare(delta, density=1.2, name="w")
    with pytest.raises(ValueError, match=r"density .* got nan"):
        dare(delta, density=float("nan"), name="w")
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale is"):
            dare(delta, density=0.5, name="w", scale=scale)
    with pytest.raises(ValueError, match="overflow"):
        dare(delta, density=0.5, name="w", scale=1e-38)
    with pytest.raises(ValueError, match="needs name"):
        dare(delta, density=0.5)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        dare(delta, density=0.5, keep=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="pass a torch"):
        dare(delta, density=0.5, keep=torch.ones(4))
    with pytest.raises(ValueError, match="int64"):
        dare(torch.arange(4), density=0.5, name="w")
    with pytest.raises(ValueError, match=r"\(4,\) and the delta \(3,\)"):
        add_delta(delta, delta[:3])
