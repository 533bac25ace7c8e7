"""Masked adapters on the 4-bit and 8-bit linears of bitsandbytes. No other file knows bitsandbytes.

    Y = X (D + c (B A) ∘ m)ᵀ + b,   D = dequantised W, made anew in each pass and kept by none.

Pruned weights survive quantisation exactly: 0 is a value of nf4, fp4 and int8, and times a block's or row's scale it is
0 again. nf4 turns some small kept weights into 0 as well, so masks are those from before quantisation, never the zeros
of the quantised model. They have the layout of the unquantised weight, which for GPT-2's Conv1D is (in, out), while its
quantised linear is (out, in).

4-bit layers compute as bitsandbytes does: in `compute_dtype` whatever the input's dtype or autocast say, the result in
the input's dtype. 8-bit layers compute in the input's or autocast's dtype with D; they do not quantise the activations,
as LLM.int8() would, since gradients of A and B have to belong to the weight that was used. LoRA-Prune adds its part to
bitsandbytes' own output.

The result of training is merged into the unquantised weights, see `merge_into_base`: into quantised ones it would be
rounded away.

On CPUs with AVX512-BF16 a forward pass in eval mode repacks a 4-bit weight in place, after which dequantised weights
and gradients are wrong. `guard_layers` switches that off, for all layers of the model, before the first adapter.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters.effective_weight import Weight
from sparse_ft.adapters.masked_layer import AdapterMask, LinearLayer, MaskedLinear, PlainLinear
from sparse_ft.masks import MaskSet, pack_bits, unpack_bits
from sparse_ft.models import HALF_DTYPES, canonical_name, named_weights

_DEQUANTISED_TO = (*HALF_DTYPES, torch.float32)  # by bitsandbytes itself


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight of a module is stored by bitsandbytes in 4 or 8 bits."""
    return _is_4bit(module) or _is_8bit(module)


def float_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantised weight of such a module, (out, in), as a new tensor.

    Args:
        module: 4-bit or 8-bit linear.
        dtype: of the result; by default that in which the weight was quantised, float32 for 8 bits.
    """
    functional, weight = _bitsandbytes().functional, module.weight
    assert isinstance(weight, Tensor)
    if _is_4bit(module):
        state = copy.copy(weight.quant_state)  # type: ignore[attr-defined]
        state.dtype = dtype if dtype in _DEQUANTISED_TO else state.dtype
        dense: Tensor = functional.dequantize_4bit(weight.data, state)
    else:
        scale = _scale(module).to(weight.device)
        dense = functional.int8_vectorwise_dequant(weight.data, scale)
    return dense if dtype is None else dense.to(dtype)


def quantised_bytes(module: nn.Module) -> Iterator[Tensor]:
    """Everything that defines the weight of such a module, as CPU tensors in a fixed order."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    yield weight.data.cpu()
    if _is_4bit(module):
        state = weight.quant_state.as_dict(packed=True)  # type: ignore[attr-defined]
        yield from (state[key].cpu() for key in sorted(state))
    else:
        yield _scale(module).cpu()


