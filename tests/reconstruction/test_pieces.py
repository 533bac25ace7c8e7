"""What errors are measured on, and how often a block is run for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from reconstruction.pairs import QUICK, bits, block_calls, changed, hidden, input_of, mean_square, pair, texts
from torch import nn

from sparse_ft.models import find_blocks
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.reconstruction import blocks, pieces, reconstruct
from sparse_ft.reconstruction.pieces import spread


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(5, 16, [0, 1, 2, 3, 4]), (4, 4, [0, 1, 2, 3]), (10, 3, [1, 5, 8]), (0, 3, [])]
)
def test_spread(count: int, most: int, expected: list[int]) -> None:
    assert spread(range(count), most) == expected


def errors_of(
    model: Any, dense: Any, stops: dict[str, dict[str, str]], batch: dict[str, torch.Tensor]
) -> dict[tuple[str, str], float]:
    """Each window's error by the final model's own forward; stops by the start of a block's name."""
    found = {}
    teachers = dict(find_blocks(dense))
    for block, (args, kwargs, out) in block_calls(model, batch).items():
        with torch.no_grad():
            found[block, "last"] = mean_square(out, hidden(teachers[block](*args, **kwargs)))
        for window, stop in next(of for start, of in stops.items() if block.startswith(start)).items():
            both = (dict(find_blocks(model))[block], teachers[block])
            ends = [input_of(one.get_submodule(stop), partial(one, *args, **kwargs)) for one in both]
            found[block, window] = mean_square(*ends)
    return found


T5 = {"encoder": {"attn": "layer.1"}, "decoder": {"attn": "layer.1", "attn2": "layer.2"}}


@pytest.mark.parametrize(
    ("name", "granularity", "stops"),
    [("t5", "attn_mlp", T5), ("llama", "block", {"": {}}), ("t5", "block", {"": {}}), ("gpt2", "block", {"": {}})],
)
@pytest.mark.parametrize("train", ["full", "mask_lora"])
def test_reported_errors_are_those_of_the_result(name: str, granularity: str, stops: Any, train: str) -> None:
    model, masks, dense = pair(name)
    result = reconstruct(
        model, masks, dense, calibration=texts(), granularity=granularity, train=train, batch_size=6, **QUICK
    )
    found = errors_of(model, dense, stops, texts()[0])
    assert len(result.windows) == len(found)
    for row in result.windows:
        window = "last" if row.window in ("mlp", "block") else row.window
        assert row.loss_after == pytest.approx(found[row.block, window], rel=1e-4)


@pytest.mark.filterwarnings("ignore:granularity")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reported_errors_of_matrices_are_those_of_the_result(name: str) -> None:
    model, masks, dense = pair(name)
    result = reconstruct(model, masks, dense, calibration=texts(), granularity="linear", batch_size=6, **QUICK)
    assert len(result.windows) == len(masks)
    for row in result.windows:
        path = f"{row.block}.{row.window}"
        ours, theirs = model.get_submodule(path), dense.get_submodule(path)
        given = input_of(ours, partial(block_calls, model, texts()[0]))
        with torch.no_grad():
            assert row.loss_after == pytest.approx(mean_square(ours(given), theirs(given)), rel=1e-4)


@pytest.mark.filterwarnings("ignore:granularity")
@pytest.mark.parametrize("granularity", ["attn_mlp", "linear"])
@pytest.mark.parametrize("iterations", [0, 6])
def test_errors_are_measured_on_batches_spread_evenly(
    granularity: str, iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of six batches: the second and the fifth, before and after, whether the block hands on or is the last."""
    monkeypatch.setattr(pieces, "MEASURED", 2)
    model, masks, dense = pair("llama")
    options = QUICK | dict(granularity=granularity, batch_size=1, iterations=iterations)
    rows = reconstruct(model, masks, dense, calibration=texts(), **options).windows
    sequences = [one["input_ids"] for one in prepare_calibration(model, texts(), "a test", rows_per_batch=1)]
    some = {"input_ids": torch.cat([sequences[1], sequences[4]])}
    if granularity == "attn_mlp":
        found = errors_of(model, dense, {"": {"attn": "post_attention_layernorm"}}, some)
        for row in rows:
            window = "last" if row.window == "mlp" else row.window
            assert row.loss_after == pytest.approx(found[row.block, window], rel=1e-4)
        return
    for row in rows:
        path = f"{row.block}.{row.window}"
        ours, theirs = model.get_submodule(path), dense.get_submodule(path)
        given = input_of(ours, partial(block_calls, model, some))
        with torch.no_grad():
            assert row.loss_after == pytest.approx(mean_square(ours(given), theirs(given)), rel=1e-4)


def calls_without_training(batches: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the modules of a model with two blocks are run, by class."""
    monkeypatch.setattr(pieces, "MEASURED", 1)
    model, masks, dense = pair("llama")
    calls: Counter[str] = Counter()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: calls.update([type(module).__name__])
    )
    try:
        options = dict(batch_size=1, iterations=0, progress=False)
        reconstruct(model, masks, dense, calibration=texts(rows=batches), **options)
    finally:
        hook.remove()
    return calls


def test_a_block_is_run_twice_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, and when it is done; of the last block only the attention, whose output the MLP's window takes in."""
    few, many = (calls_without_training(batches, monkeypatch) for batches in (4, 9))
    assert many["LlamaAttention"] - few["LlamaAttention"] == 5 * (2 + 2)
    assert many["LlamaMLP"] - few["LlamaMLP"] == 5 * (2 + 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "t5"])
def test_handing_on_replays_what_the_block_would_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as if the whole block were run for the next one."""
    model, masks, dense = pair(name)
    result = reconstruct(model, masks, dense, calibration=texts(), **QUICK)
    find = blocks.find_windows
    monkeypatch.setattr(
        blocks, "find_windows", lambda *args: [replace(window, is_rest=False) for window in find(*args)]
    )
    other = pair(name)[0]
    assert reconstruct(other, masks, dense, calibration=texts(), **QUICK) == result
    assert not changed(other, bits(model))
    for one in (model, dense):
        assert not any("StandIn" in type(module).__name__ for module in one.modules())
