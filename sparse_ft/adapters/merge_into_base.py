"""Merge an adapter into the unquantised model: the end of training on a quantised one.

    W_merged = W + c (B A) ∘ m   (ScaleLoRA: W ∘ (B A)),   W as stored, not as dequantised.

Training saw D, the dequantised W. A and B are merged into W itself, in fp32 and rounded once, so the result has neither
the rounding of quantisation nor a zero more than the masks say. The adapter remembers the digest of W, and no other
weights are accepted.

Example:
    >>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    >>> model = get_peft_model(model, MaskLoraConfig(r=16, masks=path, task_type="CAUSAL_LM"))   # train it
    >>> merged = merge_into_base(model, path)
    >>> merged.save_pretrained("merged")

Limits: one adapter at a time, not below DistributedDataParallel or DeepSpeed.

Source: QLoRA, Dettmers et al., arXiv 2305.14314, for training on a quantised base; the merge follows `MaskedLayer`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn

from sparse_ft.adapters.base_digest import PACKED
from sparse_ft.adapters.masked_config import MaskedLoraConfig
from sparse_ft.adapters.quantised import is_quantised
from sparse_ft.checkpoints import resolve_checkpoint
from sparse_ft.models import load_config, load_model


@torch.no_grad()
def merge_into_base(
    adapter: PeftModel | str | Path, base: nn.Module | str | Path, *, adapter_name: str | None = None
) -> nn.Module:
    """Merge a MaskLoRA, ScaleLoRA or LoRA-Prune adapter into the unquantised model it was trained for.

    Args:
        adapter: the trained model, which stays as it is, or a directory or Hub repository that an adapter was saved to.
        base: the unquantised model, changed in place, or its directory or Hub name, loaded in the stored dtype.
        adapter_name: which one; by default the active one, of a directory the one in the directory itself.

    Returns:
        The plain model with the adapter, its modules_to_save and its biases in it, in the dtypes of the base.

    Raises:
        ValueError: before anything is changed, if the adapter is not one of ours or was trained on other weights, or
            the base is quantised or has adapters.
        FileNotFoundError: if a directory lacks files.
        RuntimeError: if tensors of the adapter are missing or of another mask, or a pruned weight is not zero.

    Example:
        >>> merged = merge_into_base("adapter", "sparse_checkpoint")
    """
    if isinstance(adapter, PeftModel):
        config, tensors = _of_model(adapter, adapter_name)
    else:
        config, tensors = _of_directory(adapter, adapter_name)
    _check_config(config)
    model = _open(base) if isinstance(base, (str, Path)) else base
    _check_plain(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    adapted = PeftModel(model, replace(config, masks=config.masks))
    try:
        _check_tensors(adapted, tensors)
        set_peft_model_state_dict(adapted, tensors, adapter_name=adapted.active_adapter)
    except Exception:
        _set_trained(adapted.unload(), trained)
        raise
    merged: nn.Module = adapted.merge_and_unload()
    _set_trained(merged, trained)
    assert config.masks is not None, "every saved adapter has them"
    config.masks.verify(merged)
    return merged


def _of_model(model: PeftModel, adapter_name: str | None) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of one adapter of a model, the tensors on the CPU."""
    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise ValueError(f"Adapters {list(active)} are active; say which one to merge with adapter_name.")
    name = active[0] if adapter_name is None else adapter_name
    if name not in model.peft_config:
        raise ValueError(f"The model has no adapter '{name}'; it has {sorted(model.peft_config)}.")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return model.peft_config[name], {key: tensor.cpu() for key, tensor in tensors.items()}


def _of_directory(source: str | Path, adapter_name: str | None) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of a saved adapter; PEFT puts those not called "default" into a folder of their name."""
    inner = Path(source, adapter_name or "")
    source = str(inner if adapter_name and inner.is_dir() else source)
    kind = PeftConfig._get_peft_type(source)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(source)
    return config, load_peft_weights(source, device="cpu")


def _check_config(config: PeftConfig) -> None:
    if not isinstance(config, MaskedLoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"A {kind} adapter does not know its masks and base; merge_into_base takes MaskLoRA, ScaleLoRA and "
            f"LoRA-Prune, merge others with PEFT."
        )
    if str(config.weights_digest).startswith(PACKED):
        raise ValueError(
            f"The adapter was trained on a quantised model whose unquantised weights were not to be had "
            f"({str(config.weights_digest)[:19]}), so it is unknown into which it belongs; train it on a model "
            f"quantised while it was loaded from the unquantised checkpoint."
        )


def _open(base: str | Path) -> nn.Module:
    path = resolve_checkpoint(base)
    if getattr(load_config(path), "quantization_config", None) is not None:
        raise ValueError(f"The base '{base}' is quantised; give the checkpoint it was quantised from.")
    model: nn.Module = load_model(path)
    return model


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_quantised(module):
            raise ValueError(
                f"'{name}' of the base is quantised ({type(module).__name__}); give the model it was quantised from."
            )
        if isinstance(module, BaseTunerLayer):
            raise ValueError(f"'{name}' of the base has an adapter; give a model without, or take it off with unload.")


def _check_tensors(adapted: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError, before any is loaded, if tensors are missing or do not fit."""
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise RuntimeError(f"The adapter lacks {len(missing)} tensors, among them '{missing[0]}'; save it again.")
    here = {**adapted.state_dict(), **wanted}
    for name, tensor in tensors.items():
        shape = tuple(here[name].shape) if name in here else tuple(tensor.shape)
        if shape != tuple(tensor.shape):
            raise RuntimeError(
                f"'{name}' has shape {tuple(tensor.shape)} in the adapter but {shape} in the base; give the one it was "
                f"trained on."
            )


def _set_trained(model: nn.Module, names: Collection[str]) -> None:
    """Let just these parameters have gradients; PEFT took them from all."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
