"""What masked adapters refuse: one sentence that names the method, the thing and the fix; the model is not touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from adapters.sparse_models import CONFIGS, adapted, sparse_model
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, LoraGAConfig, VeloraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.adapters import prepare_perp
from sparse_ft.adapters.masked_config import MaskedLoraConfig
from sparse_ft.masks import MaskSet

NAMES = {"mask_lora": "MaskLoRA", "scale_lora": "ScaleLoRA", "lora_prune": "LoRA-Prune"}


@pytest.fixture(params=list(CONFIGS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 400 and message[-1] in ".?"


def refused(config: MaskedLoraConfig, model: nn.Module, error: type[Exception], match: str) -> None:
    """The error, on one line, and a model that has the modules it had."""
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=match) as caught:
        get_peft_model(model, config)
    assert is_one_sentence(str(caught.value)), caught.value
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def config_refused(method: str, match: str, **options: object) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        CONFIGS[method](**options)
    assert is_one_sentence(str(caught.value)), caught.value


@pytest.mark.parametrize(
    "option",
    [
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
def test_options_of_lora_it_cannot_honour(method: str, option: dict[str, object]) -> None:
    config_refused(method, f"{NAMES[method]} does not support {next(iter(option))}=", **option)


@pytest.mark.parametrize("option", [{"lora_alpha": 32}, {"alpha_pattern": {"k_proj": 8}}, {"use_rslora": True}])
def test_scale_lora_has_no_scale(option: dict[str, object]) -> None:
    config_refused("scale_lora", f"ScaleLoRA does not support {next(iter(option))}=.* none of its own", **option)
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method="scale_lora")
    layer = peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.scale_layer(1)
    with pytest.raises(ValueError, match=r"ScaleLoRA cannot be scaled by 0\.5"):
        layer.set_scale("default", 0.5)


@pytest.mark.parametrize("method", ["mask_lora", "scale_lora"])
def test_dropout_where_training_sees_the_merged_weight(method: str) -> None:
    config_refused(method, f"{NAMES[method]} does not support lora_dropout=0.1", lora_dropout=0.1)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "orthogonal", "mica"])
def test_initialisations_that_change_the_base(method: str, init: str) -> None:
    known = "True or False" if method == "scale_lora" else "True, False or 'gaussian'"
    config_refused(method, f"init_lora_weights='{init}', only {known}", init_lora_weights=init)


def test_gaussian_factors_are_no_start_for_scale_lora() -> None:
    CONFIGS["mask_lora"](init_lora_weights="gaussian")
    config_refused("scale_lora", "init_lora_weights='gaussian', only True or False", init_lora_weights="gaussian")


@pytest.mark.parametrize("r", [0, -1, 2.0, "8", True, None])
def test_ranks_that_are_none(method: str, r: object) -> None:
    config_refused(method, f"{NAMES[method]} needs an integer rank of at least 1, got r=", r=r)
    config_refused(method, r"got rank_pattern\['k_proj'\]=", rank_pattern={"k_proj": r})


@pytest.mark.parametrize("alpha", [0, -8, float("nan"), float("inf"), "16", True])
def test_alphas_that_are_none(method: str, alpha: object) -> None:
    if method == "scale_lora":
        config_refused(method, "ScaleLoRA does not support lora_alpha=", lora_alpha=alpha)
        return
    config_refused(method, f"{NAMES[method]} needs a positive finite alpha, got lora_alpha=", lora_alpha=alpha)
    config_refused(method, r"got alpha_pattern\['k_proj'\]=.* 2 r", alpha_pattern={"q_proj": 8, "k_proj": alpha})
    assert CONFIGS[method](lora_alpha=0.5).lora_alpha == 0.5
    model, masks = sparse_model()
    with pytest.raises(ValueError, match="The head's LoRA needs a positive finite alpha, got lora_alpha="):
        prepare_perp(model, "head", masks, r=4, lora_alpha=alpha)


@pytest.mark.parametrize(("name", "small"), [("llama", "k_proj"), ("gpt2", "c_proj"), ("mixtral", "experts.down_proj")])
def test_ranks_that_a_matrix_cannot_have(method: str, name: str, small: str) -> None:
    model, masks = sparse_model(name)
    refused(CONFIGS[method](masks=masks, r=33), model, ValueError, r"r=33 is more than the rank \d+ that '.*' of shape")
    limit = {"k_proj": 16}.get(small, 32)
    fits = CONFIGS[method](masks=masks, r=4, rank_pattern={small: limit})
    get_peft_model(sparse_model(name)[0], fits)
    too_much = CONFIGS[method](masks=masks, r=4, rank_pattern={small: limit + 1})
    refused(too_much, model, ValueError, rf"r={limit + 1} is more than the rank {limit} that '.*{small}' of shape")


@pytest.mark.parametrize("modules", [["up_proj"], ["mlp"], ["norm", "layers.1"]])
def test_modules_to_save_that_hold_a_mask(method: str, modules: list[str]) -> None:
    model, masks = sparse_model()
    for targets in ("pruned", ["q_proj"]):
        config = CONFIGS[method](r=4, masks=masks, modules_to_save=modules, target_modules=targets)
        refused(config, model, ValueError, r"would train a copy of the pruned 'model.layers.\d.* that loses its zeros")


def test_every_option_of_lora_is_known_to_be_fine_or_refused() -> None:
    """A new PEFT with a new option must be looked at before it is silently accepted."""
    fine = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "fan_in_fan_out", "bias"),
        *("use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
        *("rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
        "target_parameters",
    }
    assert {field.name for field in fields(LoraConfig)} == fine | set(CONFIGS["mask_lora"].REFUSED)


def test_target_without_a_mask(method: str) -> None:
    model, masks = sparse_model()
    some = MaskSet({name: masks[name] for name in masks if "q_proj" in name})
    config = CONFIGS[method](masks=some, target_modules=["q_proj", "k_proj"])
    refused(config, model, ValueError, r"Target 'model.layers.0.self_attn.k_proj' has no mask")


def test_target_that_matches_nothing_names_one_that_would(method: str) -> None:
    model, masks = sparse_model()
    config = CONFIGS[method](masks=masks, target_modules=["query"])
    refused(config, model, ValueError, r"matches no module .* 'model.layers.0.self_attn.q_proj'")


def test_all_linear(method: str) -> None:
    model, masks = sparse_model()
    refused(CONFIGS[method](masks=masks, target_modules="all-linear"), model, ValueError, "use 'pruned'")


def test_nothing_left(method: str) -> None:
    model, masks = sparse_model()
    config = CONFIGS[method](masks=masks, exclude_modules=r".*proj")
    refused(config, model, ValueError, "leaves none of 14 masked tensors")


def test_masks_of_another_model(method: str) -> None:
    model, _ = sparse_model("llama")
    _, masks = sparse_model("gpt2")
    refused(CONFIGS[method](masks=masks), model, ValueError, r"no tensor 'transformer.h.0.attn.c_attn.weight'")
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    _, masks = sparse_model("llama")
    refused(CONFIGS[method](masks=masks), wide, ValueError, r"has shape \(32, 32\) but the weight has \(64, 64\)")


def test_masks_of_single_experts_for_a_stack(method: str) -> None:
    model, masks = sparse_model("mixtral")
    name = next(name for name in masks if len(masks.shape(name)) == 3)
    flat = MaskSet({name: masks[name].flatten(0, 1)})
    refused(CONFIGS[method](masks=flat), model, ValueError, rf"Mask for '{name}' has shape \(\d+, \d+\) but the weight")


def test_pruned_weight_that_is_not_zero(method: str) -> None:
    model, masks = sparse_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-6)
    refused(CONFIGS[method](masks=masks), model, RuntimeError, r"pruned weights in 1 tensors are not zero")


def test_quantised_layer(method: str) -> None:
    class Linear4bit(nn.Linear):
        """Stands in for a packed layer: another forward over integer storage."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    model, masks = sparse_model()
    packed = Linear4bit(32, 32)
    packed.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = packed
    refused(
        CONFIGS[method](masks=masks),
        model,
        ValueError,
        r"does not support 'model.layers.0.self_attn.q_proj' of type Linear4bit with torch.uint8",
    )


