"""The delta file: what is written comes back, twice the same bytes, and nothing damaged is accepted."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from deltas.pairs import UP, base_tensors, read, same_bits, tuned_tensors, write, write_pair
from safetensors.torch import save_file

from sparse_ft.deltas import random_positions
from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.positions import decode_positions, encode_positions
from sparse_ft.deltas.store import DELTA_FILE, DeltaFile, rescale


@pytest.mark.parametrize("density", [0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_positions_come_back_and_take_the_smaller_encoding(density: float) -> None:
    numel = 20_001
    positions = random_positions(numel, density, seed=0, name="x")
    encoding, data = encode_positions(positions, numel)
    assert np.array_equal(decode_positions(encoding, data, numel), positions)
    assert data.numel() <= math.ceil(numel / 8)
    assert (encoding == "gaps") == (density < 0.12)


def test_a_gap_takes_the_bytes_documented() -> None:
    """At a density d a gap is longer than 127 entries with the probability (1 - d)^128, and then takes two bytes."""
    positions = random_positions(4_000_000, 0.01, seed=0, name="x")
    encoding, data = encode_positions(positions, 4_000_000)
    assert encoding == "gaps"
    assert data.numel() / len(positions) == pytest.approx(1 + 0.99**128, abs=0.01) == pytest.approx(1.3, abs=0.05)


def test_gaps_of_every_length_of_bytes_come_back() -> None:
    gaps = np.array([0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 5, 0])
    positions = np.cumsum(gaps + 1) - 1
    numel = int(positions[-1]) + 1
    encoding, data = encode_positions(positions, numel)
    assert encoding == "gaps" and data.numel() == 5 * 1 + 2 * 2 + 2 * 3 + 1 * 4
    assert np.array_equal(decode_positions(encoding, data, numel), positions)
    with pytest.raises(ValueError, match="damaged"):
        decode_positions("gaps", data[:-1].clone().fill_(0x80), numel)
    with pytest.raises(ValueError, match="damaged"):
        decode_positions("gaps", data, numel - 1)


@pytest.mark.parametrize("method", ["dare", "structural", "magnitude"])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_save_load_save_gives_the_same_bytes(method: str, density: float, tmp_path: Path) -> None:
    delta = extract_delta(*write_pair(tmp_path), tmp_path / "delta", Settings(method, density), progress=False)
    (tmp_path / "again").mkdir()
    delta.save(tmp_path / "again")
    assert [file.name for file in (tmp_path / "again").iterdir()] == [DELTA_FILE]
    assert (tmp_path / "again" / DELTA_FILE).read_bytes() == (tmp_path / "delta" / DELTA_FILE).read_bytes()
    assert DeltaFile(tmp_path / "again").header == delta.header


def test_values_are_the_unscaled_differences_at_the_kept_entries(tmp_path: Path) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    places = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned)
    delta = extract_delta(*places, tmp_path / "delta", Settings(density=0.2, seed=3), progress=False)
    for name, tensor in base.items():
        difference = (tuned[name].float() - tensor.float()).flatten()
        positions = random_positions(tensor.numel(), 0.2, seed=3, name=name)
        assert same_bits(delta.values(name), difference[torch.from_numpy(positions)].bfloat16())
        expected = torch.zeros(tensor.numel())
        expected[torch.from_numpy(positions)] = difference.bfloat16().float()[torch.from_numpy(positions)] / 0.2
        assert torch.equal(delta.delta(name).flatten(), expected)


def test_another_scale_changes_no_value(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    delta = extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.1), progress=False)
    before = dict(delta.tensors())
    rescale(tmp_path / "delta", scale=0.3, scales={UP: 0.5})
    changed = DeltaFile(tmp_path / "delta")
    assert (changed.header.scale_of("model.norm.weight"), changed.header.scale_of(UP)) == (0.3, 0.5)
    assert all(same_bits(tensor, before.pop(name)) for name, tensor in changed.tensors()) and not before
    assert torch.equal(changed.delta(UP) * 0.5, delta.delta(UP) * 0.1)
    rescale(tmp_path / "delta", scale=0.1, scales={})
    again = extract_delta(base, tuned, tmp_path / "other", Settings(density=0.1), progress=False)
    assert again.nbytes == DeltaFile(tmp_path / "delta").nbytes
    assert (tmp_path / "other" / DELTA_FILE).read_bytes() == (tmp_path / "delta" / DELTA_FILE).read_bytes()
    for bad in ({"scale": 0.0}, {"scale": math.nan}, {"scales": {"nothing": 0.5}}):
        with pytest.raises(ValueError, match="scale"):
            rescale(tmp_path / "delta", **bad)


@pytest.mark.parametrize(("method", "most"), [("dare", 0.0105), ("structural", 0.0105), ("magnitude", 0.0172)])
def test_a_hundredth_of_a_bf16_model_is_small(method: str, most: float, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {
        f"model.layers.{i}.mlp.up_proj.weight": (torch.randn(800, 500, generator=generator) * 0.02).bfloat16()
        for i in range(4)
    }
    places = write(tmp_path / "base", base), write(tmp_path / "tuned", tuned_tensors(base))
    delta = extract_delta(*places, tmp_path / "delta", Settings(method, 0.01), progress=False)
    assert delta.nbytes <= most * (tmp_path / "base" / "model.safetensors").stat().st_size


def damaged(file: Path, change: str) -> None:
    """Spoil a delta file in one of several ways."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["sparse_ft_delta"])
    part = inner["tensors"][UP]
    if change == "version":
        inner["format_version"] = 9
    elif change == "generator":
        inner["generator"] = "mersenne"
    elif change == "density":
        inner["density"] = math.nan
    elif change == "scale":
        inner["scale"] = 0
    elif change == "fewer values":
        inner["density"] = 0.4
    elif change == "shape":
        part["shape"] = [-1, 4]
    elif change == "mask":
        part["mask"] = "wish"
    elif change == "another tensor":
        inner["tensors"]["strange"] = part
    elif change == "one tensor less":
        del inner["tensors"][UP]
    elif change == "unknown key":
        inner["surprise"] = 1
    header["__metadata__"]["sparse_ft_delta"] = json.dumps(inner)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