def stored_shape(module: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """Shape of a weight of this module in the layout of its mask."""
    if not is_quantised(module):
        return tuple(weight.shape)
    shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
    return shape[::-1] if _was_conv1d(module) else shape


class FloatWeights(Mapping[str, Tensor]):
    """The weights of a model by canonical name; a quantised one is dequantised, in its mask's layout, when it is read.

    Args:
        model: plain or adapted.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = named_weights(model)
        self.quantised = {
            canonical_name(f"{name}.weight"): module for name, module in model.named_modules() if is_quantised(module)
        }

    def __getitem__(self, name: str) -> Tensor:
        module = self.quantised.get(name)
        if module is None:
            return self._weights[name]
        dense = float_weight(module)
        return dense.t() if _was_conv1d(module) else dense

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def verify_zeros(masks: MaskSet, model: nn.Module) -> None:
    """`masks.verify` for a model that may be quantised.

    Raises:
        RuntimeError: if a pruned weight is not zero.
        ValueError: if a weight is absent or has another shape.
    """
    weights = FloatWeights(model)
    if not any(name in weights.quantised for name in masks):
        masks.verify(model)
        return
    revived = masks.revived(weights)
    if revived:
        name = next(iter(revived))
        raise RuntimeError(
            f"{sum(revived.values())} pruned weights in {len(revived)} tensors of the quantised model are not zero, "
            f"the first {revived[name]} in '{name}'; give the masks of the checkpoint it was quantised from."
        )


def guard_layers(model: nn.Module) -> None:
    """Keep the 4-bit weights of a model from being repacked on the CPU, and refuse those that are wrong there.

    Raises:
        RuntimeError: if weights were repacked already, or bitsandbytes does not dequantise them as it quantised them.
    """
    layers = [(name, module) for name, module in model.named_modules() if _is_4bit(module)]
    for name, layer in layers:
        name = canonical_name(f"{name}.weight")
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"bitsandbytes has repacked '{name}' in an evaluation on the CPU, after which training and merging "
                f"would be wrong; load the model again and add the adapter before the first evaluation."
            )
        if not _is_dequantised_well(layer):
            raise RuntimeError(
                f"bitsandbytes reads '{name}' wrongly on the CPU, since its {layer.in_features} inputs are no multiple "
                f"of the block size {layer.weight.quant_state.blocksize}; use 8 bits, or an accelerator."
            )
    for _, layer in layers:
        layer.support_avx512bf16_for_cpu = False


def check_biases(modules: Mapping[str, nn.Module]) -> None:
    """Refuse to train biases that bitsandbytes would round to 16 bits, in place and in each forward pass.

    4-bit linears round them to the dtype they compute in, 8-bit linears to that of their inputs.

    Args:
        modules: by name, those with trained biases that go through the forward of bitsandbytes.

    Raises:
        ValueError: naming the first such layer.
    """
    for name, module in modules.items():
        compute = getattr(module, "compute_dtype", torch.float16)
        if is_quantised(module) and module.bias is not None and compute in HALF_DTYPES:
            raise ValueError(
                f"bitsandbytes would round the trained bias of '{name}' to 16 bits in each step; load the model in 4 "
                f"bits with bnb_4bit_compute_dtype=torch.float32, or train no biases."
            )


class QuantisedLinear(LinearLayer):
    """What the methods share on a 4-bit or 8-bit linear: reading the weight, and refusing to merge into it."""

    def set_mask(self, adapter_name: str, mask: AdapterMask) -> None:
        """Give an adapter its mask, which is used in the layout of the quantised weight."""
        base = self.get_base_layer()
        if _was_conv1d(base) and mask.keep.numel() > 1:
            mask.keep = pack_bits(unpack_bits(mask.keep, (base.in_features, base.out_features)).t())
        super().set_mask(adapter_name, mask)

    def _base_weight(self) -> Weight:
        base = self.get_base_layer()
        return partial(float_weight, base, getattr(base, "compute_dtype", None))

    def _unmerged(self) -> Tensor:
        return float_weight(self.get_base_layer(), torch.float32)

    def _merged(self, adapters: list[str]) -> Tensor:
        raise ValueError(cannot_merge(self.method))


class QuantisedMaskedLinear(QuantisedLinear, MaskedLinear):
    """What MaskLoRA and ScaleLoRA share there: the dtype they compute in."""

    def _adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        compute = getattr(self.get_base_layer(), "compute_dtype", None)
        if compute is None:
            return super()._adapted(x, names)
        with torch.autocast(x.device.type, enabled=False):
            return super()._adapted(x.to(compute), names).to(x.dtype)


class QuantisedPlainLinear(QuantisedLinear, PlainLinear):
    """Ordinary LoRA beside a 4-bit or 8-bit linear."""


def cannot_merge(method: str) -> str:
    """Why an adapter cannot be merged into a quantised model, in one sentence."""
    return (
        f"This {method} adapter is on a quantised model, where merging would round it away; merge it into the "
        f"unquantised model with sparse_ft.merge_into_base(model, base), or take it off with unload()."
    )


def _bitsandbytes() -> Any:
    """The module if it is loaded: without it no layer can be one of its own."""
    return sys.modules.get("bitsandbytes")


def _is_4bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    if bnb is None or not isinstance(module, bnb.nn.Linear4bit):
        return False
    return getattr(module.weight, "quant_state", None) is not None


def _is_8bit(module: nn.Module) -> bool:
    bnb = _bitsandbytes()
    return bnb is not None and isinstance(module, bnb.nn.Linear8bitLt) and module.weight.dtype == torch.int8


def _is_dequantised_well(module: Any) -> bool:
    """False where rows that end inside a block get the scales of other blocks, as in the CPU kernel of 0.50."""
    state, weight = copy.copy(module.weight.quant_state), module.weight.data
    if weight.device.type != "cpu" or module.in_features % state.blocksize == 0:
        return True
    state.shape = (1, state.shape.numel())  # one row, which ends with the last block
    return torch.equal(
        _bitsandbytes().functional.dequantize_4bit(weight, state).view(-1), float_weight(module).view(-1)
    )


def _scale(module: Any) -> Tensor:
    """Largest absolute value of each row, (out,); after the first forward pass of the layer it is in its state."""
    scale: Tensor = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return scale


def _was_conv1d(module: nn.Module) -> bool:
    """Whether transformers made this quantised linear from a Conv1D, transposing its weight."""
    return issubclass(getattr(module, "source_cls", type(module)), Conv1D)
