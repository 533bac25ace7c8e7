"""Masking by bits: packed and unpacked masks, every width of float."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_ft.masks import keep_bits, mask_, pack_bits


@pytest.mark.parametrize("shape", [(5,), (3, 7), (4, 8, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kept_values_stay_and_pruned_ones_are_zero_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) > 0.5
    values = torch.randn(shape, generator=generator).to(dtype)
    values.view(-1)[:2] = torch.tensor([math.inf, math.nan])
    expected = torch.where(mask, values, torch.zeros_like(values))
    for keep in (keep_bits(mask), pack_bits(mask)):
        masked = mask_(values.clone(), keep)
        assert torch.equal(masked.view(torch.uint8), expected.view(torch.uint8))  # bit for bit: NaN, and no -0


@pytest.mark.parametrize("shape", [(4, 8), (32,)])
def test_a_uint8_mask_with_a_byte_per_weight_is_not_taken_for_a_packed_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs 4 bytes of uint8, got"):
        mask_(torch.ones(shape), torch.ones(shape, dtype=torch.uint8))
