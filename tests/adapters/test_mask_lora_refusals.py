"""What MaskLoRA refuses: one sentence that names the thing and the fix, and the model is not touched."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from adapters.sparse_models import adapted, sparse_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, LoraGAConfig, VeloraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 400 and message[-1] in ".?"


def refused(config: MaskLoraConfig, model: nn.Module, error: type[Exception], match: str) -> None:
    """The error, on one line, and a model that has the modules it had."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match) as caught:
        get_peft_model(model, config)
    assert is_one_sentence(str(caught.value)), caught.value
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize(
    "option",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"use_qalora": True},
        {"velora_config": VeloraConfig()},
        {"kasa_config": KasaConfig()},
        {"arrow_config": ArrowConfig()},
        {"use_bdlora": BdLoraConfig()},
        {"lora_ga_config": LoraGAConfig()},
        {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
        {"megatron_config": {"a": 1}},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"trainable_token_indices": [1]},
        {"ensure_weight_tying": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_lora_it_cannot_honour(option: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"does not support {next(iter(option))}=") as caught:
        MaskLoraConfig(**option)
    assert is_one_sentence(str(caught.value))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "orthogonal", "mica"])
def test_initialisations_that_change_the_base(init: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}', only True, False or 'gaussian'"):
        MaskLoraConfig(init_lora_weights=init)
    MaskLoraConfig(init_lora_weights="gaussian")


def test_every_option_of_lora_is_known_to_be_fine_or_refused() -> None:
    """A new PEFT with a new option must be looked at before it is silently accepted."""
    from dataclasses import fields

    from sparse_ft.adapters.masked_config import REFUSED

    fine = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "fan_in_fan_out", "bias"),
        *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
        "target_parameters",
    }
    assert {field.name for field in fields(LoraConfig)} == fine | set(REFUSED)


def test_target_without_a_mask() -> None:
    model, masks = sparse_model()
    some = MaskSet({name: masks[name] for name in masks if "q_proj" in name})
    config = MaskLoraConfig(masks=some, target_modules=["q_proj", "k_proj"])
    refused(config, model, ValueError, r"Target 'model.layers.0.self_attn.k_proj' has no mask")


def test_target_that_matches_nothing_names_one_that_would() -> None:
    model, masks = sparse_model()
    config = MaskLoraConfig(masks=masks, target_modules=["query"])
    refused(config, model, ValueError, r"matches no module .* 'model.layers.0.self_attn.q_proj'")


def test_all_linear() -> None:
    model, masks = sparse_model()
    refused(MaskLoraConfig(masks=masks, target_modules="all-linear"), model, ValueError, "use 'pruned'")


def test_nothing_left() -> None:
    model, masks = sparse_model()
    config = MaskLoraConfig(masks=masks, exclude_modules=r".*proj")
    refused(config, model, ValueError, "leaves none of 14 masked tensors")


def test_masks_of_another_model() -> None:
    model, _ = sparse_model("llama")
    _, masks = sparse_model("gpt2")
    refused(MaskLoraConfig(masks=masks), model, ValueError, r"no tensor 'transformer.h.0.attn.c_attn.weight'")
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    _, masks = sparse_model("llama")
    refused(MaskLoraConfig(masks=masks), wide, ValueError, r"has shape \(32, 32\) but the weight has \(64, 64\)")


def test_masks_of_single_experts_for_a_stack() -> None:
    model, masks = sparse_model("mixtral")
    name = next(name for name in masks if len(masks.shape(name)) == 3)
    flat = MaskSet({name: masks[name].flatten(0, 1)})
    refused(MaskLoraConfig(masks=flat), model, ValueError, rf"Mask for '{name}' has shape \(\d+, \d+\) but the weight")


def test_pruned_weight_that_is_not_zero() -> None:
    model, masks = sparse_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-6)
    refused(MaskLoraConfig(masks=masks), model, RuntimeError, r"pruned weights in 1 tensors are not zero")


