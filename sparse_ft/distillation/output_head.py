"""The output head of a model, as the losses on hidden states need it: `logits = head(states entering that module)`.

    module = output_module(model)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))      # the states that enter it
    logits = model(**batch).logits
    check_head(output_head(model), seen[0][0, :4], logits[0, :4], model=model)      # once
    loss = ce_kl_loss(seen[0], labels, head=output_head(model), ...)                # in each step

What a model does before the head (norms, BERT's transform, d_model^-0.5 in a tied T5) is in those states. What it does
afterwards is read from its config, see `_AFTERWARDS`, and checked once against its own logits, because a model may do
something that no attribute known here tells.

A LoRA layer around the head counts with its effective weight W + Σ c B A, through which A and B get gradients. That is
a new tensor: make the head anew in each step. Dropout before A has no effective weight, so it is refused in training
mode; in eval mode it does nothing. DoRA and the other variants of LoRA are refused too.

A head packed by bitsandbytes is unpacked into a new constant tensor. Its 8-bit linears round their inputs as well,
which is left out here, as it is in the masked adapters.

Limits: a weight that is sharded (ZeRO-3, FSDP) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.distillation.head import Head, head_logits, product_dtype
from sparse_ft.models import HALF_DTYPES

# What is done to the head's product, by the attribute of the config that holds the number; None there means nothing.
_AFTERWARDS: dict[str, str | None] = {
    "final_logit_softcapping": "cap",  # Gemma 2 to 4, VaultGemma, T5Gemma, nanochat, PaliGemma
    "logits_soft_cap": "cap",  # RecurrentGemma
    "output_logit_soft_cap": "cap",  # xLSTM
    "logit_scale": "times",  # Cohere
    "lm_head_multiplier": "times",  # Falcon-H1
    "output_multiplier": "times",  # Muse
    "logits_scaling": "over",  # Granite
    "unpadded_vocab_size": "rows",  # Inkling: the logits of the rows after it are dropped
}
# The models whose attribute of that name means something else. MiniCPM3 divides the states before the head.
_OTHERWISE = {
    ("mpt", "logit_scale"): None,
    ("minicpm3", "logits_scaling"): None,
    ("gemma3", "final_logit_softcapping"): None,  # with images; the text model caps
    ("hyperclovax", "logits_scaling"): "times",
    ("hyperclovax_vision_v2", "logits_scaling"): "times",
}
_INEXPRESSIBLE = {"chameleon": "overwrites the logits of its image tokens"}

_INSTEAD = "set kl_weight to 0, or compute the losses from full logits"

# What check_head allows, in units in the last place of a position's largest logit. Measured on the CPU with 43 tiny
# models, and with heads of up to 4096 channels: below 1 in 16 bits, where only the last steps are rounded, with
# autocast, LoRA, scales and caps; up to 9 in fp32, where the order of summands counts. GPUs also round partial sums.
_UNITS = {2: 4, 4: 64, 8: 64}  # by bytes per number


def output_module(model: nn.Module) -> nn.Module | None:
    """The module whose product with the hidden states the logits are, as `get_output_embeddings()` names it.

    Args:
        model: a transformers model, plain, with a PEFT adapter, or inside DistributedDataParallel.

    Returns:
        The module that is called, PEFT's layer around the head included; None if the model has none, as `BertModel`
        and classifiers.

    Example:
        >>> output_module(llama)
        Linear(in_features=4096, out_features=32000, bias=False)
    """
    while not hasattr(model, "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        module: nn.Module | None = None if getter is None else getter()
    except NotImplementedError:
        return None
    return module


def output_head(model: nn.Module) -> Head:
    """Weight, bias, scale and cap that turn the states entering `output_module(model)` into the model's logits.

    Args:
        model: a transformers model, plain, with a PEFT adapter, or inside DistributedDataParallel.

    Returns:
        The head. Its tensors are the model's own parameters where nothing is added to them, so that gradients reach
        them, and through them an input embedding of the same weight.

    Raises:
        ValueError: the model has no output head, or one that `Head` cannot express; the weight is sharded.
        RuntimeError: bitsandbytes has repacked the weight.

    Example:
        >>> ce_kl_loss(states, labels, head=output_head(student), teacher=targets).total.backward()
    """
    module = output_module(model)
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so it predicts no tokens: {_INSTEAD}.")
    owner = _owner(model, module)
    kind = _model_type(owner)
    if kind in _INEXPRESSIBLE:
        raise ValueError(f"The model type {kind!r} {_INEXPRESSIBLE[kind]}, which no head expresses: {_INSTEAD}.")
    weight, bias = _effective(module, kind)
    bias = _bias_around(owner, module, len(weight)) if bias is None else bias
    final = getattr(owner, "final_logits_bias", None)  # of BART and its relatives
    if isinstance(final, Tensor):
        bias = _sum(bias, final.view(-1))
    return _with_afterwards(Head(weight, bias), getattr(owner, "config", None), kind)


@torch.no_grad()
def check_head(head: Head, states: Tensor, logits: Tensor, *, model: nn.Module | None = None) -> None:
    """Compare the head with the model's own logits; a difference above rounding means that it does not hold.

    What counts is the largest difference of a position against that position's largest logit. The allowed rounding is
    that of the coarsest dtype in play: of states, logits, weight and autocast, or the 16-bit one in which all logits
    are exact although they come in fp32, as accelerate returns them.

    Args:
        head: what `output_head` made.
        states: (n, h), as they entered the output module; a few positions suffice.
        logits: (n, V), what the model returned for them.
        model: to name its type in the message, and for the rounding of a head packed by bitsandbytes.

    Raises:
        RuntimeError: they differ by more than rounding, or in shape.

    Example:
        >>> check_head(head, states[0, :4], logits[0, :4], model=student)
    """
    states, logits = states.reshape(-1, states.shape[-1]), logits.reshape(-1, logits.shape[-1])
    kind = "" if model is None else f" of model type {_model_type(model)!r}"
    if states.shape[-1] != head.weight.shape[-1] or logits.shape != (len(states), len(head.weight)):
        raise RuntimeError(
            f"The output head{kind} has a weight of shape {tuple(head.weight.shape)}, which does not turn states of "
            f"shape {tuple(states.shape)} into logits of shape {tuple(logits.shape)}: {_INSTEAD}."
        )
    dtype = _computed_in(states, logits)
    expected = head_logits(states, head, dtype)
    difference = (expected - logits.to(expected)).abs().amax(-1)
    dtypes = (dtype, head.weight.dtype, logits.dtype, *_rounds_to(model))
    allowed = _rounding(dtypes, logits.is_cuda) * expected.abs().amax(-1)
    failing = ~(difference <= allowed)  # NaN fails
    if failing.any():
        at = int(torch.where(failing, difference, -1).nan_to_num(torch.inf, torch.inf).argmax())
        raise RuntimeError(
            f"The logits{kind} differ by up to {difference[at].item():.3g} from states times head, where rounding "
            f"explains {allowed[at].item():.3g}, so the model does something after its head that is not known here: "
            f"{_INSTEAD}."
        )


def _owner(model: nn.Module, module: nn.Module) -> nn.Module:
    """The innermost model whose head it is: in BLIP-2 the language model inside, with a config of its own."""
    owner = model
    for inner in model.modules():
        if hasattr(inner, "get_output_embeddings") and output_module(inner) is module:
            owner = inner
    return owner


def _bias_around(owner: nn.Module, module: nn.Module, rows: int) -> Tensor | None:
    """The bias that the module around a linear without one adds, as in ESM."""
    around = [outer._parameters.get("bias") for outer in owner.modules() if module in outer.children()]
    return next((bias for bias in around if bias is not None and bias.shape == (rows,)), None)


def _sum(bias: Tensor | None, added: Tensor | None) -> Tensor | None:
    return bias if added is None else added if bias is None else bias + added


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)


def _with_afterwards(head: Head, config: Any, kind: str) -> Head:
    """The head with what the config says is done to its product."""
    for name, meaning in _AFTERWARDS.items():
        value = next((value for part in _parts(config) if (value := getattr(part, name, None)) is not None), None)
        meaning = _OTHERWISE.get((kind, name), meaning)
        if value is None or meaning is None:
            continue
        if meaning == "cap":
            head = head._replace(softcap=float(value))
        elif meaning == "rows":
            bias = None if head.bias is None else head.bias[:value]
            head = head._replace(weight=head.weight[:value], bias=bias)
        else:
            head = head._replace(scale=head.scale * value if meaning == "times" else head.scale / value)
    return head


def _parts(config: Any) -> Iterator[Any]:
    """The config, and those of the text side in models that have several."""
    yield config
    for name in ("text_config", "decoder"):
        part = getattr(config, name, None)
        if hasattr(part, "model_type"):
            yield part


def _effective(module: Any, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias a module computes with, whatever PEFT has put around it."""
    if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
        plain = module.disable_adapters or not module.active_adapters
        return _effective(module.original_module if plain else module.modules_to_save[module.active_adapters[0]], kind)
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return _adapted(module, kind)
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"The output head of model type {kind!r} is a {type(module).__name__}, but only linear layers are known "
            f"here: {_INSTEAD}."
        )
    return _float_weight(module, kind), module.bias


