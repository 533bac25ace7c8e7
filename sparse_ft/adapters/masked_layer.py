"""What the layers of all masked adapters share: the adapter's mask, and an exact merge and unmerge.

PEFT keeps naming, devices, saving, switching and deleting of adapters. A method adds the mathematics: forward and the
delta. Merging adds up in fp32 and rounds once. The kept values of the weight are set aside meanwhile, so that unmerging
restores the weight bit for bit, which W + Δ - Δ does not in any floating point format.
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

from sparse_ft.adapters.combining import Factors, concatenated, summed, truncated
from sparse_ft.adapters.effective_weight import Weight
from sparse_ft.adapters.mask_lora_function import mask_lora_delta
from sparse_ft.masks import keep_bits, unpack_bits


class AdapterMask(nn.Module):
    """The mask of one adapter on one layer, and a fingerprint of mask and base that is saved with A and B.

    The mask is no buffer: DistributedDataParallel would send it around before every forward. The fingerprint is one, so
    that whatever loads the adapter's tensors brings along what they were trained for.

    Args:
        name: parameter the mask belongs to, for messages.
        packed: `pack_bits` of the mask in the layout of the weight, held as it is: a `MaskSet`'s own is not copied.
        shape: of the mask; () stands for a single True, for a weight that is not pruned.
        made_for: what else the adapter depends on, such as `MaskSet.weights_digest` of the base model.
    """

    fingerprint: Tensor

    def __init__(self, name: str, packed: Tensor, shape: Sequence[int], made_for: str) -> None:
        super().__init__()
        self.name = name
        # one bit per weight stays in memory, one byte would be a quarter of an 8-bit model's weights again and more
        self.keep = packed if torch.Size(shape).numel() > 1 else keep_bits(unpack_bits(packed, shape))
        head = f"{tuple(shape)}|{made_for}|".encode()
        self._made_for = hashlib.sha256(head + packed.cpu().numpy().tobytes()).digest()
        self._checked: Tensor | None = None  # the fingerprint that was found to be right
        self.register_buffer("fingerprint", torch.frombuffer(bytearray(self._made_for), dtype=torch.uint8))

    def __getattr__(self, name: str) -> Any:
        if name == "fingerprint":  # whoever asks for the buffer may write into it, as PEFT's hotswap does
            self._checked = None
        return super().__getattr__(name)

    def bits(self) -> Tensor:
        """The mask as `mask_` takes it: packed, but for a single True.

        Raises:
            RuntimeError: if A and B were loaded from an adapter with another mask or another base.
        """
        fingerprint = self._buffers["fingerprint"]
        if self._checked is not fingerprint:
            assert fingerprint is not None
            problem = self.mismatch(fingerprint)
            if problem:
                raise RuntimeError(problem)
            self._checked = fingerprint
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


class MaskedLayer(lora.LoraLayer):
    """What linears and stacks share: masks by adapter, and an exact merge and unmerge."""

    method = "LoRA"  # as messages call it
    num_experts = 1
    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_mask")
    _set_aside: tuple[Tensor, Tensor] | None = None  # bool mask and the weight's values there, while merged

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """No variant of LoRA (DoRA …) is known here."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int | None, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; its mask follows by `set_mask`. Without an alpha c = 2."""
        if not hasattr(self, "lora_mask"):
            self.lora_mask = nn.ModuleDict()
        super().update_layer(adapter_name, r, 2 * r if lora_alpha is None else lora_alpha, *args, **kwargs)

    def set_mask(self, adapter_name: str, mask: AdapterMask) -> None:
        """Give an adapter its mask."""
        self.lora_mask[adapter_name] = mask.to(self._parameter().device)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a masked delta has full rank."""
        return False

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What merging this adapter adds to the weight, in its layout and in fp32 (fp64 for fp64 factors)."""
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
        if safe_merge:
            self.check_finite(names)
        merged = self._merged(names)
        weight = self._parameter().data
        self._set_aside = self._set_aside or self._values_at(self._mask(names[0]))
        weight.copy_(merged)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError if merging these adapters, by default the active ones, gives a weight that is not finite."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.lora_A and name not in self.merged_adapters]
        if names and not torch.isfinite(self._merged(names)).all():
            raise ValueError(f"Merging adapter {names} gives weights that are not finite; the adapter is broken.")

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

    def _merged(self, adapters: list[str]) -> Tensor:
        """The weight with these adapters and those that are merged, in its own dtype."""
        return self._total(self._unmerged(), [*self.merged_adapters, *adapters]).to(self._parameter().dtype)

    def _total(self, weight: Tensor, adapters: list[str]) -> Tensor:
        """W with all these adapters, from W without any in fp32 or wider, which may be overwritten."""
        for name in adapters:
            weight += self.get_delta_weight(name).to(weight)
        return weight

    def _unmerged(self) -> Tensor:
        """A copy of the weight without any adapter, in fp32 or wider."""
        weight = self._parameter().data
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self._set_aside is None:
            return weight.to(dtype, copy=True)
        kept, values = self._set_aside
        unmerged = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        unmerged[kept] = values.to(unmerged)
        return unmerged

    def _values_at(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return kept, self._parameter().data[kept]

    def factors(self, adapter: str) -> Factors:
        """A and B of an adapter, expert by expert, and its scaling."""
        A, B = self._wide(adapter)
        # PEFT stores A as (E·r, in), expert major, and B as (out, r·E), expert minor
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return Factors(A, B, self.scaling[adapter])

    def set_factors(self, adapter: str, new: Factors) -> None:
        """Replace A and B of an adapter; its scaling is taken out of B."""
        A, B = self.lora_A[adapter], self.lora_B[adapter]
        B.weight.data = (new.B * (new.weight / self.scaling[adapter])).permute(1, 2, 0).reshape(B.weight.shape)
        A.weight.data = new.A.reshape(A.weight.shape)

    @torch.no_grad()
    def combination(self, adapters: dict[str, float], how: str, r: int | None) -> Factors:
        """Those of these adapters that are on this layer as one.

        Args:
            adapters: weight by name.
            how: "cat", exactly; "linear", see `summed`; or "svd", see `truncated`.
            r: for "svd", the largest rank of an adapter by default.

        Raises:
            ValueError: for "linear" with unequal ranks.
        """
        parts = [self.factors(name) for name in adapters if name in self.lora_A]
        weights = [weight for name, weight in adapters.items() if name in self.lora_A]
        parts = [part._replace(weight=part.weight * w) for part, w in zip(parts, weights, strict=True)]
        ranks = {part.A.shape[1] for part in parts}
        if how == "cat":
            return concatenated(parts)
        if how == "svd":
            return truncated(parts, r or max(ranks))
        if len(ranks) > 1:
            raise ValueError(f"combination_type='linear' needs equal ranks, got {sorted(ranks)}; use 'cat' or 'svd'.")
        return summed(parts)

    def _parameter(self) -> nn.Parameter:
        raise NotImplementedError

    def _base_weight(self) -> Weight:
        """The frozen weight in floating point for the forward pass, or a function that makes it."""
        return self._parameter()

    def _bits(self, adapter_name: str) -> Tensor:
        if adapter_name not in self.lora_mask:
            raise RuntimeError(
                f"Adapter '{adapter_name}' has no mask on this layer; add it as a {self.method} adapter with masks=...."
            )
        mask = self.lora_mask[adapter_name]
        assert isinstance(mask, AdapterMask)
        return mask.bits()

    def _mask(self, adapter_name: str) -> Tensor:
        """The mask as bool, in the layout of the weight or a single True."""
        bits = self._bits(adapter_name)
        return unpack_bits(bits, self._parameter().shape) if bits.dtype == torch.uint8 else bits.bool()

    def _wide(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A and B in fp32, or fp64 if they are."""
        A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), B.to(dtype)


class LinearLayer(MaskedLayer, lora.Linear):
    """Around `nn.Linear`, weight (out, in), or GPT-2's Conv1D, weight (in, out)."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)

    def _parameter(self) -> nn.Parameter:
        weight: nn.Parameter = self.get_base_layer().weight
        return weight


class PlainLinear(LinearLayer):
    """Ordinary LoRA in forward, W + c (B A) ∘ m once merged.

    The two agree where the mask is True everywhere, as for `dense_modules`.
    """

    def get_delta_weight(self, adapter: str) -> Tensor:
        """c (B A) ∘ m in the layout of the weight, in fp32 (fp64 for fp64 factors)."""
        A, B = self._wide(adapter)
        return mask_lora_delta(A, B, self._bits(adapter), self.scaling[adapter], fan_in_fan_out=self.fan_in_fan_out)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out) with the active adapters, or those named for each sample."""
        for name in kwargs.get("adapter_names") or self.active_adapters:
            if name in self.lora_A:
                self._bits(name)  # raises if A and B were trained for another mask or base
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def __repr__(self) -> str:
        return f"plain_{super().__repr__()}"


class MaskedLinear(LinearLayer):
    """Training sees the merged weight: the first adapter is fused with the base layer, more are added to its output."""

    def _fused(self, x: Tensor, adapter: str, bias: Tensor | None) -> Tensor:
        """(..., in) to (..., out): base layer and one adapter."""
        raise NotImplementedError

    def _addition(self, x: Tensor, adapter: str) -> Tensor:
        """(..., in) to (..., out): x times the delta of one adapter."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out) with the active adapters."""
        plain = self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None
        names = [] if plain else [name for name in self.active_adapters if name in self.lora_A]
        if names:
            return self._adapted(x, names)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        base = self.get_base_layer()
        # a base layer with hooks (offloading, sharding, statistics) has to be called
        hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
        result = base(x) if hooked else self._fused(x, names[0], base.bias)
        for name in names if hooked else names[1:]:
            result = result + self._addition(x, name).to(result.dtype)
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


class ParamWrapper(MaskedLayer, lora.ParamWrapper):
    """A stack of fused experts, (E, out, in) or (E, in, out): one pair A, B and one mask per expert.

    It bears its PEFT parent's name, as every subclass has to, because PEFT, to nest the wrappers of several parameters
    of one module, recognises them by class name. The weight is used inside the model's own experts code.
    """

    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self.get_param()
        return parameter

    def _change(self, adapters: list[str]) -> nn.Module:
        """A parametrization that makes the effective stack from the frozen one: `Added`, for example."""
        raise NotImplementedError

    def _product(self, A: Tensor, B: Tensor) -> Tensor:
        """B A per expert from A (E·r, in) and B (out, r·E)."""
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, self.num_experts)
        swapped = self._did_swap_in_out_features  # the stack is (E, out, in)
        return torch.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", B, A)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        names = [name for name in active_adapters if name in self.lora_A]
        if not names:
            yield
            return
        experts, weight = self.get_base_layer(), self._parameter()
        parametrize.register_parametrization(experts, self.parameter_name, self._change(names))
        original = experts.parametrizations[self.parameter_name].original
        original.requires_grad_(weight.requires_grad)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()

    def __repr__(self) -> str:
        return f"mask_{super().__repr__()}"


MaskedExperts = ParamWrapper


class Added(nn.Module):
    """Parametrization W + Δ."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        """The stack with Δ."""
        return weight + self.delta
