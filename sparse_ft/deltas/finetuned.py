"""The two things a delta is taken from, alike: a fine-tuned checkpoint, or a LoRA adapter on top of the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader, resolve_checkpoint
from sparse_ft.checkpoints.resolve import ADAPTER_CONFIG_FILE, CONFIG_FILE
from sparse_ft.deltas.lora import LoraAdapter, load_lora
from sparse_ft.deltas.scope import find_tied, headers_of


class FinetunedCheckpoint:
    """A fine-tune with all its weights.

    Attributes:
        directory: where it lies.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reader = CheckpointReader(directory)

    def headers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor."""
        return headers_of(self._reader)

    def tied(self) -> Sequence[Sequence[str]]:
        """Groups of names that hold the same tensor."""
        return find_tied(self._reader)

    def changes(self, name: str) -> bool:
        """Whether the tensor may differ from the base's."""
        return True

    def delta(self, name: str, base: Tensor) -> Tensor:
        """finetuned - base on the base's leading rows, fp32."""
        tensor = self._reader.get(name)
        tensor = tensor[: len(base)] if base.ndim else tensor
        return tensor.float() - base.float()

    def whole(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        return self._reader.get(name)


class FinetunedAdapter:
    """A base with a LoRA adapter on top: only what the adapter changes differs.

    Attributes:
        directory: of the adapter.
    """

    def __init__(self, directory: Path, adapter: LoraAdapter, base: CheckpointReader) -> None:
        self.directory, self._adapter, self._base = directory, adapter, base
        adapter.check_base(base)
        for name, target in adapter.targets.items():
            if target.shape != base.shape(name):
                raise ValueError(
                    f"'{name}' has shape {base.shape(name)} in the base but the adapter '{directory}' is for "
                    f"{target.shape}; give the base it was trained on."
                )

    def headers(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor; what the base has keeps the base's dtype."""
        found = headers_of(self._base)
        for name in self._adapter.whole:
            dtype = self._base.dtype(name) if name in self._base else self._adapter.dtype(name)
            found[name] = (dtype, self._adapter.shape(name))
        return found

    def tied(self) -> Sequence[Sequence[str]]:
        """Tensors the base ties and the adapter leaves alone; two it changes apart are no longer tied."""
        changed = {*self._adapter.targets, *self._adapter.whole}
        return [group for group in find_tied(self._base) if not changed & set(group)]

    def changes(self, name: str) -> bool:
        """Whether the adapter changes the tensor."""
        return name in self._adapter.targets or name in self._adapter.whole

    def delta(self, name: str, base: Tensor) -> Tensor:
        """What the adapter adds, fp32."""
        if name in self._adapter.targets:
            return self._adapter.delta(name, base)
        tensor = self._adapter.replacement(name)
        return (tensor[: len(base)] if base.ndim else tensor).float() - base.float()

    def whole(self, name: str) -> Tensor:
        """The merged tensor, or the one trained whole, in its dtype."""
        if name in self._adapter.whole:
            return self._adapter.replacement(name).to(self.headers()[name][0])
        base = self._base.get(name)
        if name not in self._adapter.targets:
            return base
        return (base.float() + self._adapter.delta(name, base)).to(base.dtype)


def open_finetuned(path: str | Path, base: CheckpointReader) -> FinetunedCheckpoint | FinetunedAdapter:
    """Open a checkpoint, or an adapter if that is what the directory holds.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it cannot be read, or does not fit the base.
    """
    directory = Path(path)
    if (directory / ADAPTER_CONFIG_FILE).is_file() and not (directory / CONFIG_FILE).is_file():
        return FinetunedAdapter(directory, load_lora(directory), base)
    return FinetunedCheckpoint(resolve_checkpoint(path))
