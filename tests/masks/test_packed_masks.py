"""Masks that are bits already become a `MaskSet` without being unpacked, and patterns are asked for by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.masks import MaskSet, Pattern, pack_bits


def test_a_tensor_without_a_pattern_is_named() -> None:
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^There is a mask of 'w' but no pattern for it, only for 0 other tensors;"):
        MaskSet({"w": mask}, pattern={})
    with pytest.raises(ValueError, match=r"mask of 'w' .* only for 1 other"):
        MaskSet({"v": mask, "w": mask}, pattern={"v": "2:4"})
    assert MaskSet({"w": mask}, pattern={"w": "unstructured", "elsewhere": "2:4"}).patterns == {"w": Pattern()}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 2**31))
def test_packed_masks_are_taken_as_they_are(shapes: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {f"w{i}": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    packed = {name: pack_bits(mask) for name, mask in masks.items()}
    taken = MaskSet.from_packed(packed, {name: mask.shape for name, mask in masks.items()})
    assert taken == MaskSet(masks)
    assert taken.counts() == {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}
    assert all(torch.equal(taken[name], mask) for name, mask in masks.items())
    assert all(taken._packed[name].data_ptr() == bits.data_ptr() for name, bits in packed.items()), "not copied"


def test_packed_masks_are_checked() -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    packed, shapes = {"w": pack_bits(mask)}, {"w": mask.shape}
    assert MaskSet.from_packed(packed, shapes, pattern="2:4") == MaskSet({"w": mask}, pattern="2:4")
    broken = {"w": pack_bits(torch.ones(2, 4, dtype=torch.bool))}
    for options, message in (
        ({"packed": broken, "pattern": "2:4"}, "breaks pattern 2:4 in 2 groups"),
        ({"shapes": {"w": (3, 4)}}, r"shape \(3, 4\) needs 2 bytes"),
        ({"shapes": {"w": (1, 7)}, "packed": broken}, "bits set after its last element"),
        ({"packed": {"w": packed["w"].int()}}, "torch.int32"),
        ({"input_dims": {"w": 2}}, "has no axis 2 of inputs"),
        ({"packed": {}}, "at least one mask"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskSet.from_packed(**{"packed": packed, "shapes": shapes, **options})  # type: ignore[arg-type]


def test_loading_unpacks_only_masks_whose_pattern_is_checked_and_none_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparse_ft.masks.blocks as module

    free, fixed = torch.rand(8, 8) < 0.5, torch.tensor([[True, True, False, False]]).repeat(6, 4)
    masks = MaskSet({"free": free, "fixed": fixed}, pattern={"free": "unstructured", "fixed": "2:4"})
    masks.save(tmp_path)
    unpacked = []
    real = module.unpack_bits
    monkeypatch.setattr(module, "unpack_bits", lambda bits, shape: unpacked.append(tuple(shape)) or real(bits, shape))
    monkeypatch.setattr(module, "PIECE", 32)
    assert MaskSet.load(tmp_path) == masks
    assert unpacked == [(32,)] * 3, "two rows of the mask with a pattern at a time"
