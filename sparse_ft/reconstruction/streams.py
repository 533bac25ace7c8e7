"""Where the inputs of a block come from, and the inputs its targets are computed from.

| stream | a block's input | its target |
|---|---|---|
| `sparse` | from the blocks reconstructed before it | what the dense block makes of that same input |
| `dense` | from the dense model | what the dense block makes of that same input |
| `sparse_to_dense` | from the blocks reconstructed before it | what the dense block makes of the dense model's input |

With `sparse` every block makes up for its own error, with `sparse_to_dense` also for the error that has piled up before
it. With `dense` the windows do not depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.pruning.replay import BlockReplay, StandIn, StopForward, map_tensors, tensors_in
from sparse_ft.reconstruction.windows import Arguments, first_tensor, is_plain

STREAMS = ("sparse", "dense", "sparse_to_dense")


class Streams:
    """Context manager over one or two models that are run block by block.

    Args:
        stream: one of `STREAMS`.
        sparse: the model that is reconstructed, and its blocks.
        dense: the model it was pruned from, and its blocks in the same order.
        batches: keyword arguments of the models' forward.
        device: where blocks are trained.
        dense_device: where the dense model is.
        keep: turns an activation into the copy that is held.
    """

    def __init__(
        self,
        stream: str,
        sparse: tuple[nn.Module, Sequence[tuple[str, nn.Module]]],
        dense: tuple[nn.Module, Sequence[tuple[str, nn.Module]]],
        batches: Sequence[dict[str, Any]],
        *,
        device: torch.device | str,
        dense_device: torch.device | str,
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        self._device = torch.device(device)
        places = {"sparse": (sparse, device), "dense": (dense, dense_device)}
        self._used = {"sparse": ["sparse"], "dense": ["dense"], "sparse_to_dense": ["sparse", "dense"]}[stream]
        # the first gives the inputs, the last the inputs of the targets
        self._replays = [BlockReplay(*places[one][0], batches, places[one][1], keep=keep) for one in self._used]
        self._blocks_of = [places[one][0][1] for one in self._used]
        self._known: list[dict[int, Arguments]] = [{} for _ in self._replays]  # batch -> arguments of the next block

    def __enter__(self) -> Streams:
        for replay in self._replays:
            replay.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for replay in self._replays:
            replay.__exit__(kind, error, trace)

    @property
    def is_dense(self) -> bool:
        """Whether inputs come from the dense model."""
        return self._used[0] == "dense"

    def next_block(self) -> int | None:
        """Index of the block the models call next; None when they call no other."""
        return self._replays[0].next_block()

    def inputs(self, number: int) -> Arguments:
        """The arguments of the next block for one batch, to be written into at will."""
        return self._arguments(0, number)

    def dense_inputs(self, number: int) -> Arguments:
        """The arguments that the target of a batch is computed from."""
        return self._arguments(-1, number)

    def _arguments(self, place: int, number: int) -> Arguments:
        """Arguments of the next block, asked of the model once; after that they are copies of those.

        A model's masks and position embeddings are mostly the same for every batch, and are held once then.
        """
        known = self._known[place]
        call = known.get(number)
        if call is None:
            call = self._replays[place].arguments(number)
            if is_plain(call):
                call = known[number] = _shared(call, known.get(number - 1))
        args, kwargs = map_tensors(call, lambda tensor: tensor.to(self._device, copy=True))
        return args, kwargs

    def check_called_once(self, index: int) -> None:
        """Refuse a block that stands for several layers.

        Raises:
            RuntimeError: if the model calls it more than once in a forward.
        """
        calls = _CountCalls()
        name, block = self._blocks_of[0][index]
        hook = block.register_forward_pre_hook(calls)
        try:
            self._replays[0].run(index, before_batch=calls.start)
        finally:
            hook.remove()
        if calls.first > 1:
            raise RuntimeError(
                f"The model calls '{name}' {calls.first} times in one forward: layers that share their weights cannot "
                f"be reconstructed one by one; retrain the model with another method."
            )

    def advance(
        self,
        index: int,
        compare: Callable[[int, Tensor], None] = lambda number, result: None,
        output: Callable[[str, int], Any] = lambda path, number: None,
        replayed: Sequence[str] = (),
    ) -> None:
        """Run the block as it is now in the model that gives the inputs; what it returns is what the next ones get.

        It may be run again when its weights have changed.

        Args:
            index: what `next_block` returned.
            compare: called with the number of each batch and the block's hidden states.
            output: what a replayed module returns for a batch.
            replayed: modules of the block that are not run.
        """
        number = 0

        def started(current: int) -> None:
            nonlocal number
            number = current

        def returned(block: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            compare(number, first_tensor(result))

        def answer(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return output(path, number)

        for known in self._known:
            known.clear()
        block = self._blocks_of[0][index][1]
        hook = block.register_forward_hook(returned)
        try:
            with _standing_in(block, replayed, answer):
                self._replays[0].run(index, record=True, before_batch=started)
        finally:
            hook.remove()

    def advance_target(self, index: int) -> None:
        """Run the dense block, where its model is not the one `advance` runs."""
        for replay in self._replays[1:]:
            replay.run(index, record=True)


@contextmanager
def _standing_in(block: nn.Module, paths: Sequence[str], answer: Callable[..., Any]) -> Iterator[None]:
    """Answer the calls of some of a block's own modules inside the `with` block, instead of running them.

    Args:
        block: changed, and changed back at the end.
        paths: of the modules.
        answer: called with a module's path, and the arguments of its call as a tuple and a dictionary.
    """
    modules = {id(block.get_submodule(path)): path for path in paths}
    places = [
        (parent, name, child)
        for parent in block.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in modules
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = StandIn(child, partial(answer, modules[id(child)]))
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def _shared(call: Arguments, other: Arguments | None) -> Arguments:
    """A call with the tensors of the other one wherever they are equal to its own."""
    earlier = iter([] if other is None else list(tensors_in(other)))

    def choose(tensor: Tensor) -> Tensor:
        one = next(earlier, None)
        alike = one is not None and one.shape == tensor.shape and one.dtype == tensor.dtype
        return one if one is not None and alike and torch.equal(one, tensor) else tensor

    args, kwargs = map_tensors(call, choose)
    return args, kwargs


class _CountCalls:
    """Forward pre-hook of a block: counts its calls in the first batch, and stops the others."""

    def __init__(self) -> None:
        self.first = 0
        self._number = 0

    def start(self, number: int) -> None:
        """Say that a batch begins."""
        self._number = number

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if self._number > 0:
            raise StopForward
        self.first += 1
