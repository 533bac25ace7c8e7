"""Which tensors of a model are prunable, found by structure and never by a list of model names.

A target is the weight of a `nn.Linear`, of GPT-2's `Conv1D`, or a 3-D tensor of fused experts, inside one of the
model's repeated blocks. Everything outside the blocks (embeddings, heads, final norms) is left alone, and inside them
norms, biases, convolutions, embeddings, routers, single-output gates and weights tied to an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn

from sparse_ft.models.names import canonical_name


@dataclass(frozen=True)
class Target:
    """One prunable weight.

    Attributes:
        name: canonical parameter name, `"model.layers.0.self_attn.q_proj.weight"`.
        module: name of the module that holds it, `"model.layers.0.self_attn.q_proj"`.
        shape: the parameter's own shape; `(out, in)` for linear, `(in, out)` for conv1d, 3-D for experts.
        input_dim: the axis of `shape` along which inputs run.
        block: name of the repeated block it lies in, `"model.layers.0"`.
        kind: `"linear"`, `"conv1d"` or `"experts"`.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    input_dim: int
    block: str
    kind: str

    @property
    def numel(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def in_features(self) -> int:
        """Length of the input dimension."""
        return self.shape[self.input_dim]


def matrix_view(weight: Tensor, input_dim: int) -> Tensor:
    """View a weight with its inputs last: `(o, d)`, or `(E, o, d)` for experts.

    Writing into the view writes into the weight.

    Args:
        weight: `(out, in)`, `(in, out)`, `(E, out, in)` or `(E, in, out)`.
        input_dim: axis of the inputs, as in `Target.input_dim`.
    """
    return weight if input_dim == weight.ndim - 1 else weight.transpose(input_dim, -1)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model, in the order the model defines them, as (canonical name, module).

    Blocks are the entries of the outermost `nn.ModuleList`s whose entries are composite modules with at least one
    linear-like weight inside. An encoder-decoder has those of both stacks, the encoder's first.
    """
    return [(canonical_name(f"{name}.x")[:-2], block) for name, block in _outermost_blocks("", model)]


def _outermost_blocks(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        entries = list(child.named_children()) if isinstance(child, nn.ModuleList) else []
        if entries and all(_is_composite_with_linears(entry) for _, entry in entries):
            yield from ((f"{path}.{index}", entry) for index, entry in entries)
        else:
            yield from _outermost_blocks(f"{path}.", child)


def _is_composite_with_linears(module: nn.Module) -> bool:
    return not _is_linear_like(module) and any(_is_linear_like(m) or _is_experts(m) for m in module.modules())


def _is_linear_like(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear with an (in, out) weight; recognised by name so that masks work without importing transformers.

    A parametrised one is of a class derived from it.
    """
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def _is_experts(module: nn.Module) -> bool:
    """Fused experts: a module holding 3-D weights, one slice per expert, in transformers' experts interface."""
    has_stack = any(p.ndim == 3 for p in module.parameters(recurse=False))
    return has_stack and (hasattr(module, "is_transposed") or "Experts" in type(module).__name__)


def find_targets(model: nn.Module, *, exclude: Sequence[str] = ()) -> list[Target]:
    """List the prunable weights of a model in definition order.

    Args:
        model: any transformers model, also on the meta device or wrapped by PEFT.
        exclude: globs matched against the module's full name or its tail: `"k_proj"`, `"layers.0.*"`.

    Raises:
        ValueError: if the model has no prunable weight, or a glob matches none.

    Example:
        >>> [t.module for t in find_targets(gpt2)][:2]
        ['transformer.h.0.attn.c_attn', 'transformer.h.0.attn.c_proj']
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    targets: list[Target] = []
    seen: set[int] = set()
    for block_name, block in find_blocks(model):
        for name, module in _plain_modules(block_name, block):
            for parameter_name, parameter, input_dim, kind in _weights_of(module):
                if id(parameter) in embeddings or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                shape = _logical_shape(module, parameter)
                targets.append(Target(f"{name}.{parameter_name}", name, shape, input_dim, block_name, kind))
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no prunable weight: no repeated blocks with nn.Linear, Conv1D or experts "
            f"were found; pass a transformers model with such blocks."
        )
    return _without(targets, exclude)


def _plain_modules(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk a block, leaving out routers and whatever an adapter added beside its base layer."""
    name = canonical_name(f"{name}.x")[:-2]
    yield name, module
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        yield from _plain_modules(name, base)
        return
    experts = _number_of_experts(module)
    for child_name, child in module.named_children():
        if not _is_router(child_name, child, experts):
            yield from _plain_modules(f"{name}.{child_name}", child)


def _number_of_experts(module: nn.Module) -> int | None:
    """How many experts the direct children of a mixture-of-experts layer hold, None for any other module."""
    for name, child in module.named_children():
        if _is_experts(child):
            return next(p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3)
        if isinstance(child, nn.ModuleList) and "expert" in name and len(child) > 0:
            return len(child)
    return None


def _is_router(name: str, module: nn.Module, experts: int | None) -> bool:
    """A router (so called, or with one output per expert beside the experts), or a gate with a single output."""
    if "router" in name:
        return True
    module = getattr(module, "base_layer", module)
    if not isinstance(module, nn.Linear):
        return False
    return module.out_features == 1 or (experts is not None and module.out_features == experts)


def _weights_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, int, str]]:
    if _is_linear_like(module):
        kind, input_dim = ("conv1d", 0) if _is_conv1d(module) else ("linear", 1)
        yield "weight", cast(nn.Parameter, module.weight), input_dim, kind
    elif _is_experts(module):
        input_dim = 1 if _is_transposed(module) else 2
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3:
                yield name, parameter, input_dim, "experts"


def _is_transposed(experts: nn.Module) -> bool:
    """True when expert weights are (E, in, out).

    transformers states it as an attribute; where it does not, the hidden size tells: it is the input of the first
    projection and the output of the second.
    """
    stated = getattr(experts, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    stacks = [p.shape for p in experts.parameters(recurse=False) if p.ndim == 3]
    return len(stacks) == 2 and stacks[0][1] == stacks[1][2] and stacks[0][2] != stacks[1][1]


def _logical_shape(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """Quantised linears store packed bytes; their logical shape is (out_features, in_features)."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features)
    return tuple(parameter.shape)


def _without(targets: list[Target], exclude: Sequence[str]) -> list[Target]:
    kept = targets
    for pattern in exclude:
        matched = {t.name for t in targets if _matches(t, pattern)}
        if not matched:
            raise ValueError(
                f"exclude pattern '{pattern}' matches none of the {len(targets)} prunable modules; "
                f"names look like '{targets[0].module}'."
            )
        kept = [t for t in kept if t.name not in matched]
    if not kept:
        given = ", ".join(exclude)
        raise ValueError(
            f"exclude (--exclude) {given} leaves none of the {len(targets)} prunable modules; exclude fewer."
        )
    return kept


def _matches(target: Target, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in (target.module, target.name))