def _adapted(layer: Any, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer of PEFT: those of its base with the active adapters that are not merged."""
    weight, bias = _effective(layer.base_layer, kind)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    if not hasattr(layer, "lora_A"):
        raise ValueError(
            f"The output head of model type {kind!r} has a {type(layer).__name__} adapter, but only LoRA is known "
            f"here: leave the head out of target_modules, or {_INSTEAD}."
        )
    if getattr(layer, "method", None) == "LoRA-Prune" and any(m.keep.numel() > 1 for m in layer.lora_mask.values()):
        raise ValueError(
            f"The output head of model type {kind!r} has a LoRA-Prune adapter, which trains with another weight than "
            f"it merges: leave the head out of target_modules, or {_INSTEAD}."
        )
    for name in layer.active_adapters:
        if name in layer.lora_A:
            weight = weight + _delta(layer, name, kind)
            added = layer.lora_B[name].bias
            bias = _sum(bias, None if added is None else layer.scaling[name] * added)
    return weight, bias


def _delta(layer: Any, name: str, kind: str) -> Tensor:
    """What a LoRA adapter adds to the weight, differentiable in A and B, in their dtype whatever autocast says."""
    what = f"The LoRA adapter {name!r} on the output head of model type {kind!r}"
    if name in layer.lora_variant:
        raise ValueError(
            f"{what} is a {type(layer.lora_variant[name]).__name__}, whose effective weight is not known here: use "
            f"plain LoRA there, or {_INSTEAD}."
        )
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0):
        raise ValueError(
            f"{what} has lora_dropout {dropout.p}, but an effective weight knows no dropout: give lora_dropout 0, or "
            f"{_INSTEAD}."
        )
    factors = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    for factor in factors:
        _check_whole(factor, kind)
    with torch.autocast(factors[0].device.type, enabled=False):
        delta: Tensor = layer.get_delta_weight(name)
    return delta


def _float_weight(module: Any, kind: str) -> Tensor:
    """The weight of a linear: the parameter itself, or a new tensor if bitsandbytes has packed it."""
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None or type(weight).__name__ == "Int8Params":
        return _unpacked(module, kind)
    _check_whole(weight, kind)
    return weight


def _check_whole(weight: Any, kind: str) -> None:
    """Refuse a weight that is not there as a matrix.

    Raises:
        ValueError: if it is sharded or stored in a way that is not known here.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta"
    if (plain and weight.numel() == 0) or hasattr(weight, "placements"):  # ZeRO-3, or a DTensor
        raise ValueError(
            f"The weight of the output head of model type {kind!r} is sharded over processes, but the losses need it "
            f"whole: use ZeRO-2 or DistributedDataParallel, or {_INSTEAD}."
        )
    if not plain or weight.dtype not in (*HALF_DTYPES, torch.float32, torch.float64) or weight.ndim != 2:
        raise ValueError(
            f"The weight of the output head of model type {kind!r} is a {type(weight).__name__} of shape "
            f"{tuple(weight.shape)} in {weight.dtype} on {weight.device.type}, but a matrix in floating point is "
            f"needed: load the head unquantised and not offloaded, or {_INSTEAD}."
        )


def _unpacked(module: Any, kind: str) -> Tensor:
    """The dequantised weight of a linear of bitsandbytes, in the dtype it computes in, as a constant."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    state = getattr(module.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError(
            f"bitsandbytes has repacked the output head of model type {kind!r} in an evaluation on the CPU, "
            f"after which it cannot be dequantised: load the model again and make its head before the first evaluation."
        )
    if state is not None:
        module.support_avx512bf16_for_cpu = False  # keeps an evaluation from repacking it
    dense: Tensor = dequantize_bnb_weight(module.weight, getattr(module, "state", None)).detach()
    return dense.to(getattr(module, "compute_dtype", None) or dense.dtype)


def _computed_in(states: Tensor, logits: Tensor) -> torch.dtype:
    """The dtype of the model's product, as far as the tensors tell."""
    for dtype in (torch.bfloat16, torch.float16):  # the coarser first: small numbers of bf16 are exact in fp16 too
        if logits.dtype == dtype or torch.equal(logits.to(dtype).to(logits.dtype), logits):
            return dtype
    return product_dtype(states)


def _rounds_to(model: nn.Module | None) -> Iterator[torch.dtype]:
    """What a head packed by bitsandbytes rounds to, whatever its inputs are."""
    head: Any = None if model is None else output_module(model)
    for layer in () if head is None else head.modules():
        if type(getattr(layer, "weight", None)).__name__ == "Int8Params":
            yield torch.bfloat16  # on GPUs the inputs are rounded to 8 bits, each within 1/254 of their largest
        elif isinstance(compute := getattr(layer, "compute_dtype", None), torch.dtype):
            yield compute


def _rounding(dtypes: Iterable[torch.dtype], on_gpu: bool) -> float:
    """The share of a position's largest logit that rounding in the coarsest of these dtypes explains."""
    if on_gpu and torch.get_float32_matmul_precision() != "highest":
        dtypes = (*dtypes, torch.float16)  # TF32 has as many bits
    return max(_UNITS[dtype.itemsize] * torch.finfo(dtype).eps for dtype in dtypes)
