"""The layers MaskLoRA puts around a linear and around fused experts: PEFT's own LoRA layers, masked.

PEFT keeps naming, devices, saving, switching and deleting of adapters. What is overridden is the mathematics: forward,
the delta, merge and unmerge. Merging adds up in fp32 and rounds once. The kept values of the weight are set aside
meanwhile, so that unmerging restores the weight bit for bit, which W + Δ - Δ does not in any floating point format.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters.mask_lora_function import mask_lora_delta, mask_lora_linear, masked
from sparse_ft.masks import keep_bits, pack_bits


class AdapterMask(nn.Module):
    """The mask of one adapter on one layer, and a fingerprint of mask and base that is saved with A and B.

    The mask is no buffer: DistributedDataParallel would send it around before every forward. The fingerprint is one, so
    that whatever loads the adapter's tensors brings along what they were trained for.

    Args:
        name: parameter the mask belongs to, for messages.
        mask: bool in the layout of the weight.
        weights_digest: `MaskSet.weights_digest` of the base model.
    """

    fingerprint: Tensor

    def __init__(self, name: str, mask: Tensor, weights_digest: str) -> None:
        super().__init__()
        self.name = name
        self.keep = keep_bits(mask)
        bits = pack_bits(mask.cpu()).numpy().tobytes()
        self._made_for = hashlib.sha256(f"{tuple(mask.shape)}|{weights_digest}|".encode() + bits).digest()
        self.register_buffer("fingerprint", torch.frombuffer(bytearray(self._made_for), dtype=torch.uint8))
        self._checked = False

    def bits(self) -> Tensor:
        """`keep_bits` of the mask.

        Raises:
            RuntimeError: if A and B were loaded from an adapter with another mask or another base.
        """
        if not self._checked:
            problem = self.mismatch(self.fingerprint)
            if problem:
                raise RuntimeError(problem)
            self._checked = True
        return self.keep

    def mismatch(self, fingerprint: Tensor) -> str | None:
        """One sentence if a saved fingerprint is not this mask's, else None."""
        if bytes(fingerprint.tolist()) == self._made_for:
            return None
        return (
            f"The adapter's tensors for '{self.name}' were saved with another mask or another base model than this one "
            f"has; load the base they were trained on and the masks saved beside them."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterMask:
        super()._apply(fn, recurse)
        self.keep = fn(self.keep)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}fingerprint")
        problem = None if saved is None else self.mismatch(saved)
        if problem is None:
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            args[-1].append(problem)


