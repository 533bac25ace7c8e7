"""A live fine-tuned model whose weights can be set to base + pruned delta, many times over, and back bit for bit.

Searching a scale means measuring the model at many scales. Nothing is loaded or copied for it: per mask the weights are
set to the base once, and per scale only the kept entries are written.

Example:
    >>> with DeltaProbe(finetuned, base.state_dict(), density=0.01) as probe:
    ...     probe.prune(0.01, seed=0)        # DARE
    ...     loss = finetuned(**batch).loss
    ...     probe.prune(0.04, seed=0)        # the same mask, another scale
    >>> # here the model is the fine-tuned one again

Casts that `torch.autocast` keeps are cleared at each change, so a measurement under it sees the weights as they are.

Limits: holds a second copy of the fine-tuned weights, and 16 bytes for every kept weight of the masks at hand. Weights
must be whole on this process: gather a sharded model first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft.deltas.checks import check_delta, check_scale
from sparse_ft.deltas.dare import add_delta, dare
from sparse_ft.deltas.random_mask import check_density, random_positions
from sparse_ft.models import canonical_name, named_weights

_MASKS_HELD = 0.25  # masks of several seeds are held while their densities add up to this; beyond, they are drawn again


class _Kept(NamedTuple):
    positions: Tensor
    base: Tensor
    delta: Tensor


class DeltaProbe:
    """Sets a model's weights to base + kept * delta / q in place, and back.

    Args:
        model: the fine-tuned model; its parameters are changed in place and their identity kept, so tied weights stay
            tied.
        base_state: the base model's tensors by name, on any device; read, never changed.
        density: share of entries that random masks keep, 0..1.
        names: canonical names of the tensors whose deltas are pruned; the others stay fine-tuned. None = every floating
            point parameter that the base has in the same shape; a resized vocabulary is left fine-tuned.
        role: part of the key of random masks. It is not the role of stored deltas, so what is searched with these masks
            is not tuned to the masks that are used later.

    Attributes:
        names: the tensors that are pruned.
        deltas: fp32 deltas by name, computed when they are looked up.

    Raises:
        ValueError: a density outside 0..1, a name that model or base lacks, no common tensor, shapes that differ in
            more than their rows, tensors that share memory with the base, or NaN or infinite entries.

    Example:
        >>> probe = DeltaProbe(finetuned, base.state_dict(), density=0.1)
        >>> probe.prune(0.1, seed=0)
        >>> probe.restore()
    """

    def __init__(
        self,
        model: nn.Module,
        base_state: Mapping[str, Tensor],
        *,
        density: float,
        names: Iterable[str] | None = None,
        role: str = "search",
    ) -> None:
        self.model = model
        self.density = check_density(density)
        self._role = role
        self._live = {name: parameter.detach() for name, parameter in named_weights(model).items()}
        self._base = _aligned_base(model, base_state)
        self.names = tuple(self._common() if names is None else self._requested(names))
        for name in self.names:
            _check_pair(name, self._live[name], self._base[name])
        self._finetuned = {name: self._live[name].clone() for name in self.names}
        self.deltas: Mapping[str, Tensor] = _Deltas(self)
        self._masks: dict[int, dict[str, _Kept]] = {}
        self._seed: int | None = None
        for name in self.names:
            check_delta(self.deltas[name], name)

    def __enter__(self) -> DeltaProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def base(self, name: str) -> Tensor:
        """The base's tensor, as it was given."""
        return self._base[name]

    def finetuned(self, name: str) -> Tensor:
        """The fine-tuned tensor; read only."""
        return self._finetuned[name]

    def kept_delta(self, name: str, *, seed: int = 0) -> Tensor:
        """kept * delta in fp32, unscaled, with the mask that `prune` uses."""
        return dare(self.deltas[name], density=self.density, seed=seed, name=name, role=self._role, scale=1.0)

    @torch.no_grad()
    def prune(self, scale: float | Mapping[str, float], *, seed: int = 0) -> None:
        """Set the weights to base + kept * delta / scale, cast once to the model's dtype.

        Args:
            scale: q of all tensors, or of each by name.
            seed: of the random masks.

        Raises:
            ValueError: a scale that is not positive, or names that are not those of the probe.
        """
        scales = self._scales(scale)
        masks = self._masks_of(seed)
        if self._seed != seed:
            self._set_base()
            self._seed = seed
        for name, kept in masks.items():
            live = self._live[name]
            if self.density == 1.0 and scales[name] == 1.0:
                live.copy_(self._finetuned[name])  # base + (finetuned - base) rounds
                continue
            divisor = torch.tensor(scales[name], device=live.device)
            live.put_(kept.positions, add_delta(kept.base, kept.delta / divisor, dtype=live.dtype))
        torch.clear_autocast_cache()  # autocast keeps casts of weights that need gradients, and sees no write to them

    @torch.no_grad()
    def transform(self, change: Callable[[str, Tensor], Tensor]) -> None:
        """Set the weights to base + change(name, delta) with any pruning of the fp32 deltas.

        Example:
            >>> probe.transform(lambda name, delta: magnitude_delta(delta, density=0.1))
        """
        self._seed = None
        for name in self.names:
            live = self._live[name]
            live.copy_(add_delta(self._base_here(name), change(name, self.deltas[name]), dtype=live.dtype))
        torch.clear_autocast_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights back to the fine-tuned ones, bit for bit."""
        self._seed = None
        for name in self.names:
            self._live[name].copy_(self._finetuned[name])
        torch.clear_autocast_cache()

    def _set_base(self) -> None:
        for name in self.names:
            self._live[name].copy_(self._base[name])

    def _base_here(self, name: str) -> Tensor:
        return self._base[name].to(self._live[name].device)

    def _masks_of(self, seed: int) -> dict[str, _Kept]:
        if seed not in self._masks:
            if (len(self._masks) + 1) * self.density > _MASKS_HELD:
                self._masks.clear()
            self._masks[seed] = {name: self._draw(name, seed) for name in self.names}
        return self._masks[seed]

    def _draw(self, name: str, seed: int) -> _Kept:
        base, finetuned = self._base_here(name), self._finetuned[name]
        drawn = random_positions(finetuned.numel(), self.density, seed=seed, name=name, role=self._role)
        positions = torch.from_numpy(drawn).to(finetuned.device)
        at_base = base.take(positions).float()
        return _Kept(positions, at_base, finetuned.take(positions).float() - at_base)

    def _scales(self, scale: float | Mapping[str, float]) -> dict[str, float]:
        if not isinstance(scale, Mapping):
            return dict.fromkeys(self.names, check_scale(scale))
        if scale.keys() != set(self.names):
            odd = sorted(set(self.names) ^ scale.keys())
            raise ValueError(
                f"There are scales for {len(scale)} tensors but {len(self.names)} are pruned; they differ in "
                f"'{odd[0]}': give one scale per pruned tensor."
            )
        return {name: check_scale(scale[name]) for name in self.names}

    def _common(self) -> list[str]:
        names = []
        for name, live in self._live.items():
            base = self._base.get(name)
            if base is None or not (live.is_floating_point() and base.is_floating_point()):
                continue
            if live.shape == base.shape:
                names.append(name)
            elif live.ndim != base.ndim or live.shape[1:] != base.shape[1:]:
                raise ValueError(
                    f"'{name}' has shape {tuple(live.shape)} in the model and {tuple(base.shape)} in the base; is this "
                    "the base it was fine-tuned from? Leave the tensor out with `names` if so."
                )
        if not names:
            raise ValueError(
                f"None of the model's {len(self._live)} parameters is in the base state of {len(self._base)} tensors; "
                "pass the state dict of the same architecture."
            )
        return names

    def _requested(self, names: Iterable[str]) -> list[str]:
        chosen = [canonical_name(name) for name in names]
        for name in chosen:
            if name not in self._live or name not in self._base:
                where = "model" if name not in self._live else "base state"
                raise ValueError(f"'{name}' is not in the {where}; name tensors that both have.")
        if not chosen:
            raise ValueError("names is empty, so no delta would be pruned; name at least one tensor.")
        return chosen


class _Deltas(Mapping[str, Tensor]):
    """finetuned - base in fp32, computed at each look-up."""

    def __init__(self, probe: DeltaProbe) -> None:
        self._probe = probe

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._probe._finetuned:
            raise KeyError(name)
        return self._probe._finetuned[name].float() - self._probe._base_here(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._probe.names)

    def __len__(self) -> int:
        return len(self._probe.names)


def _aligned_base(model: nn.Module, base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors under the first of the names a tied weight has in the model."""
    base = named_weights(base_state)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical_name(name)
        known = first.setdefault(id(parameter), name)
        if known not in base and name in base:
            base[known] = base[name]
    return base


def _check_pair(name: str, live: Tensor, base: Tensor) -> None:
    if live.shape != base.shape:
        raise ValueError(f"'{name}' has shape {tuple(live.shape)} in the model and {tuple(base.shape)} in the base.")
    if not live.is_floating_point() or not base.is_floating_point():
        raise ValueError(f"'{name}' is {live.dtype} in the model and {base.dtype} in the base; both must be float.")
    if live.is_meta or base.is_meta:
        raise ValueError(f"'{name}' is on the meta device and has no values; load the weights first.")
    if live.numel() and live.data_ptr() == base.data_ptr():
        raise ValueError(f"'{name}' of the base shares its memory with the model; pass a copy of the base's state.")