def test_layer_that_is_no_linear(method: str) -> None:
    model, masks = sparse_model()
    embedding = {"model.embed_tokens.weight": torch.ones(96, 32, dtype=torch.bool)}
    config = CONFIGS[method](masks=MaskSet({**masks, **embedding}))
    refused(config, model, ValueError, r"does not support 'model.embed_tokens' of type Embedding")


def test_tied_head(method: str) -> None:
    model, masks = sparse_model("qwen")
    head = {"lm_head.weight": torch.ones(96, 32, dtype=torch.bool)}
    config = CONFIGS[method](masks=MaskSet({**masks, **head}))
    refused(config, model, ValueError, r"'lm_head.weight' is shared with another module")


def test_weights_that_are_not_in_memory(method: str) -> None:
    model, masks = sparse_model()
    model.to("meta")
    refused(CONFIGS[method](masks=masks), model, ValueError, "is on the meta device")


def test_a_layer_with_ordinary_lora(method: str) -> None:
    model, masks = sparse_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "ordinary")
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' has an adapter of another method"):
        model.add_adapter(CONFIGS[method](masks=masks), "masked")


def test_a_layer_with_another_masked_method(method: str) -> None:
    model, masks = sparse_model()
    other = next(name for name in CONFIGS if name != method)
    model.add_adapter(CONFIGS[other](masks=masks), "first")
    with pytest.raises(ValueError, match=r"'model.layers.0.*' has an adapter of another method \(.*Linear\)"):
        model.add_adapter(CONFIGS[method](masks=masks), "second")


