"""Before the first step every method computes what the pruned model computes, bit for bit in fp32."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from adapters.sparse_models import CONFIGS, every_family, logits, pruned, sparse_model
from adapters.test_perp_groups import UNTIED
from adapters.wide_models import WIDE
from peft import PeftModel, get_peft_model
from torch import Tensor

from sparse_ft.adapters import ScaleLoraConfig, merge_perp, prepare_perp
from sparse_ft.masks import MaskSet

GROUPS = ["biases", "norms", "embeddings", "biases+norms", "norms+embeddings"]
JOINED = [f"{adapter}+{groups}" for adapter in CONFIGS for groups in ("norms", "biases+norms")]
WITH_HEAD = ["head", "biases+norms+head", *(f"{adapter}+norms+head+embeddings" for adapter in CONFIGS)]


def start(model: Any, masks: MaskSet, before: Tensor, config: ScaleLoraConfig, *, exact: bool = True) -> None:
    """The adapter changes nothing, and leaves the model as it was."""
    peft_model = get_peft_model(model, config)
    found = logits(peft_model)
    if exact:
        assert torch.equal(found, before), config.r
    else:
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6)
    assert peft_model.unload() is model


@every_family
def test_scale_lora_at_every_rank(name: str) -> None:
    """1 / sqrt(r) is a power of two for r = 1, 4, 16 and 64; with the symmetry broken B A is exactly 1 for any r."""
    model, masks = sparse_model(name)
    before = logits(model)
    for r in (1, 4, 16):
        start(model, masks, before, ScaleLoraConfig(r=r, masks=masks))
    for r in (3, 16):
        start(model, masks, before, ScaleLoraConfig(r=r, masks=masks, break_symmetry=True))
    start(model, masks, before, ScaleLoraConfig(r=3, masks=masks), exact=False)


@every_family
def test_scale_lora_at_rank_64(name: str) -> None:
    torch.manual_seed(0)
    model, masks = pruned(WIDE[name]().eval())
    before = logits(model)
    narrow = {key.removesuffix(".weight"): 16 for key in masks if min(masks.shape(key)[-2:]) < 64}
    for break_symmetry in (False, True):
        config = ScaleLoraConfig(r=64, rank_pattern=narrow, masks=masks, break_symmetry=break_symmetry)
        start(model, masks, before, config)
    peft_model = get_peft_model(model, ScaleLoraConfig(r=64, rank_pattern=narrow, masks=masks))
    ranks = {layer.r["default"] for layer in peft_model.modules() if hasattr(layer, "lora_mask")}
    assert 64 in ranks <= {16, 64}


@pytest.mark.filterwarnings("ignore:.*(has no biases|share their weight)")
@every_family
def test_groups_alone_and_joined(name: str) -> None:
    """Merging then gives back the very bits, too."""
    methods = GROUPS[1:] if name in ("llama", "mixtral", "t5") else GROUPS
    methods = [*methods, *JOINED, *(WITH_HEAD if name in UNTIED else [])]
    for method in methods:
        model, masks = sparse_model(name)
        before = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = prepare_perp(model, method, masks, r=4, task_type=None)
        assert torch.equal(logits(prepared), before), method
        assert isinstance(prepared, PeftModel) == ("_" in method or "head" in method)
        assert torch.equal(logits(merge_perp(prepared)), before), method
