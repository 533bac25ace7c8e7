"""A saved base with a saved adapter on it, and every way an adapter reaches a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters.sparse_models import CONFIGS, adapted, logits, sparse_model
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Saved:
    """A saved base, an adapter on it, and the logits they give together."""

    def __init__(self, directory: Path, name: str = "llama", method: str = "mask_lora", **options: object) -> None:
        self.name, self.base, self.adapter = name, directory / "base", directory / "adapter"
        self.method, self.config_class = method, CONFIGS[method]
        model, self.masks = sparse_model(name)
        model.save_pretrained(self.base)
        model = AutoModelForCausalLM.from_pretrained(self.base)
        self.plain = logits(model)
        peft_model = adapted(model, self.masks, method=method, task_type="CAUSAL_LM", **options)
        self.logits = logits(peft_model)
        peft_model.save_pretrained(self.adapter)

    def load_base(self, **options: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base, **options)

    def config(self, **options: object):
        return self.config_class(**{"r": 4, "masks": self.masks, **options})


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


# every way an adapter reaches a model; each takes base directory and adapter directory
def by_peft_model(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter)


def by_low_memory(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter, low_cpu_mem_usage=True)


def by_auto_peft(saved: Saved, adapter: Path) -> torch.nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_second_adapter(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = get_peft_model(saved.load_base(), saved.config(r=2))
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    return model


def by_reloading_into_an_adapter(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = get_peft_model(saved.load_base(), saved.config())
    model.load_adapter(adapter, "default")
    return model.eval()


def by_config(saved: Saved, adapter: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(saved.load_base(), adapter, config=saved.config_class.from_pretrained(adapter))


def by_transformers(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = saved.load_base()
    model.load_adapter(str(adapter))
    return model


def by_transformers_with_config(saved: Saved, adapter: Path) -> torch.nn.Module:
    model = saved.load_base()
    model.load_adapter(str(adapter), peft_config=saved.config_class.from_pretrained(adapter), adapter_name="mine")
    return model


def by_auto_model(saved: Saved, adapter: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(adapter)


PEFT_ROUTES = [by_peft_model, by_low_memory, by_auto_peft, by_second_adapter, by_config, by_transformers_with_config]
ROUTES = [*PEFT_ROUTES, by_reloading_into_an_adapter, by_transformers, by_auto_model]
Route = Callable[[Saved, Path], torch.nn.Module]
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
