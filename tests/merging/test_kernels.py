"""The compiled loops of a merge against NumPy and torch, at sizes that fill no block, and with bf16 as fp32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_ft.merging import consensus, kernels
from sparse_ft.merging.chunks import Job, MemoryOperand, as_array, run_in_memory
from sparse_ft.merging.dare import dare_linear, dare_ties
from sparse_ft.merging.task_arithmetic import merge_task_arithmetic
from sparse_ft.merging.ties import merge_ties, ties

SIZES = (1, 7, 2047, 2048, 2049, 5000)


def bf16_models(n: int, count: int = 3, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tunes as bf16 checkpoints have them: deltas lie on a lattice, many are zero or alike."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(n, generator=generator) * 0.02).bfloat16()
    return base, [(base.float() + 5e-4 * torch.randn(n, generator=generator)).bfloat16() for _ in range(count)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("n", SIZES)
def test_bf16_is_read_as_the_fp32_it_stands_for(n: int) -> None:
    base, tensors = bf16_models(n)
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(k)) < 0.4 for k in range(3)]
    wide = (base.float(), [tensor.float() for tensor in tensors])
    for merge in (
        lambda b, t: ties(b, t, [1, 2, 0.5], [0.3, 0.5, 1.0]),
        lambda b, t: dare_ties(b, t, [1, 1, 1], [0.4] * 3, masks),
        lambda b, t: dare_linear(b, t, [1, -1, 1], [0.4] * 3, masks),
    ):
        assert same_bits(merge(base, tensors), merge(*wide))


def job_of(base: Tensor, tensors: Sequence[Tensor], **settings: object) -> Job:
    count = len(tensors)
    given = {"weights": [1.0] * count, "densities": [0.5] * count, **settings}
    return Job("w", tuple(base.shape), MemoryOperand(base), [MemoryOperand(t) for t in tensors], **given)  # type: ignore[arg-type]


def test_results_are_rounded_to_bf16_as_torch_rounds() -> None:
    """Every upper half of a finite fp32 number, with lower halves on both sides of a tie and on it."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([upper | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    values = torch.from_numpy(bits.view(np.float32).copy())
    values = values[values.isfinite() & (values != 0) & (values.abs() < 1e38)]
    merged = {}
    for dtype in (torch.float32, torch.bfloat16):
        job = job_of(values, [values], dtype=dtype, densities=[1.0])
        merge = merge_task_arithmetic(job)
        merged[dtype] = torch.cat([merge.chunk(start, stop).clone() for start, stop in job.ranges()])
    assert same_bits(merged[torch.float32], values), "a delta of zero changes nothing"
    assert merged[torch.bfloat16].dtype == torch.bfloat16
    assert torch.equal(merged[torch.bfloat16].view(torch.int16), values.bfloat16().view(torch.int16))


@pytest.mark.parametrize("n", SIZES)
def test_collect_counts_what_numpy_counts(n: int) -> None:
    base, (model, *_) = bf16_models(n)
    sizes = (model.float() - base.float()).abs().numpy()
    ordered = np.sort(sizes)
    room = np.empty(n, np.float32)
    for low, high in (
        (ordered[n // 3], ordered[2 * n // 3]),
        (ordered[n // 2],) * 2,
        (np.float32(0), np.float32("inf")),
    ):
        found = kernels.collect(as_array(base), as_array(model), low, high, room)
        at_high = int((sizes == high).sum()) if high > low else 0
        between = sizes[(sizes > low) & (sizes < high)]
        assert found == (int((sizes < low).sum()), int((sizes == low).sum()), at_high, len(between), False)
        assert np.array_equal(room[: len(between)], between), "in order"
    value = ordered[n // 2]
    places = np.flatnonzero(sizes == value)
    for number, place in enumerate(places.tolist(), start=1):
        assert kernels.place_of(as_array(base), as_array(model), value, number) == place
    assert kernels.place_of(as_array(base), as_array(model), value, len(places) + 1) == n


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_found_wherever_it_stands(bad: float, dtype: torch.dtype) -> None:
    base, tensors = bf16_models(4100)
    for place in (0, 2047, 2048, 4099):
        broken = tensors[1].to(dtype).clone()
        broken[place] = bad
        for merge_job in (merge_ties, merge_task_arithmetic):
            job = job_of(base.to(dtype), [tensors[0].to(dtype), broken], labels=["math", "code"])
            with pytest.raises(ValueError, match=r"'w' of 'code'.*NaN"):
                run_in_memory(job, merge_job(job))


def test_a_dropped_entry_that_is_not_finite_is_found_too() -> None:
    base, tensors = bf16_models(100)
    tensors[0][5] = float("nan")
    masks = [torch.zeros(100, dtype=torch.bool)] * 3
    with pytest.raises(ValueError, match="NaN"):
        dare_linear(base, tensors, [1] * 3, [0.5] * 3, masks)


@pytest.mark.parametrize("kept", [0, 10, 1 << 21])
def test_entries_without_a_majority_are_right_however_few_are_remembered(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prevailing sign is known last; what is not remembered until then is computed again."""
    monkeypatch.setattr(consensus, "_MOST_KEPT", kept)
    monkeypatch.setattr("sparse_ft.merging.chunks.CHUNK", 1000)
    generator = torch.Generator().manual_seed(2)
    deltas = torch.randint(-3, 3, (2, 6000), generator=generator).float() / 8  # more negative ones than positive
    merged = ties(torch.zeros(6000), list(deltas), [1, 1], [1, 1])
    cancel = (deltas.sum(0) == 0) & (deltas[0] != 0)
    assert int(cancel.sum()) > 500
    assert torch.equal(merged[cancel], torch.minimum(deltas[0], deltas[1])[cancel])
