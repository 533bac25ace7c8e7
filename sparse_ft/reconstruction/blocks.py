"""Reconstruct the blocks of a model one after the other: the driver behind `reconstruct` and `reconstruct_checkpoint`.

    for each block, in the order the model calls them:
        run the DENSE block once on all batches: the targets of its windows
        for each window:
            e0 = its error; train it; merge, cast back; e1 = its error
            keep the result if e1 < e0, else the weights it had
        run the block as it is now: its outputs are the inputs of the next block

How windows are run is in `pieces.py`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparse_ft.masks import MaskSet, keep_bits, mask_
from sparse_ft.models import find_blocks
from sparse_ft.pruning import named_generator
from sparse_ft.reconstruction.optimise import multiplies_bfloat16, train_window
from sparse_ft.reconstruction.pieces import Piece, Pieces
from sparse_ft.reconstruction.settings import Settings
from sparse_ft.reconstruction.streams import Streams
from sparse_ft.reconstruction.trained import TrainedWindow
from sparse_ft.reconstruction.windows import Window, find_windows


@dataclass(frozen=True)
class WindowResult:
    """What became of one window.

    Attributes:
        block: canonical name of its block.
        window: `"attn"`, `"mlp"`, `"block"`, or the path of a matrix in the block.
        loss_before: mean squared error before, on at most 16 calibration batches, spread evenly.
        loss_after: on the same batches, of the weights that the model has now.
        iterations: training steps made.
        improved: False if training did not lower the error, so that the window has the weights it had before.
    """

    block: str
    window: str
    loss_before: float
    loss_after: float
    iterations: int
    improved: bool


class BlockReconstruction:
    """One run over the blocks of a model.

    Args:
        model: what is reconstructed, in place.
        dense: the model it was pruned from.
        masks: of the model; their weights are exactly zero where they say so.
        groups: canonical names of other parameters to train.
        batches: keyword arguments of the model's forward, each of one training step.
        settings: checked arguments.
        device: where blocks are trained.
        dense_device: where the dense model is.
        keep: turns an activation into the copy that is held.

    Attributes:
        learning_rate: at its peak.
        autocast: whether training steps multiply in bfloat16; with fp32 weights the passes without training do, too.
        rows: what became of the windows.
        whole: blocks that have no cut between attention and MLP, where one was asked for.
        skipped: blocks that the model never called.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        masks: MaskSet,
        groups: frozenset[str],
        batches: Sequence[dict[str, Any]],
        settings: Settings,
        *,
        device: torch.device | str,
        dense_device: torch.device | str,
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        self._blocks, self._dense_blocks = find_blocks(model), find_blocks(dense)
        self._masks, self._groups, self._settings, self._keep = masks, groups, settings, keep
        given = settings.learning_rate
        self.learning_rate = settings.train.learning_rate(masks) if given is None else given
        self._device = torch.device(device)
        stored = {parameter.dtype for _, block in self._blocks for parameter in block.parameters()}
        fast = torch.bfloat16 in stored or multiplies_bfloat16(self._device)
        self.autocast = fast if settings.autocast is None else settings.autocast
        self._narrow_passes = self.autocast and stored == {torch.float32}
        self._count = len(batches)
        self._streams = Streams(
            settings.stream, (model, self._blocks), (dense, self._dense_blocks), batches,
            device=device, dense_device=dense_device, keep=keep,
        )  # fmt: skip
        masked = masks if settings.train.weights is not None else ()
        names = [*masked, *sorted(groups)]
        prefixes = {name: f"{name}." for name, _ in self._blocks}
        self._trained = {
            block: [n.removeprefix(prefix) for n in names if n.startswith(prefix)] for block, prefix in prefixes.items()
        }
        self._name = ""
        self.rows: list[WindowResult] = []
        self.whole: list[str] = []
        self.skipped: list[str] = []

    def run(
        self,
        *,
        load: Callable[[str], None] = lambda name: None,
        finish: Callable[[str, Sequence[str]], None] = lambda name, changed: None,
    ) -> None:
        """Reconstruct all blocks.

        Args:
            load: called with a block's name before it is run: both models' blocks must have their weights then.
            finish: called with a block's name and the names of the parameters that may have changed.
        """
        left = {name: index for index, (name, _) in enumerate(self._blocks)}
        with self._streams, self._bar() as bar:
            while any(self._trained[name] for name in left):
                index = self._streams.next_block()
                if index is None:
                    break
                self._name = name = self._blocks[index][0]
                del left[name]
                load(name)
                more = any(self._trained[other] for other in left)
                with self._products():
                    self._block(index, more, bar)
                finish(name, [f"{name}.{trained}" for trained in self._trained[name]])
        self.skipped = [name for name in left if self._trained[name]]
        self._warn()

    def _products(self) -> AbstractContextManager[Any]:
        """Targets and errors of fp32 weights are computed with the products of their training."""
        if not self._narrow_passes:
            return nullcontext()
        # Casts are not cached: a cached one would outlive the training step that changed the weight.
        return torch.autocast(self._device.type, dtype=torch.bfloat16, cache_enabled=False)

    def _bar(self) -> Any:
        count = sum(1 for names in self._trained.values() if names)
        return tqdm(total=count, desc="reconstruct", unit="window", delay=2, disable=not self._settings.progress)

    def _warn(self) -> None:
        if self.whole:
            warnings.warn(
                f"{len(self.whole)} blocks run attention and MLP side by side, or have no attention, and were "
                f"reconstructed as a whole, the first of them '{self.whole[0]}'.",
                stacklevel=4,
            )
        if self.skipped:
            warnings.warn(
                f"{len(self.skipped)} blocks were never called for this calibration data and are as before, the first "
                f"of them '{self.skipped[0]}'.",
                stacklevel=4,
            )

    def _block(self, index: int, more: bool, bar: Any) -> None:
        """Reconstruct one block, and pass its outputs on if `more` blocks follow."""
        advanced = False
        if self._trained[self._name]:
            if not self.rows:
                self._streams.check_called_once(index)
            windows = self._windows(index)
            bar.total += len(windows) - 1
            pieces = Pieces(
                index, self._blocks[index][1], self._dense_block(index), self._streams, self._count,
                device=self._device, keep=self._keep, more=more,
            )  # fmt: skip
            for piece in pieces.of(windows):
                if any(piece.window.owns(name) for name in self._trained[self._name]):
                    self.rows.append(self._fit(index, piece))
                else:
                    piece.after()
                bar.update()
            advanced = pieces.advanced
        if more and not advanced:
            self._streams.advance(index)
        if more:
            self._streams.advance_target(index)

    def _windows(self, index: int) -> list[Window]:
        """The windows of a block up to the last one with something to train."""
        trained = self._trained[self._name]
        matrices = [name for name in trained if f"{self._name}.{name}" in self._masks]
        block, granularity = self._blocks[index][1], self._settings.granularity
        windows = find_windows(block, partial(self._streams.inputs, 0), granularity, matrices)
        if granularity == "attn_mlp" and len(windows) == 1:
            self.whole.append(self._name)
        while windows and not any(windows[-1].owns(name) for name in trained):
            windows.pop()
        return windows

    def _dense_block(self, index: int) -> nn.Module:
        dense = self._dense_blocks[index][1]
        here = all(parameter.device == self._device for parameter in dense.parameters())
        return dense if here else deepcopy(dense).to(self._device)

    def _fit(self, index: int, piece: Piece) -> WindowResult:
        """Train one window; keep the result if its error, merged and in the model's dtype, is lower."""
        before, steps = piece.before(), 0
        if piece.batches and math.isfinite(before) and before > 0 and self._settings.iterations != 0:
            values, steps = self._train(index, piece, before)
            previous = self._put(index, values)
            after = piece.after()
            if after < before:
                return WindowResult(self._name, piece.window.name, before, after, steps, True)
            for parameter, value in previous:
                parameter.data.copy_(value)
        piece.after()
        return WindowResult(self._name, piece.window.name, before, before, steps, False)

    def _train(self, index: int, piece: Piece, before: float) -> tuple[dict[str, Tensor], int]:
        """The values of the window's parameters by name in the block, in fp32, and the number of steps."""
        how, key = self._settings, f"{self._name}.{piece.window.name}"
        module, names, forward = piece.working()
        ours = {own: name for own, name in names.items() if piece.window.owns(name)}
        canonical = {own: f"{self._name}.{name}" for own, name in ours.items()}
        masks = {own: self._masks[name] for own, name in canonical.items() if name in self._masks}
        groups = [own for own, name in canonical.items() if name in self._groups]
        seed = named_generator(how.seed, key).initial_seed()
        trained = TrainedWindow(module, how.train.weights, masks, groups, r=how.r, lora_alpha=how.lora_alpha, seed=seed)
        steps = 0
        if trained.parameters:
            steps = train_window(
                trained.parameters, forward, piece.target, piece.batches,
                iterations=len(piece.batches) if how.iterations is None else how.iterations,
                learning_rate=self.learning_rate, generator=named_generator(how.seed, key), warmup=how.warmup,
                before=before, autocast=torch.bfloat16 if self.autocast else None,
            )  # fmt: skip
        return {ours[own]: value for own, value in trained.finish().items()}, steps

    @torch.no_grad()
    def _put(self, index: int, values: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Cast values into the block's parameters, pruned weights exactly zero; the parameters and what they held."""
        previous = []
        for name, value in values.items():
            parameter = self._blocks[index][1].get_parameter(name)
            previous.append((parameter, parameter.detach().clone()))
            parameter.data.copy_(value)
            if f"{self._name}.{name}" in self._masks:
                mask_(parameter.data, keep_bits(self._masks[f"{self._name}.{name}"].to(parameter.device)))
        return previous
