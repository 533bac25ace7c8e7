"""The tensors of a checkpoint under the names and shapes they have in the model, read when they are needed.

transformers stores some tensors under other names than the model uses, and some in other pieces: Mixtral's files hold
one tensor per expert, the model one stack of all. Its own conversion rules lead from one to the other and back; here
they are applied to the few tensors that belong together instead of a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from sparse_ft.checkpoints import CheckpointReader


class CannotStream(Exception):
    """The checkpoint's layout cannot be converted piece by piece; the message says why."""


@dataclass(frozen=True)
class Piece:
    """Stored tensors that are converted together, and the model's tensors they become.

    Attributes:
        stored: names in the checkpoint.
        live: names in the model.
        patterns: the conversion rule's pattern of each stored name; None when they are only renamed.
        first: the live name the rule is keyed by.
    """

    stored: tuple[str, ...]
    live: tuple[str, ...]
    patterns: tuple[str | None, ...]
    first: str


class StoredWeights:
    """Access to a checkpoint by the model's own names.

    Args:
        model: the model with parameters on the meta device, in the dtypes they are to have.
        reader: the checkpoint.
        device: where tensors are put.

    Attributes:
        pieces: all pieces, in the order of their stored names.
        piece_of: the piece of each live name.

    Raises:
        ValueError: if a tensor of the model is not in the checkpoint, or has another shape there.
        CannotStream: if the conversion back would not give the names that are stored.
    """

    def __init__(self, model: Any, reader: CheckpointReader, device: torch.device | str = "cpu") -> None:
        self._model = model
        self._reader = reader
        self._device = device
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._dtypes = _intended_dtypes(model)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self.pieces = self._find_pieces()
        self.piece_of = {name: piece for piece in self.pieces for name in piece.live}
        model._weight_conversions = [transform for transform in transforms if transform.was_used()]
        self._check_complete()
        self._check_reversible()

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """The live tensors of a piece, in the model's dtypes."""
        dtype = self._dtypes.get(piece.first)
        tensors = []
        for name in piece.stored:
            tensor = self._reader.get(name)
            tensors.append(tensor.to(self._device, dtype if tensor.is_floating_point() else None))
        return self._convert(piece.first, piece.stored, piece.patterns, tensors)

    def revert(self, piece: Piece, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors of a piece, in their stored dtypes, given all its live tensors."""
        if piece.patterns == (None,):
            stored = {piece.stored[0]: live[piece.live[0]]}
        else:
            prefix = f"{self._model.base_model_prefix}."
            stored = {
                name if name in piece.stored else name.removeprefix(prefix): tensor
                for name, tensor in revert_weight_conversion(self._model, dict(live)).items()
            }
        return {name: tensor.to(self._reader.dtype(name)) for name, tensor in stored.items() if name in piece.stored}

    def _find_pieces(self) -> list[Piece]:
        found: dict[str, list[tuple[str, str | None]]] = {}
        prefix, meta = self._model.base_model_prefix, self._shapes
        for name in sorted(self._reader.names(), key=dot_natural_key):
            live, pattern = rename_source_key(name, self._renamings, self._converters, prefix, meta)
            if live not in meta and name in meta:
                live, pattern = rename_source_key(name, [], [], base_model_prefix=prefix, meta_state_dict=meta)
            if live in meta:
                found.setdefault(live, []).append((name, pattern))
        return [self._make_piece(live, members) for live, members in found.items()]

    def _make_piece(self, first: str, members: Sequence[tuple[str, str | None]]) -> Piece:
        stored = tuple(name for name, _ in members)
        patterns = tuple(pattern for _, pattern in members)
        shapes = [self._reader.shape(name) for name in stored]
        try:
            live = self._convert(first, stored, patterns, [torch.empty(shape, device="meta") for shape in shapes])
        except Exception as error:  # whatever a conversion rule of transformers raises
            raise CannotStream(f"'{stored[0]}' cannot be converted by itself ({error})") from error
        for name, tensor in live.items():
            if name in self._shapes and tensor.shape != self._shapes[name]:
                raise ValueError(
                    f"'{name}' has shape {tuple(tensor.shape)} in the checkpoint but {tuple(self._shapes[name])} in "
                    f"the model its config.json describes; the two do not belong together."
                )
        return Piece(stored, tuple(live), patterns, first)

    def _convert(
        self, first: str, stored: Sequence[str], patterns: Sequence[str | None], tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        if patterns[0] is None:
            return {first: tensors[0]}
        rule = deepcopy(self._by_pattern[patterns[0]])
        for name, pattern, tensor in zip(stored, patterns, tensors, strict=True):
            rule.add_tensor(first, name, pattern, tensor)
        live = rule.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in live.items()}

    def _check_complete(self) -> None:
        missing = [tied[0] for tied in _tied_names(self._model) if not any(name in self.piece_of for name in tied)]
        if missing:
            raise ValueError(
                f"'{self._reader.path}' lacks {len(missing)} tensors of {type(self._model).__name__}, among them "
                f"'{missing[0]}'; the checkpoint is incomplete or belongs to another architecture."
            )

    def _check_reversible(self) -> None:
        for piece in self.pieces:
            if piece.patterns == (None,):
                continue
            live = {name: torch.empty(self._shapes[name], device="meta") for name in piece.live}
            try:
                shapes = {name: tuple(tensor.shape) for name, tensor in self.revert(piece, live).items()}
            except Exception as error:  # as above
                raise CannotStream(f"'{piece.first}' cannot be converted back by itself ({error})") from error
            if shapes != {name: self._reader.shape(name) for name in piece.stored}:
                raise CannotStream(f"'{piece.first}' does not convert back to the tensors that are stored")


class LiveModel:
    """Puts stored tensors into a model on the meta device, and takes them out again.

    Parameters outside the blocks (embeddings, a norm between two stacks) are put in when their module is first called,
    so what the forward never uses is never read. Tied parameters are put in everywhere they are tied.

    Args:
        model: with parameters on the meta device.
        blocks: its blocks, as (name, module).
        weights: where tensors come from.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], weights: StoredWeights) -> None:
        self._weights = weights
        self._buffers = {name: _owner(model, name) for name, _ in model.named_buffers()}
        self._places = {name: _owner(model, name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self._tied = {name: names for names in _tied_names(model) for name in names}
        inside = {id(module) for _, block in blocks for module in block.modules()}
        self._hooks = [
            module.register_forward_pre_hook(self._fetch_before(prefix))
            for prefix, module in model.named_modules()
            if id(module) not in inside and module._parameters
        ]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def fetch(self, prefix: str, *, recurse: bool = True) -> None:
        """Put in the parameters and saved buffers under a module's name, but for those that are there."""
        start = f"{prefix}." if prefix else ""
        absent = [n for n, place in self._places.items() if getattr(*place).is_meta]
        names = [n for n in [*absent, *self._buffers] if n.startswith(start)]
        wanted = [n for n in names if recurse or "." not in n[len(start) :]]
        for piece in {self._piece(name) for name in wanted}:
            if piece is not None:
                for name, tensor in self._weights.read(piece).items():
                    self._install(name, tensor)

    def drop(self, prefix: str) -> None:
        """Put the parameters under a module's name back on the meta device, but for those tied to others outside."""
        start = f"{prefix}."
        for name, (module, attribute) in self._places.items():
            if name.startswith(start) and all(other.startswith(start) for other in self._tied[name]):
                empty = torch.empty_like(getattr(module, attribute), device="meta")
                setattr(module, attribute, nn.Parameter(empty, requires_grad=False))

    def tensors_of(self, piece: Piece) -> dict[str, Tensor]:
        """The tensors of a piece as they are in the model now."""
        return {name: getattr(*(self._places.get(name) or self._buffers[name])).detach() for name in piece.live}

    def _piece(self, name: str) -> Piece | None:
        names = self._tied.get(name, [name])
        return next((self._weights.piece_of[n] for n in names if n in self._weights.piece_of), None)

    def _install(self, name: str, tensor: Tensor) -> None:
        if name in self._places:
            parameter = nn.Parameter(tensor, requires_grad=False)
            for tied in self._tied[name]:
                setattr(*self._places[tied], parameter)
        elif name in self._buffers:
            setattr(*self._buffers[name], tensor)

    def _fetch_before(self, prefix: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
                self.fetch(prefix, recurse=False)

        return hook


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter: several when it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _intended_dtypes(model: Any) -> dict[str, torch.dtype]:
    """The dtype each tensor of the model gets when transformers loads it: some parts stay in fp32."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    if plan:
        alternation, pattern_of, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            match = alternation.search(name)
            if match is not None:
                dtypes[name] = plan[pattern_of[match.lastgroup]]
    return dtypes