class _MaskedLayer(lora.LoraLayer):
    """What both layers share: masks by adapter, and an exact merge and unmerge."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_mask")
    _set_aside: tuple[Tensor, Tensor] | None = None  # bool mask and the weight's values there, while merged

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """No variant of LoRA (DoRA …) is known here."""
        return {(): None}

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; its mask follows by `set_mask`."""
        if not hasattr(self, "lora_mask"):
            self.lora_mask = nn.ModuleDict()
        super().update_layer(adapter_name, *args, **kwargs)

    def set_mask(self, adapter_name: str, mask: AdapterMask) -> None:
        """Give an adapter its mask."""
        self.lora_mask[adapter_name] = mask.to(self._parameter().device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a masked delta has full rank."""
        return False

    def get_delta_weight(self, adapter: str) -> Tensor:
        """c (B A) ∘ m in the layout of the weight, in fp32 (fp64 for fp64 factors)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas of adapters to the weight: summed in fp32, rounded once, pruned weights exactly zero.

        Args:
            safe_merge: refuse a result that is not finite, before the weight is touched.
            adapter_names: which adapters; the active ones by default.

        Raises:
            ValueError: with `safe_merge`, if a merged weight is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        weight = self._parameter().data
        kept, values = self._set_aside or self._values_at(self._bits(names[0]).bool())
        total = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        total[kept] = values.to(total)
        for name in [*self.merged_adapters, *names]:
            total += self.get_delta_weight(name).to(total)
        merged = total.to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging adapter {names} gives weights that are not finite; the adapter is broken.")
        weight.copy_(merged)
        self._set_aside = (kept, values)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the weight as it was before the first merge, bit for bit."""
        if self._set_aside is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self._parameter().data
        kept, values = (t.to(weight.device) for t in self._set_aside)
        weight.zero_()
        weight[kept] = values.to(weight.dtype)
        self._set_aside = None
        self.merged_adapters.clear()

    def _values_at(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return kept, self._parameter().data[kept]

    def _parameter(self) -> nn.Parameter:
        raise NotImplementedError

    def _bits(self, adapter_name: str) -> Tensor:
        if adapter_name not in self.lora_mask:
            raise RuntimeError(
                f"Adapter '{adapter_name}' has no mask on this layer; add it with a MaskLoraConfig(masks=...)."
            )
        mask = self.lora_mask[adapter_name]
        assert isinstance(mask, AdapterMask)
        return mask.bits()

    def _wide(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B in fp32, or fp64 if they are."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), B.to(dtype)


class MaskLoraLinear(_MaskedLayer, lora.Linear):
    """MaskLoRA around `nn.Linear`, weight (out, in), or GPT-2's Conv1D, weight (in, out)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _parameter(self) -> nn.Parameter:
        weight: nn.Parameter = self.get_base_layer().weight
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """c (B A) ∘ m in the layout of the weight, in fp32 (fp64 for fp64 factors)."""
        A, B = self._wide(adapter)
        return mask_lora_delta(A, B, self._bits(adapter), self.scaling[adapter], fan_in_fan_out=self.fan_in_fan_out)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out) with the active adapters."""
        plain = self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None
        names = [] if plain else [name for name in self.active_adapters if name in self.lora_A]
        if names:
            return self._adapted(x, names)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The first adapter is fused with the base layer; more adapters on one layer are added to its output."""
        base = self.get_base_layer()
        # a base layer with hooks (offloading, sharding, statistics) has to be called
        result = base(x) if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base) else None
        for name in names:
            weight, bias = (base.weight, base.bias) if result is None else (None, None)
            A, B = self.lora_A[name].weight, self.lora_B[name].weight
            part = mask_lora_linear(
                x, weight, bias, self._bits(name), A, B, self.scaling[name], fan_in_fan_out=self.fan_in_fan_out
            )
            result = part if result is None else result + part.to(result.dtype)
        assert result is not None
        return result

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Each sample with the adapter named for it; `"__base__"` is none."""
        parts: list[Tensor] = []
        order: list[int] = []
        for name in dict.fromkeys(adapter_names):
            rows = [row for row, its_name in enumerate(adapter_names) if its_name == name]
            parts.append(self._adapted(x[rows], [name]) if name in self.lora_A else self.base_layer(x[rows]))
            order.extend(rows)
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]

    def __repr__(self) -> str:
        return f"mask_{super().__repr__()}"


class ParamWrapper(_MaskedLayer, lora.ParamWrapper):
    """MaskLoRA on a stack of fused experts, (E, out, in) or (E, in, out): one pair A, B and one mask per expert.

    It bears its PEFT parent's name because PEFT, to nest the wrappers of several parameters of one module, recognises
    them by class name. The weight is used inside the model's own experts code, so W + Δ of the stack lives until that
    block's backward pass is done; with activation checkpointing that is one block at a time.
    """

    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self.get_param()
        return parameter

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """c (B A) ∘ m of every expert in the layout of the stack, in fp32 (fp64 for fp64 factors)."""
        A, B = self._wide(adapter)
        return masked(self._product(A, B, adapter), self._bits(adapter))

    def _delta_in(self, dtype: torch.dtype, adapter: str) -> Tensor:
        """The delta for the forward pass: computed in the dtype of the weight, or in autocast's, like any product."""
        A, B = (factor[adapter].weight.to(dtype) for factor in (self.lora_A, self.lora_B))
        return masked(self._product(A, B, adapter), self._bits(adapter)).to(dtype)

    def _product(self, A: Tensor, B: Tensor, adapter: str) -> Tensor:
        """c B A per expert; PEFT stores A as (E·r, in), expert major, and B as (out, r·E), expert minor."""
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = (B * self.scaling[adapter]).view(B.shape[0], -1, self.num_experts)
        swapped = self._did_swap_in_out_features  # the stack is (E, out, in)
        return torch.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", B, A)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        if not names:
            yield
            return
        experts, weight = self.get_base_layer(), self._parameter()
        deltas = [self._delta_in(weight.dtype, name) for name in names]
        parametrize.register_parametrization(experts, self.parameter_name, _Added(sum(deltas[1:], deltas[0])))
        original = experts.parametrizations[self.parameter_name].original
        original.requires_grad_(weight.requires_grad)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def __repr__(self) -> str:
        return f"mask_{super().__repr__()}"


MaskLoraExperts = ParamWrapper


class _Added(nn.Module):
    """Parametrization W + Δ."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta
