"""LoRA adapter directories as PEFT writes them, without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_lora(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: int = 1,
    rank: int | None = None,
    base: Path | None = None,
) -> Path:
    """An adapter that adds alpha / rank * B A to each named tensor."""
    directory.mkdir(exist_ok=True)
    tensors = {}
    for name, (a, b) in factors.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(tensors, directory / "adapter_model.safetensors")
    r = rank or next(iter(factors.values()))[0].shape[0]
    settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "base_model_name_or_path": str(base) if base else None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