CHANGES = [
    "version", "generator", "density", "scale", "shape", "mask", "another tensor", "one tensor less", "unknown key",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_header_that_is_wrong_is_refused(change: str, tmp_path: Path) -> None:
    extract_delta(*write_pair(tmp_path), tmp_path / "delta", Settings(density=0.1), progress=False)
    damaged(tmp_path / "delta" / DELTA_FILE, change)
    with pytest.raises(ValueError, match="delta"):
        DeltaFile(tmp_path / "delta")


def test_values_that_do_not_fit_the_mask_are_refused(tmp_path: Path) -> None:
    extract_delta(*write_pair(tmp_path), tmp_path / "delta", Settings(density=0.1), progress=False)
    damaged(tmp_path / "delta" / DELTA_FILE, "fewer values")
    with pytest.raises(ValueError, match="damaged"):
        apply_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_truncated_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    extract_delta(*write_pair(tmp_path), tmp_path / "delta", Settings(density=0.1), progress=False)
    file = tmp_path / "delta" / DELTA_FILE
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        DeltaFile(tmp_path / "delta")
    save_file(base_tensors(), file)
    with pytest.raises(ValueError, match="no delta"):
        DeltaFile(tmp_path / "delta")
    with pytest.raises(FileNotFoundError, match="sparse-ft delta"):
        DeltaFile(tmp_path / "base")


def test_the_restored_checkpoint_is_read_by_name(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.1), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    assert read(tmp_path / "out").keys() == read(base).keys()
    assert not (tmp_path / "out" / "delta.json").exists() and (tmp_path / "out" / "config.json").exists()
