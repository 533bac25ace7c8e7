"""Cuts of a delta seen in chunks against a stable sort of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_ft.merging import chunks, thresholds
from sparse_ft.merging.chunks import Job, MemoryOperand
from sparse_ft.merging.thresholds import Wanted, find_cuts


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.randn(70_001, generator=generator)
    rows = smooth * torch.linspace(0.01, 5, 70_001)  # neighbours are alike: samples by blocks mislead
    lattice = (smooth * 3).round() / 3
    mostly_zero = torch.where(torch.rand(70_001, generator=generator) < 0.27, 0.0, smooth)
    spike = torch.zeros(70_001)
    spike[12_345] = 1.0
    return {"smooth": smooth, "rows": rows, "lattice": lattice, "mostly_zero": mostly_zero, "spike": spike}


def chosen(tensor: Tensor, wanted: Wanted, job: Job) -> np.ndarray:
    (cut,) = find_cuts(job, [wanted])
    out = np.empty(tensor.numel(), dtype=np.bool_)
    for start, stop in job.ranges():
        sizes = tensor[start:stop].abs().numpy()
        if wanted.largest:
            early = np.arange(start, stop) < cut.position
            out[start:stop] = (sizes > np.float32(cut.value)) | ((sizes == np.float32(cut.value)) & early)
        else:
            cut.smallest(sizes, start, out[start:stop])
    return out


@pytest.mark.parametrize("kind", ["smooth", "rows", "lattice", "mostly_zero", "spike"])
@pytest.mark.parametrize("missed", [None, 1e-6, 1e6], ids=["bracket", "bracket_too_low", "bracket_too_high"])
def test_cuts_are_exact(kind: str, missed: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 10_000)
    if missed is not None:
        wrong = lambda search, sample: search.__dict__.update(low=missed, high=missed)  # noqa: E731
        monkeypatch.setattr(thresholds._Search, "bracket", wrong)
    tensor = tensors()[kind]
    n = tensor.numel()
    job = Job("w", (n,), MemoryOperand(torch.zeros(n)), [MemoryOperand(tensor)], weights=[1.0])
    for largest in (True, False):
        order = torch.sort(tensor.abs(), descending=largest, stable=True).indices.numpy()
        for count in (0, 1, 700, n // 5, n // 2, n - 1, n):
            expected = np.zeros(n, dtype=np.bool_)
            expected[order[:count]] = True
            assert np.array_equal(chosen(tensor, Wanted(0, count, largest), job), expected), (largest, count)


def test_one_pass_when_the_bracket_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss costs two more passes and must be rare."""
    passes = []
    monkeypatch.setattr(thresholds, "_take_histograms", lambda job, searches: passes.append(len(searches)))
    monkeypatch.setattr(chunks, "CHUNK", 10_000)
    for kind in ("smooth", "lattice", "mostly_zero"):
        tensor = tensors()[kind]
        job = Job("w", (len(tensor),), None, [MemoryOperand(tensor)], weights=[1.0])
        for share in (0.05, 0.2, 0.5, 0.9):
            find_cuts(job, [Wanted(0, int(share * len(tensor)), True)])
    assert passes == []