def test_ordinary_lora_on_a_masked_layer_does_not_run(method: str) -> None:
    model, masks = sparse_model()
    model.add_adapter(CONFIGS[method](masks=masks), "masked")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "ordinary")
    with pytest.raises(RuntimeError, match=r"Adapter 'ordinary' has no mask on this layer"):
        model(torch.tensor([[1, 2, 3]]))


def test_second_adapter_while_the_first_is_merged(method: str) -> None:
    model, masks = sparse_model()
    peft_model = adapted(model, masks, method=method)
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapter \['default'\] is merged into .*; unmerge it"):
        peft_model.add_adapter("second", CONFIGS[method](masks=masks))
    assert list(peft_model.peft_config) == ["default"]
    peft_model.unmerge_adapter()
    peft_model.add_adapter("second", CONFIGS[method](masks=masks))


def with_initial_model(model: nn.Module, folder: str) -> None:
    model.save_pretrained(os.path.join(folder, "new"), path_initial_model_for_weight_conversion=folder)


def with_conversion(model: nn.Module, folder: str) -> None:
    from peft import convert_to_lora

    convert_to_lora(model, rank=2)


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (with_initial_model, "of no use to (MaskLoRA|ScaleLoRA|LoRA-Prune)"),
        (with_conversion, "(?i)not support|convert"),
    ],
    ids=["initial model", "conversion"],
)
def test_lora_features_that_would_lose_the_mask(
    method: str, use: Callable[[nn.Module, str], None], match: str, tmp_path: object
) -> None:
    model, masks = sparse_model()
    with pytest.raises((ValueError, TypeError), match=match):
        use(adapted(model, masks, method=method), str(tmp_path))


def test_mixed_models_of_several_methods(method: str) -> None:
    model, masks = sparse_model()
    with pytest.raises(ValueError, match=r"MASKLORA|SCALELORA|LORAPRUNE"):
        get_peft_model(model, CONFIGS[method](masks=masks), mixed=True)


@pytest.mark.slow
def test_without_the_package_the_type_is_unknown(method: str, tmp_path: object) -> None:
    """A process that does not import the adapters stops at the type; it never takes the file for LoRA."""
    import subprocess
    import sys

    model, masks = sparse_model()
    adapted(model, masks, method=method).save_pretrained(str(tmp_path))
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert CONFIGS[method].TYPE.value in done.stderr
