"""Open a model, its tokenizer, or its empty skeleton from a directory or a Hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that `config.architectures` names, or the one its model type generates text with.

    Raises:
        ValueError: if transformers knows neither.
    """
    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        return mapping[type(config)]
    raise ValueError(
        f"transformers {transformers.__version__} has no class for architectures {config.architectures} of model type "
        f"'{config.model_type}'; upgrade transformers, or set trust_remote_code for a model with its own code."
    )


def load_config(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read config.json.

    Raises:
        FileNotFoundError: if a directory has none.
        ValueError: if it cannot be read.
    """
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in '{path}'; give a directory written by save_pretrained.")
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Cannot read the config of '{name_or_path}': {reason}") from error


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model from safetensors in the class its config names, in eval mode.

    Args:
        name_or_path: directory or Hub name.
        dtype: `"auto"` keeps the checkpoint's dtype.
        device: where the model goes.
        trust_remote_code: allow model code shipped with the checkpoint to run.

    Raises:
        FileNotFoundError: without config.json.
        ValueError: if tensors are missing, or have other shapes than the config says.
    """
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    cls: Any = transformers.AutoModelForCausalLM if trust_remote_code else model_class(config)
    try:
        model, info = cls.from_pretrained(
            name_or_path,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # raised below, with the tensor's name and both shapes
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Cannot load the weights of '{name_or_path}': {reason}") from error
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"'{name}' in '{name_or_path}' has shape {tuple(stored)} but its config wants {tuple(wanted)}; config.json "
            f"and weights are of two models, copy both again."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"'{name_or_path}' lacks {len(missing)} tensors of {cls.__name__}, among them '{missing[0]}'; "
            f"the checkpoint is incomplete or belongs to another architecture."
        )
    return model.to(device).eval()


def load_skeleton(name_or_path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model from its config with parameters on the meta device and buffers real; no weight is read.

    Args:
        name_or_path: directory or Hub name.
        dtype: of parameters, and of buffers the model computes in its own dtype; torch's default dtype when None.
    """
    config = load_config(name_or_path)
    return make_skeleton(model_class(config), config, dtype=dtype)


def make_skeleton(
    model_type: type[PreTrainedModel], config: PretrainedConfig, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """`load_skeleton` of a class and a config that are at hand.

    Args:
        model_type: class of the model.
        config: the model keeps it and may change it.
        dtype: as in `load_skeleton`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)  # only so do buffers made in `__init__` have the dtype they are loaded in
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = model_type(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    skeleton: PreTrainedModel = model.eval()
    return skeleton


def load_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model.

    Raises:
        ValueError: if there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"No usable tokenizer in '{name_or_path}'; save one beside the model with tokenizer.save_pretrained."
        ) from error