def test_quantised_layer() -> None:
    class Linear4bit(nn.Linear):
        """Stands in for a packed layer: another forward over integer storage."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    model, masks = sparse_model()
    packed = Linear4bit(32, 32)
    packed.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = packed
    refused(
        MaskLoraConfig(masks=masks),
        model,
        ValueError,
        r"does not support 'model.layers.0.self_attn.q_proj' of type Linear4bit with torch.uint8",
    )


def test_layer_that_is_no_linear() -> None:
    model, masks = sparse_model()
    embedding = {"model.embed_tokens.weight": torch.ones(96, 32, dtype=torch.bool)}
    config = MaskLoraConfig(masks=MaskSet({**masks, **embedding}))
    refused(config, model, ValueError, r"does not support 'model.embed_tokens' of type Embedding")


def test_tied_head() -> None:
    model, masks = sparse_model("qwen")
    head = {"lm_head.weight": torch.ones(96, 32, dtype=torch.bool)}
    config = MaskLoraConfig(masks=MaskSet({**masks, **head}))
    refused(config, model, ValueError, r"'lm_head.weight' is shared with another module")


def test_weights_that_are_not_in_memory() -> None:
    model, masks = sparse_model()
    model.to("meta")
    refused(MaskLoraConfig(masks=masks), model, ValueError, "is on the meta device")


def test_a_layer_with_ordinary_lora() -> None:
    model, masks = sparse_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "ordinary")
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has an adapter of another method"):
        model.add_adapter(MaskLoraConfig(masks=masks), "masked")


def test_ordinary_lora_on_a_masked_layer_does_not_run() -> None:
    model, masks = sparse_model()
    model.add_adapter(MaskLoraConfig(masks=masks), "masked")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "ordinary")
    with pytest.raises(RuntimeError, match=r"Adapter 'ordinary' has no mask on this layer"):
        model(torch.tensor([[1, 2, 3]]))


def test_second_adapter_while_the_first_is_merged() -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks)
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapter \['default'\] is merged into .*; unmerge it"):
        peft_model.add_adapter("second", MaskLoraConfig(masks=masks))
    assert list(peft_model.peft_config) == ["default"]
    peft_model.unmerge_adapter()
    peft_model.add_adapter("second", MaskLoraConfig(masks=masks))


def with_initial_model(model: nn.Module, folder: str) -> None:
    model.save_pretrained(os.path.join(folder, "new"), path_initial_model_for_weight_conversion=folder)


def with_conversion(model: nn.Module, folder: str) -> None:
    from peft import convert_to_lora

    convert_to_lora(model, rank=2)


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (with_initial_model, "of no use to MaskLoRA"),
        (with_conversion, "(?i)not support|convert"),
    ],
    ids=["initial model", "conversion"],
)
def test_lora_features_that_would_lose_the_mask(
    use: Callable[[nn.Module, str], None], match: str, tmp_path: object
) -> None:
    model, masks = sparse_model()
    with pytest.raises((ValueError, TypeError), match=match):
        use(adapted(model, masks), str(tmp_path))


def test_mixed_models_of_several_methods() -> None:
    model, masks = sparse_model()
    with pytest.raises(ValueError, match="MASKLORA"):
        get_peft_model(model, MaskLoraConfig(masks=masks), mixed=True)


@pytest.mark.slow
def test_without_the_package_the_type_is_unknown(tmp_path: object) -> None:
    """A process that does not import the adapters stops at the type; it never takes the file for LoRA."""
    import subprocess
    import sys

    model, masks = sparse_model()
    adapted(model, masks).save_pretrained(str(tmp_path))
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "MASKLORA" in done.stderr


def test_targets_found_and_adapted_agree() -> None:
    model: PreTrainedModel
    for name in ("llama", "gpt2", "bert"):
        model, masks = sparse_model(name)
        peft_model = adapted(model, masks)
        assert {t.name for t in find_targets(peft_model)} == set(masks)
