"""Blocks get exactly the arguments the model gives them, asked for once, and held once where batches agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reconstruction.pairs import FAMILIES, block_calls, texts
from tiny_models import TINY
from torch import Tensor, nn

from sparse_ft.models import find_blocks
from sparse_ft.pruning.calibration import prepare_calibration
from sparse_ft.pruning.replay import tensors_in
from sparse_ft.reconstruction.streams import Streams


def streams(model: nn.Module, batches: list[dict[str, Any]], stream: str = "sparse") -> Streams:
    side = (model, find_blocks(model))
    return Streams(stream, side, side, batches, device="cpu", dense_device="cpu", keep=torch.clone)


def same(left: Any, right: Any) -> bool:
    pairs = zip(tensors_in(left), tensors_in(right), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_arguments_are_those_of_the_model(name: str) -> None:
    """Every block, every batch, twice, though the first answer was written into."""
    model = TINY[name]()
    batches = prepare_calibration(model, texts(rows=5), "test", rows_per_batch=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    expected = [block_calls(model, batch) for batch in batches]
    blocks = find_blocks(model)
    with streams(model, batches) as running:
        for _ in blocks:
            index = running.next_block()
            assert index is not None
            block = blocks[index][0]
            for _ in range(2):
                for number, calls in enumerate(expected):
                    given = running.inputs(number)
                    assert same(given, calls[block][:2]), block
                    for tensor in tensors_in(given):
                        tensor.zero_()
            running.advance(index)
        assert running.next_block() is None


def test_equal_tensors_of_batches_are_held_once() -> None:
    """Llama's positions, cosines and sines; hidden states differ."""
    model = TINY["llama"]()
    batches = prepare_calibration(model, texts(rows=4), "test", rows_per_batch=2)
    with streams(model, batches) as running:
        for number in range(2):
            running.inputs(number)
        first, second = (list(tensors_in(running._known[0][number])) for number in range(2))
    assert len(first) >= 4
    assert [one is two for one, two in zip(first, second, strict=True)].count(False) == 1


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, notes: Any = None) -> Tensor:
        return self.linear(x)


class BetweenBlocks(nn.Module):
    """A model that writes into what a block gave back before the next one gets it, and passes an object along."""

    def __init__(self, notes: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Part(), Part(), Part()])
        self.asked = 0
        self._notes = notes

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        for layer in self.layers:
            x = layer(x, notes=self._notes)
            x += 1
        return x


@torch.no_grad()
def test_what_a_model_writes_between_blocks_is_seen() -> None:
    torch.manual_seed(0)
    model, x = BetweenBlocks(), torch.randn(2, 4)
    first, second, _ = model.layers
    with streams(model, [{"x": x}]) as running:
        for expected in (x, first(x) + 1, second(first(x) + 1) + 1):
            assert torch.equal(running.inputs(0)[0][0], expected) and torch.equal(running.inputs(0)[0][0], expected)
            running.advance(running.next_block())  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(("notes", "times"), [(None, 1), ({"a": [1, "b"]}, 1), (object(), 3)])
def test_models_are_asked_once_unless_an_object_might_change(notes: Any, times: int) -> None:
    model = BetweenBlocks(notes)
    with streams(model, [{"x": torch.randn(2, 4)}]) as running:
        for _ in range(3):
            running.inputs(0)
    assert model.asked == times


@torch.no_grad()
def test_the_dense_model_gives_inputs_where_it_is_asked_to() -> None:
    sparse, dense = TINY["llama"](0), TINY["llama"](1)
    batches = prepare_calibration(sparse, texts(rows=2), "test", rows_per_batch=2)
    found = {}
    for stream in ("sparse", "dense", "sparse_to_dense"):
        sides = ((sparse, find_blocks(sparse)), (dense, find_blocks(dense)))
        with Streams(stream, *sides, batches, device="cpu", dense_device="cpu", keep=torch.clone) as running:
            found[stream] = (running.inputs(0), running.dense_inputs(0), running.is_dense)
    ours, theirs = (next(iter(block_calls(model, batches[0]).values()))[:2] for model in (sparse, dense))
    assert same(found["sparse"][:2], (ours, ours)) and not found["sparse"][2]
    assert same(found["dense"][:2], (theirs, theirs)) and found["dense"][2]
    assert same(found["sparse_to_dense"][:2], (ours, theirs)) and not found["sparse_to_dense"][2]
