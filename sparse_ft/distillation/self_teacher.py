"""A teacher that is the sparse student's own dense original, held in the student's memory wherever the two agree.

What the student does not train and pruning did not change is there already: embeddings, norms, biases, and the kept
values of every pruned weight. The teacher adds the original values of the pruned weights, and copies of what the
student trains:

    original = copy.deepcopy(model)                    # or the directory of the dense checkpoint
    masks = sparse_ft.prune(model, pattern="2:4")
    student = get_peft_model(model, MaskLoraConfig(masks=masks))
    teacher = self_teacher(student, masks, original)
    print(f"{self_teacher_bytes(teacher, student).share:.0%} of a second model's memory")

A pruned weight is rebuilt for each product, see `pruned_values`, bit for bit as it was, and freed after it. It has its
own dtype under autocast too, which then casts it as it would the original's: some modules ask for that dtype.

What is shared is decided when the teacher is made, by `requires_grad`. Whoever writes into a frozen weight of the
student later on moves the teacher along: unfreezing it, merging an adapter into it, pruning it further. Make a new
teacher then. The teacher itself writes into nothing of the student's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.checkpoints import CheckpointReader, resolve_checkpoint
from sparse_ft.distillation.pruned_values import PrunedValues, add_pruned_values
from sparse_ft.distillation.stacks import bare_model
from sparse_ft.masks import MaskSet, mask_
from sparse_ft.masks.bits import unpack_keep_bits
from sparse_ft.masks.blocks import ranges
from sparse_ft.models import canonical_name, load_model, make_skeleton

Source = dict[str, Callable[[], Tensor]]  # the original's tensors by canonical name, read when they are asked for


@dataclass(frozen=True)
class SharedBytes:
    """What a teacher of `self_teacher` holds, in bytes; every tensor counts once, however often it is used.

    Attributes:
        shared: parameters that lie in the student's memory.
        pruned_values: the original values of pruned weights.
        copied: everything else of its own: parameters the student trains, buffers, masks moved to another device.
        dense: parameters and buffers of the dense original.
    """

    shared: int
    pruned_values: int
    copied: int
    dense: int

    @property
    def added(self) -> int:
        """What the teacher takes beyond the student."""
        return self.pruned_values + self.copied

    @property
    def share(self) -> float:
        """`added / dense`."""
        return self.added / max(self.dense, 1)


def self_teacher(
    student: nn.Module, masks: MaskSet, original: str | Path | Mapping[str, Tensor] | nn.Module
) -> PreTrainedModel:
    """The student's dense original as a model of its own, in the student's memory wherever the two agree.

    Its parameters are the student's where those are frozen and have the original's bits and dtype; its pruned weights,
    where they are frozen and have the original's kept values, are rebuilt from the student's, the masks and the
    original's pruned values; everything else is copied from the original. Buffers that the original does not have are
    copies of the student's.

    Args:
        student: a transformers model, or a PeftModel around one. It is not changed, and does not know its teacher.
        masks: of its pruned weights; their bits are shared too.
        original: the dense model, before pruning: a directory with safetensors, opened in the student's dtype and read
            tensor by tensor (as a whole for a moment where transformers stores other tensors than the model has, such
            as single experts); or its tensors by name; or the model itself.

    Returns:
        A model of the class of the student's base, frozen and in eval mode, on the student's device. Pruned weights
        are parametrised: `state_dict()` has their parts, reading `layer.weight` rebuilds it.

    Raises:
        ValueError: the student is quantised, sharded or on several devices; the masks are another model's; a tensor is
            missing in the original or has another shape; or the original is as sparse as the student.
        FileNotFoundError: there is no such directory.

    Example:
        >>> teacher = self_teacher(student, masks, "path/to/dense")
        >>> with torch.no_grad():
        ...     states = teacher(**batch, output_hidden_states=True).hidden_states
    """
    base = bare_model(student)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"The student is a {type(base).__name__}, but its teacher is built from a config: give a transformers "
            f"model, or a PeftModel around one."
        )
    _check_student(base)
    own = _tensors(base)
    for _ in masks.weights_in(own):  # checks names and shapes
        pass
    frozen = {name: tensor for name, tensor in own.items() if not tensor.requires_grad}
    dtype = _main_dtype(frozen) or _main_dtype(own) or torch.float32
    teacher = make_skeleton(type(base), copy.deepcopy(base.config), dtype=dtype)
    source = _open(original, teacher, dtype)
    building = _Building(teacher, frozen, masks, source, next(iter(own.values())).device)
    with torch.no_grad():
        building.fill()
        _place_buffers(teacher, own, source, building.device)
    if building.pruned and not building.dense:
        raise ValueError(
            "All weights that the masks prune are 0 in the original too: give the dense model from before pruning, as "
            "its directory or as a copy.deepcopy made then."
        )
    if getattr(base, "generation_config", None) is not None:
        teacher.generation_config = copy.deepcopy(base.generation_config)
    return teacher.requires_grad_(False).eval()


def self_teacher_bytes(teacher: nn.Module, student: nn.Module) -> SharedBytes:
    """What a teacher costs beyond its student.

    Args:
        teacher: of `self_teacher`.
        student: the one it was made for.

    Example:
        >>> f"{self_teacher_bytes(teacher, student).share:.1%}"
        '53.1%'
    """
    there = {_place(tensor) for tensor in [*student.parameters(), *student.buffers()]}
    restored = [module for module in teacher.modules() if isinstance(module, PrunedValues)]
    there.update(_place(module.bits_of_set) for module in restored)
    values = {_place(module.values) for module in restored}
    parts = values | {_place(tensor) for module in restored for tensor in (module.packed, module.starts)}
    counted = {_place(tensor): tensor.nbytes for tensor in [*teacher.parameters(), *teacher.buffers()]}
    return SharedBytes(
        shared=sum(size for place, size in counted.items() if place in there and place not in parts),
        pruned_values=sum(size for place, size in counted.items() if place in values),
        copied=sum(size for place, size in counted.items() if place not in there and place not in values),
        dense=sum(size for place, size in counted.items() if place not in parts),
    )


@dataclass
class _Building:
    """Puts parameters into an empty teacher; knows afterwards whether the original is dense where masks prune."""

    teacher: PreTrainedModel
    frozen: Mapping[str, Tensor]
    masks: MaskSet
    source: Source
    device: torch.device
    pruned: bool = False
    dense: bool = False

    def fill(self) -> None:
        groups: dict[int, list[str]] = {}
        for name, parameter in self.teacher.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        shapes = {name: tuple(self.teacher.get_parameter(name).shape) for names in groups.values() for name in names}
        stored = {names[0]: next((name for name in names if name in self.source), None) for names in groups.values()}
        missing = next((name for name, found in stored.items() if found is None), None)
        if missing is not None:
            raise ValueError(
                f"The original has no tensor '{missing}', which {type(self.teacher).__name__} needs: give the dense "
                f"model that the student was pruned from."
            )
        for names in groups.values():
            made: list[tuple[Tensor, nn.Parameter]] = []  # tied where the original is, too
            for name in names:
                tensor = self.source[name if name in self.source else str(stored[names[0]])]()
                if tuple(tensor.shape) != shapes[name]:
                    raise ValueError(
                        f"'{name}' has shape {tuple(tensor.shape)} in the original but {shapes[name]} in the student: "
                        f"give the dense model that the student was pruned from."
                    )
                self._make(name, tensor, names, made)

    def _make(self, name: str, tensor: Tensor, names: list[str], made: list[tuple[Tensor, nn.Parameter]]) -> None:
        """One parameter in its place."""
        module, attribute = _owner(self.teacher, name)
        tensor = tensor.detach().to(self.device).contiguous()
        if self._restored(name, tensor, module, attribute, alone=len(names) == 1):
            return
        parameter = next((parameter for other, parameter in made if _same_bits(other, tensor)), None)
        if parameter is None:
            mine = (self.frozen[n] for n in names if n in self.frozen and not self._is_pruned(n))
            same = next((weight.detach() for weight in mine if _same_bits(weight, tensor)), None)
            parameter = nn.Parameter(tensor.clone() if same is None else same, requires_grad=False)
            made.append((tensor, parameter))
        setattr(module, attribute, parameter)

    def _restored(self, name: str, tensor: Tensor, module: nn.Module, attribute: str, *, alone: bool) -> bool:
        """Whether the weight is pruned and could be put together from the student's and the original's pruned values.

        A weight that is not pruned yet, but will be by these masks, may be: of the student only kept values are read.
        """
        if not self._is_pruned(name):
            return False
        packed = self.masks.packed(name)
        values = tensor.view(-1)[unpack_keep_bits(packed.to(self.device), (tensor.numel(),)) == 0]
        self.pruned, self.dense = True, self.dense or bool(values.any())
        weight = self.frozen.get(name)
        if not alone or weight is None or not weight.is_contiguous() or not _same_bits(weight, tensor, packed):
            return False
        add_pruned_values(module, attribute, weight, packed, values)
        return True

    def _is_pruned(self, name: str) -> bool:
        return name in self.masks and self.masks.sparsity(name) > 0


def _open(original: str | Path | Mapping[str, Tensor] | nn.Module, teacher: PreTrainedModel, dtype: Any) -> Source:
    """The original's tensors by the model's names."""
    if isinstance(original, nn.Module):
        return {name: partial(_itself, tensor) for name, tensor in _tensors(bare_model(original)).items()}
    if isinstance(original, Mapping):
        return {canonical_name(key): partial(original.__getitem__, key) for key in original}
    reader = CheckpointReader(resolve_checkpoint(original))
    prefix = f"{teacher.base_model_prefix}."
    names = [n for n, _ in teacher.named_parameters()] + [n for n, _ in teacher.named_buffers()]
    source: Source = {}
    for name in names:
        key = next((key for key in (name, name.removeprefix(prefix)) if key in reader), None)
        if key is not None:
            source[name] = partial(_read, reader, key, _planned_dtype(teacher, name, dtype))
    if all(name in source or _is_tied(teacher, name) for name, _ in teacher.named_parameters()):
        return source
    return _open(load_model(reader.directory, dtype=dtype), teacher, dtype)


def _read(reader: CheckpointReader, key: str, dtype: torch.dtype) -> Tensor:
    tensor = reader.get(key)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    parameter = model.get_parameter(name)
    return sum(other is parameter for _, other in model.named_parameters(remove_duplicate=False)) > 1


def _planned_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype transformers loads a tensor in: some parts of some models stay in fp32."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((wanted for pattern, wanted in plan.items() if f".{pattern}." in f".{name}."), dtype)


def _place_buffers(teacher: PreTrainedModel, own: Mapping[str, Tensor], source: Source, device: torch.device) -> None:
    for name, empty in list(teacher.named_buffers(remove_duplicate=False)):
        if ".parametrizations." in name:
            continue
        buffer = source[name]() if name in source else own.get(name, empty)
        module, attribute = _owner(teacher, name)
        module._buffers[attribute] = buffer.detach().to(device, copy=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by canonical name, tied ones under each name; of modules PEFT trains, the frozen ones."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {canonical_name(name).replace(".original_module.", "."): tensor for name, tensor in named}


def _check_student(base: nn.Module) -> None:
    """Raise ValueError for a student whose tensors cannot be read as they are."""
    devices = set()
    for name, tensor in base.named_parameters():
        name = canonical_name(name)
        if hasattr(tensor, "quant_state") or not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"'{name}' of the student is quantised ({tensor.dtype}), so it shares nothing with the original: load "
                f"the teacher as a checkpoint of its own."
            )
        if hasattr(tensor, "placements") or hasattr(tensor, "ds_id") or tensor.numel() == 0:
            raise ValueError(
                f"'{name}' of the student is sharded among processes: make the teacher before the student is sharded, "
                f"or load it as a checkpoint of its own."
            )
        devices.add(str(tensor.device))
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"The student's weights are on {', '.join(sorted(devices))}: put it on one device, or load the teacher "
            f"as a checkpoint of its own."
        )


def _main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The dtype most of the values have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def _same_bits(one: Tensor, other: Tensor, packed: Tensor | None = None) -> bool:
    """Whether two tensors agree in dtype and every bit, or in those a packed mask keeps."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.detach().reshape(-1) for tensor in (one, other)]
    bits = None if packed is None else packed.to(one.device)
    for start, stop in ranges(one.numel()):
        a, b = (tensor[start:stop] for tensor in flat)
        if bits is not None:
            a, b = (mask_(piece.clone(), bits[start // 8 : -(-stop // 8)]) for piece in (a, b))
        if not torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)):
            return False
    return True


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _place(tensor: Tensor) -> tuple[str, int, int]:
    """Where a tensor lies; empty ones lie nowhere and count nothing."""
    return str(tensor.device), tensor.data_ptr(), tensor.nbytes
