"""The generator of random masks against its written definition, spelled out a second time in plain integers."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.deltas import random_keep, random_positions
from sparse_ft.deltas.random_mask import GAP_BLOCK, _exact_gap

DENSITIES = (0.0, 1e-5, 0.001, 0.01, 1 / 32, 0.0313, 0.1, 0.5, 0.9, 0.999, 1.0)
WORD = (1 << 64) - 1


def keys(seed: int, role: str, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}\0{role}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as its paper writes it: the four words of one count."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 1 << 64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [c0, c1, c2, c3]


def splitmix(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)


def keep_one(index: int, density: float, key: tuple[int, int]) -> bool:
    piece = splitmix(key[0], index // 4) >> 16 * (index % 4) & 65535
    whole = math.floor(Fraction(density) * 65536)
    if piece != whole:
        return piece < whole
    return splitmix(key[1], index) < (Fraction(density) * 65536 - whole) * 2**64


def gaps_kept(count: int, density: float, key: tuple[int, int], block: int) -> list[int]:
    """The first kept positions of a block."""
    kept: list[int] = []
    position, draw = -1, 0
    while len(kept) < count:
        # the generator counts before it draws, so the first words come from count 1
        word = philox(key, (draw // 4 + 1, 0, block, 1))[draw % 4]
        u, gap = Fraction((word >> 11) + 1, 2**53), 0
        while u <= (1 - Fraction(density)) ** (gap + 1):
            gap += 1
        position, draw = position + gap + 1, draw + 1
        kept.append(position)
    return kept


@pytest.mark.parametrize("density", [0.0313, 0.3, 0.77, 0.999])
def test_words_follow_the_definition(density: float) -> None:
    key = keys(3, "code", "layers.0.weight")
    expected = [keep_one(index, density, key) for index in range(2000, 3000)]
    assert random_keep(1000, density, seed=3, name="layers.0.weight", role="code", start=2000).tolist() == expected


def test_a_piece_equal_to_the_threshold_is_decided_by_the_second_stream() -> None:
    """So a density between two 65536ths is met: the undecided element is neither always kept nor always dropped."""
    whole, key = 20_000, keys(0, "", "w")
    pieces = np.array([splitmix(key[0], word) for word in range(150_000)], dtype="<u8").view("<u2")
    undecided = np.flatnonzero(pieces == whole).tolist()
    expected = [splitmix(key[1], index) < 2**63 for index in undecided]
    assert set(expected) == {True, False}
    keep = random_keep(len(pieces), (whole + 0.5) / 65536, seed=0, name="w")
    assert keep[undecided].tolist() == expected


def test_gaps_follow_the_definition() -> None:
    key = keys(0, "", "w")
    for block in (0, 3):
        expected = gaps_kept(40, 0.03, key, block)
        positions = random_positions(expected[-1] + 1, 0.03, seed=0, name="w", start=block * GAP_BLOCK)
        assert positions.tolist() == expected


def test_the_edge_between_two_gaps_is_exact() -> None:
    """u = (1 - d)^k survives k steps, and so does the next smaller number; the next larger does not."""
    assert _exact_gap(0.5**7, 0.5, 7) == 7
    assert _exact_gap(0.5**7 * (1 - 2**-52), 0.5, 7) == 7
    assert _exact_gap(0.5**7 * (1 + 2**-52), 0.5, 7) == 6


@pytest.mark.parametrize("density", DENSITIES)
def test_any_slice_gives_the_same_bits(density: float) -> None:
    n = 2 * GAP_BLOCK + 12345
    whole = random_keep(n, density, seed=1, name="w")
    cuts = [0, 1, 3, 2050, 131072, GAP_BLOCK - 1, GAP_BLOCK + 7, n]
    pieces = [random_keep(b - a, density, seed=1, name="w", start=a) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(random_positions(n, density, seed=1, name="w"), np.flatnonzero(whole))
    assert np.array_equal(
        random_positions(1000, density, seed=1, name="w", start=5000), np.flatnonzero(whole[5000:6000])
    )


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.1, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    n = 3_000_000
    kept = int(random_keep(n, density, seed=5, name="w").sum())
    assert abs(kept - n * density) < 5 * math.sqrt(n * density * (1 - density))


@pytest.mark.parametrize("density", [0.02, 0.4])
def test_seed_name_and_role_give_independent_masks(density: float) -> None:
    n = 400_000
    masks = [
        random_keep(n, density, seed=seed, name=name, role=role)
        for seed, name, role in ((0, "a", ""), (1, "a", ""), (0, "b", ""), (0, "a", "math"))
    ]
    for index, first in enumerate(masks):
        for second in masks[index + 1 :]:
            both = int((first & second).sum())
            assert abs(both - n * density**2) < 5 * math.sqrt(n * density**2)


def test_neighbours_are_independent() -> None:
    keep = random_keep(1_000_000, 0.3, seed=0, name="w").astype(np.float64) - 0.3
    for lag in (1, 4, 8):
        assert abs(np.mean(keep[lag:] * keep[:-lag])) < 5 * 0.21 / 1000


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density .* 0\.\.1"):
        random_keep(4, density, seed=0, name="w")


@given(st.integers(0, 5000), st.integers(0, 300), st.sampled_from(DENSITIES))
def test_slices_of_any_size(start: int, numel: int, density: float) -> None:
    whole = random_keep(start + numel, density, seed=2, name="w")
    assert np.array_equal(random_keep(numel, density, seed=2, name="w", start=start), whole[start:])
