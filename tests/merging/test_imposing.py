"""Masks made and imposed piece by piece on files are those of the whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from merging.checkpoints import near, read, write
from safetensors.torch import save_file
from tiny_models import TINY
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.masks import MaskSet, Pattern, pack_bits
from sparse_ft.masks import blocks as mask_blocks
from sparse_ft.masks.blocks import BitWriter, group_blocks, unpack_range, violations
from sparse_ft.merging import chunks
from sparse_ft.merging.imposing import Stored, impose, largest_of_groups, largest_of_tensor, reprune
from sparse_ft.merging.preserving import PreserveMasks
from sparse_ft.models import find_targets

PATTERNS = [("2:4", None), ("1:4", None), ("4:8", None), ("3:5", None), ("unstructured", 0.5), ("unstructured", 0.37)]
# shape and axis of the inputs: Linear, Conv1D, experts of both layouts, rows longer than a piece, a short last group
SHAPES = [((13, 50), 1), ((50, 13), 0), ((3, 10, 14), 2), ((3, 14, 10), 1), ((2, 301), 1), ((301, 2), 0), ((1, 1), 1)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several pieces per tensor."""
    monkeypatch.setattr(mask_blocks, "PIECE", 64)
    monkeypatch.setattr(chunks, "CHUNK", 104)
    yield


def lattice(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Values of which many are equal, zero among them."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).round() / 4


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 5, 8])
def test_blocks_cover_a_tensor_in_order_and_cut_no_group(shape: tuple[int, ...], axis: int, m: int) -> None:
    numel, position = torch.Size(shape).numel(), 0
    group = torch.arange(shape[axis]).div(m, rounding_mode="floor")
    flat = group.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape).reshape(-1)
    outer = torch.arange(numel).div(torch.Size(shape[axis:]).numel(), rounding_mode="floor")
    seen: set[tuple[int, int]] = set()
    for start, (rows, width, inner) in group_blocks(shape, axis, m):
        assert start == position
        position += rows * width * inner
        here = set(zip(outer[start:position].tolist(), flat[start:position].tolist(), strict=True))
        assert not here & seen, "a group lies in one piece"
        seen |= here
    assert position == numel


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_packed_masks_are_read_written_and_checked_in_pieces(shape: tuple[int, ...], axis: int) -> None:
    mask = lattice(shape) > 0
    packed, flat = pack_bits(mask), mask.reshape(-1)
    writer = BitWriter()
    for piece in flat.split(7):
        writer.add(piece)
    assert torch.equal(writer.packed(), packed)
    for start, stop in ((0, flat.numel()), (flat.numel() // 3, flat.numel() // 2), (1, 1)):
        assert torch.equal(unpack_range(packed, start, stop), flat[start:stop])
    for text in ("2:4", "1:4", "unstructured"):
        whole = mask if axis == mask.ndim - 1 else mask.transpose(axis, -1)
        pattern = Pattern.parse(text)
        assert violations(packed, shape, axis, pattern) == pattern.violations(whole)


def test_union_and_intersection_are_those_of_the_bits() -> None:
    first = MaskSet({"w": lattice((6, 12)) > 0, "only": lattice((3, 5), 2) > 0})
    second = MaskSet({"w": lattice((6, 12), 1) > 0})
    assert torch.equal((first | second)["w"], first["w"] | second["w"]) and (first | second)["only"].all()
    assert torch.equal((first & second)["w"], first["w"] & second["w"])
    assert torch.equal((first & second)["only"], first["only"])
    assert (first & second) <= first <= (first | second) and not (first | second) <= first


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pruning_again_gives_the_masks_of_whole_tensors(
    family: str, pattern: str, sparsity: float | None, tmp_path: Path
) -> None:
    model = TINY[family]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(lattice(tuple(weight.shape)))
    model.bfloat16().save_pretrained(tmp_path)
    stored = CheckpointReader(tmp_path)
    targets = find_targets(model)
    dims = {target.name: target.input_dim for target in targets}
    scores = {target.name: stored.get(target.name).float().abs() for target in targets}
    expected = MaskSet.from_scores(scores, pattern=pattern, sparsity=sparsity, input_dims=dims)
    assert reprune(tmp_path, PreserveMasks("reprune", pattern, sparsity)) == expected


@pytest.mark.parametrize(("pattern", "sparsity"), PATTERNS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_masks_of_any_layout(
    shape: tuple[int, ...], axis: int, pattern: str, sparsity: float | None, tmp_path: Path
) -> None:
    weight, parsed = lattice(shape).bfloat16(), Pattern.parse(pattern)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    file, info = CheckpointReader(tmp_path).place("w")
    with open(file, "rb") as opened:
        stored = Stored(opened.fileno(), info, "'x'")
        if parsed.n is not None and parsed.m is not None:
            found = largest_of_groups(stored, axis, parsed.n, parsed.m)
        else:
            assert sparsity is not None
            found = largest_of_tensor(stored, sparsity)
    scores = {"w": weight.float().abs()}
    expected = MaskSet.from_scores(scores, pattern=pattern, sparsity=sparsity, input_dims={"w": axis})
    assert torch.equal(found, expected.packed("w"))


def test_imposing_zeroes_what_is_pruned_and_changes_no_other_bit(tmp_path: Path) -> None:
    tensors = {"a": lattice((11, 13)).bfloat16(), "b": lattice((5,)), "c": lattice((9, 9)).half()}
    tensors["a"][0, :3] = torch.tensor([float("nan"), -0.0, float("-inf")])
    masks = MaskSet({"a": lattice((11, 13), 1) > 0, "c": torch.zeros(9, 9, dtype=torch.bool)})
    save_file(tensors, tmp_path / "model.safetensors")
    impose(tmp_path, masks)
    found = read(tmp_path)
    for name, before in tensors.items():
        keep = masks[name] if name in masks else torch.ones(before.shape, dtype=torch.bool)
        width = torch.int16 if before.dtype != torch.float32 else torch.int32
        assert torch.equal(found[name].view(width), torch.where(keep, before.view(width), 0))


def test_a_disk_that_does_not_keep_zeros_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", near({"a": torch.ones(4, 4)}, 1))
    monkeypatch.setattr("sparse_ft.merging.imposing.write_all", lambda *_: None)
    with pytest.raises(RuntimeError, match="8 pruned weights of 'a' are not zero on disk"):
        impose(tmp_path / "m", MaskSet({"a": torch.arange(16).view(4, 4) % 2 == 0}))
