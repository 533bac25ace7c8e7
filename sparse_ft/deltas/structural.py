"""Structural pruning of deltas: drop whole rows, columns, or neurons across the tensors that share them, and rescale.

    kept_g ~ Bernoulli(density) for each structure g        delta' = kept * delta / q        q = density unless given

A row is an output neuron: dropped, it computes what it did in the base model. A column is an input. A neuron of a feed-
forward layer is a row of the first projections (gate and up, with their biases) and a column of the last (down); all of
them are kept or dropped together. As with `dare`, q = density keeps the expectation and a larger q trades it for less
noise, which matters more here: what is dropped together adds up.

Example:
    >>> structural_delta(delta, density=0.1, seed=0, name="layers.0.mlp.up_proj.weight", axis="row")
    >>> for group in neuron_groups(model):
    ...     pruned |= drop_neurons(deltas, group, density=0.1, seed=0)

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, structural DPP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparse_ft.deltas.checks import check_delta, check_scale, number_kept
from sparse_ft.deltas.random_mask import check_density, random_keep
from sparse_ft.models import Target, find_targets, named_weights

_DRAW_BITS = 53  # fair bits per structure when a count is drawn: two are equal once in 10^16, and then position decides


@dataclass(frozen=True)
class NeuronGroup:
    """Tensors that share neurons.

    Attributes:
        name: key of the group's mask, the module that holds the tensors.
        size: number of neurons.
        outputs: name -> axis: tensors with one slice per neuron that compute it (gate, up and their biases).
        inputs: name -> axis: tensors with one slice per neuron that read it (down).

    Example:
        >>> NeuronGroup("mlp", 48, {"mlp.gate.weight": 0, "mlp.up.weight": 0}, {"mlp.down.weight": 1})
    """

    name: str
    size: int
    outputs: Mapping[str, int]
    inputs: Mapping[str, int]


def structural_keep(count: int, *, density: float, seed: int, name: str, role: str = "", exact: bool = False) -> Tensor:
    """Bool mask (count,), True = keep, over structures.

    Args:
        count: number of structures.
        density: probability that one is kept, 0..1.
        seed: of the mask.
        name: of the tensor or group; part of the mask's key.
        role: tells masks of one name apart.
        exact: draw exactly round(density * count) without replacement instead of each on its own.

    Raises:
        ValueError: a density outside 0..1.

    Example:
        >>> int(structural_keep(10, density=0.3, seed=0, name="mlp", exact=True).sum())
        3
    """
    density = check_density(density)
    if not exact:
        return torch.from_numpy(random_keep(count, density, seed=seed, name=name, role=role))
    bits = random_keep(count * _DRAW_BITS, 0.5, seed=seed, name=name, role=role).reshape(count, _DRAW_BITS)
    draws = bits @ (np.int64(1) << np.arange(_DRAW_BITS, dtype=np.int64))
    keep = np.zeros(count, dtype=np.bool_)
    keep[np.argsort(draws, kind="stable")[: number_kept(count, density)]] = True
    return torch.from_numpy(keep)


@torch.no_grad()
def structural_delta(
    delta: Tensor,
    *,
    density: float,
    seed: int = 0,
    name: str | None = None,
    role: str = "",
    axis: Literal["row", "column"] | int = "row",
    scale: float | None = None,
    exact: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """Drop whole slices of a delta at random and divide the kept ones by the scale.

    Args:
        delta: (out, in); unchanged. Or any shape, with `axis` as a number.
        density: probability that a slice is kept, 0..1.
        seed: of the mask.
        name: key of the mask, the tensor's or a group's name. Not needed with `keep`.
        role: tells masks of one name apart.
        axis: "row" drops output neurons, "column" inputs; a number is the axis along which slices are counted.
        scale: q, what kept entries are divided by; None = density.
        exact: keep exactly round(density * slices).
        keep: (slices,) bool mask instead of the drawn one.

    Returns:
        fp32 tensor of the shape of `delta`.

    Raises:
        ValueError: a density outside 0..1, a scale that is not positive, another axis, neither name nor mask, a mask of
            another size, an integer tensor, or NaN or infinite entries.

    Example:
        >>> structural_delta(torch.ones(2, 2), density=0.5, keep=torch.tensor([True, False]))
        tensor([[2., 2.],
                [0., 0.]])
    """
    density = check_density(density)
    largest = check_delta(delta, name)
    dim = _axis(axis, delta)
    count = delta.shape[dim]
    if scale is not None:
        scale = check_scale(scale, largest)
    if keep is None:
        if name is None:
            raise ValueError("structural_delta needs name, the key of the random mask, or keep, the mask; got neither.")
        keep = structural_keep(count, density=density, seed=seed, name=name, role=role, exact=exact)
    if keep.dtype != torch.bool or keep.shape != (count,):
        raise ValueError(f"keep is {keep.dtype} {tuple(keep.shape)}; pass a torch.bool mask of the {count} slices.")
    if density == 0.0:
        return torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
    divisor = torch.tensor(check_scale(density if scale is None else scale, largest), device=delta.device)
    shape = [count if index == dim else 1 for index in range(delta.ndim)]
    return torch.where(keep.to(delta.device).view(shape), delta.float() / divisor, 0.0)


def drop_neurons(
    deltas: Mapping[str, Tensor],
    group: NeuronGroup,
    *,
    density: float,
    seed: int = 0,
    role: str = "",
    scale: float | None = None,
    exact: bool = False,
) -> dict[str, Tensor]:
    """Drop neurons across all tensors of a group, with one mask, and divide what is kept by the scale.

    Args:
        deltas: finetuned - base by tensor name; those of the group are used and unchanged.
        group: which tensors share the neurons, and along which axis.
        density: probability that a neuron is kept, 0..1.
        seed: of the mask; together with the group's name it is the key.
        role: tells masks of one group apart.
        scale: q; None = density.
        exact: keep exactly round(density * size) neurons.

    Returns:
        fp32 tensors by name, those of the group only.

    Raises:
        ValueError: a tensor of the group is missing or has another number of neurons, or as `structural_delta`.

    Example:
        >>> pruned = drop_neurons(deltas, neuron_groups(model)[0], density=0.1, seed=0)
    """
    members = {**group.outputs, **group.inputs}
    for name, axis in members.items():
        if name not in deltas:
            raise ValueError(f"'{name}' of the group '{group.name}' is not among the {len(deltas)} deltas; add it.")
        shape = deltas[name].shape
        if not -len(shape) <= axis < len(shape) or shape[axis] != group.size:
            raise ValueError(
                f"'{name}' has shape {tuple(shape)} but '{group.name}' has {group.size} neurons on its axis {axis}."
            )
    keep = structural_keep(group.size, density=density, seed=seed, name=group.name, role=role, exact=exact)
    return {
        name: structural_delta(deltas[name], density=density, name=name, axis=axis, scale=scale, keep=keep)
        for name, axis in members.items()
    }


def neuron_groups(model: nn.Module) -> list[NeuronGroup]:
    """The neurons of a model's feed-forward layers, found by structure.

    A group is one projection that reads I features, and the one or two defined before it that make I features out of as
    many as the last one gives, I being another number. They lie in the same module, or, for projections that are alone
    in theirs (BERT's), in the same block. Experts stacked in one tensor are not listed.

    Args:
        model: any transformers model.

    Raises:
        ValueError: if the model has no prunable weight at all; see `find_targets`.

    Example:
        >>> [group.name for group in neuron_groups(llama)]
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    weights = named_weights(model)
    siblings: dict[str, list[Target]] = defaultdict(list)
    for target in find_targets(model):
        if target.kind != "experts":
            siblings[target.module.rpartition(".")[0]].append(target)
    alone: dict[str, list[Target]] = defaultdict(list)
    groups = []
    for parent, targets in siblings.items():
        if len(targets) == 1:
            alone[targets[0].block].extend(targets)
        else:
            groups.extend(_groups_of(parent, targets, weights))
    for block, targets in alone.items():
        square = [t for t in targets if t.in_features == _out_features(t)]  # what attention's values go through
        groups.extend(_groups_of(block, [t for t in targets if t not in square], weights))
    return groups


def _groups_of(parent: str, targets: list[Target], weights: Mapping[str, Tensor]) -> list[NeuronGroup]:
    groups = []
    for index, last in enumerate(targets):
        inner, outer = last.in_features, _out_features(last)
        readers = [t for t in targets if t.in_features == inner]
        makers = [t for t in targets[:index] if _out_features(t) == inner]
        if inner == outer or len(readers) != 1 or len(makers) not in (1, 2):
            continue
        if any(maker.in_features != outer for maker in makers):
            continue
        if any(t.in_features == outer and t not in makers for t in targets):
            continue  # attention whose keys are narrower than its queries: heads, not neurons
        outputs = {maker.name: 1 - maker.input_dim for maker in makers}
        outputs |= {bias: 0 for maker in makers if (bias := f"{maker.module}.bias") in weights}
        groups.append(NeuronGroup(parent, inner, outputs, {last.name: last.input_dim}))
    return groups


def _out_features(target: Target) -> int:
    return target.shape[1 - target.input_dim]


def _axis(axis: str | int, delta: Tensor) -> int:
    dim = {"row": 0, "column": 1}.get(axis, axis) if isinstance(axis, str) else axis
    if not isinstance(dim, int) or not -delta.ndim <= dim < delta.ndim:
        raise ValueError(
            f"axis is {axis!r} and the delta has shape {tuple(delta.shape)}; use 'row', 'column' or one of its axes."
        )
    return dim % delta.ndim
