"""The head read from a model turns the states entering its output module into the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from adapters.sparse_models import CONFIGS
from distillation.head_models import FAMILIES, batch_of, build, states_and_logits
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertModel, LlamaForSequenceClassification

from sparse_ft.adapters import prepare_perp
from sparse_ft.distillation import Head, ce_kl_loss, check_head, output_head, output_module
from sparse_ft.distillation.head import head_logits
from sparse_ft.masks import MaskSet

HALVES = (torch.bfloat16, torch.float16)
every_family = pytest.mark.parametrize("name", list(FAMILIES))


def assert_same_logits(model: nn.Module, *, rtol: float = 1e-6) -> None:
    """Relative to the largest logit."""
    with torch.no_grad():
        states, logits = states_and_logits(model)
        ours = head_logits(states.flatten(0, -2), output_head(model), states.dtype).view(logits.shape)
    assert (ours - logits).abs().max() <= rtol * logits.abs().max()


def with_lora(model: nn.Module, **settings: Any) -> PeftModel:
    """LoRA on the head and inside, far from where it starts."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], **settings}
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(**settings)).eval()
    return randomised(adapted)


@torch.no_grad()
def randomised(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_alike(model: nn.Module, trained: str) -> None:
    """Cross-entropy through the head and through the model's own logits: equal loss, equal gradients of everything."""
    labels = batch_of(model)["input_ids"]
    _, logits = states_and_logits(model)
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    expected = gradients(model, plain)
    states, _ = states_and_logits(model)
    loss = ce_kl_loss(states, labels, head=output_head(model)).total
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    got = gradients(model, loss)
    assert got.keys() == expected.keys()
    assert any(trained in name and grad.abs().max() > 1e-4 for name, grad in got.items())
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():
        assert (got[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6 * largest, name


@every_family
def test_the_head_gives_the_logits_of_the_model(name: str) -> None:
    model, family = build(name), FAMILIES[name]
    head = output_head(model)
    assert (head.bias is not None, head.softcap) == (family.bias, family.softcap)
    assert head.scale == pytest.approx(family.scale)
    states, logits = states_and_logits(model)
    assert states.shape[-1] == head.weight.shape[1] and logits.shape[-1] == len(head.weight)
    assert logits.std() > 0.05
    assert_same_logits(model)
    check_head(head, states[0], logits[0], model=model)


@every_family
def test_rounding_passes_the_check(name: str) -> None:
    model = build(name)
    head = output_head(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states, logits = states_and_logits(model)
        check_head(head, states[0, :4], logits[0, :4])
    if not hasattr(model, "final_logits_bias"):  # which is added in fp32
        check_head(head, states[0, :4], logits[0, :4].float())
    for dtype in HALVES:
        model.to(dtype)
        with torch.no_grad():
            states, logits = states_and_logits(model)
        check_head(output_head(model), states[0, :4], logits[0, :4])


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite", "bart", "phi", "esm", "inkling"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_check_fails_for_another_head(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    head = output_head(model)
    with torch.no_grad():
        states, logits = (t[0, :4] for t in states_and_logits(model))
    wrong = [head._replace(scale=head.scale * 1.1), head._replace(weight=head.weight.roll(1, 0))]
    if head.softcap is not None:
        wrong += [head._replace(softcap=None), head._replace(softcap=head.softcap * 1.2)]
    if head.bias is not None:
        wrong += [head._replace(bias=None), head._replace(bias=head.bias.roll(1))]
    for other in wrong:
        with pytest.raises(
            RuntimeError, match=rf"The logits of model type '{model.config.model_type}' differ by up to "
        ):
            check_head(other, states, logits, model=model)
    with pytest.raises(RuntimeError, match="shape"):
        check_head(head._replace(weight=head.weight[:-1]), states, logits)


def test_the_check_sees_one_wrong_logit_and_names_the_largest_difference() -> None:
    head, states = Head(torch.eye(4)), torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 1]])
    check_head(head, states, states)
    for value, says in ((-1e30, "1e[+]30"), (3.5, "0.5 from"), (torch.nan, "nan")):
        logits = states.clone()
        logits[0, 3] = value
        with pytest.raises(RuntimeError, match=f"up to {says}"):
            check_head(head, states, logits)


@pytest.mark.parametrize("what", ["base", "classifier"])
def test_models_without_a_head(what: str) -> None:
    bert, llama = build("bert").config, build("llama").config
    model = BertModel(bert) if what == "base" else LlamaForSequenceClassification(llama)
    assert output_module(model) is None
    with pytest.raises(ValueError, match="has no output embeddings"):
        output_head(model)


def test_what_no_head_expresses_is_refused() -> None:
    model = build("llama")
    model.config.model_type = "chameleon"
    with pytest.raises(ValueError, match=r"'chameleon' overwrites the logits of its image tokens.*kl_weight to 0"):
        output_head(model)
    model = build("llama")
    model.lm_head = nn.Embedding(96, 32)
    with pytest.raises(ValueError, match="'llama' is a Embedding"):
        output_head(model)


def test_the_config_of_the_inner_model_counts() -> None:
    inner = build("gemma2")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model = inner
            self.config = build("llama").config

        def get_output_embeddings(self) -> nn.Module:
            return self.language_model.get_output_embeddings()

    assert output_head(Outer()).softcap == 3.0
    assert output_module(nn.parallel.DataParallel(inner)) is inner.lm_head


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2", "gemma2", "cohere", "phi", "llama"])
def test_gradients_of_a_plain_head_are_the_models_own(name: str) -> None:
    model = build(name)
    embedding, head = model.get_input_embeddings().weight, output_head(model).weight
    tied = model.config.get_text_config().tie_word_embeddings
    assert (head is embedding) == tied
    assert_trains_alike(model, "embed" if tied and name != "gpt2" else "wte" if tied else "lm_head")


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "copy": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "dropout-in-eval": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("name", ["llama", "cohere", "phi"])
def test_an_adapted_head_trains_as_in_the_model(name: str, settings: str) -> None:
    model = with_lora(build(name, tie_word_embeddings=False), **SETTINGS[settings])
    assert_same_logits(model, rtol=1e-5)
    assert_trains_alike(model, "lm_head.modules_to_save" if settings == "copy" else "lm_head.lora_A")


def test_bias_of_lora_counts() -> None:
    assert_same_logits(with_lora(build("phi"), lora_bias=True), rtol=1e-5)


def test_active_merged_and_disabled_adapters() -> None:
    model = with_lora(build("llama"))
    frozen = model.get_output_embeddings().base_layer.weight
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    randomised(model)
    one = output_head(model).weight
    model.base_model.set_adapter(["default", "other"])
    both = output_head(model).weight
    assert not torch.allclose(one, both)
    assert_same_logits(model, rtol=1e-5)
    with model.disable_adapter():
        assert output_head(model).weight is frozen
        assert_same_logits(model)
    model.merge_adapter()
    assert output_head(model).weight is frozen
    torch.testing.assert_close(frozen, both)
    assert_same_logits(model)
    model.unmerge_adapter()
    copied = with_lora(build("llama"), modules_to_save=["lm_head"], target_modules=["q_proj"])
    with copied.disable_adapter():
        assert_same_logits(copied)


def test_the_sum_of_weight_and_lora_is_not_rounded_to_16_bits() -> None:
    model = with_lora(build("llama", torch.bfloat16))
    layer = model.get_output_embeddings()
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.autocast("cpu", torch.bfloat16):
        weight = output_head(model).weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, layer.base_layer.weight.float() + 1.5 * B @ A, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        states, logits = states_and_logits(model)
        check_head(output_head(model), states[0], logits[0])


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("dense", [True, False])
def test_heads_with_the_adapters_of_this_package(method: str, dense: bool) -> None:
    model = build("llama")
    weight = model.lm_head.weight
    pruned = ["model.layers.0.mlp.up_proj.weight", *([] if dense else ["lm_head.weight"])]
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters() if name in pruned}
    masks = MaskSet.from_scores(scores, sparsity=0.5, input_dims=dict.fromkeys(scores, 1))
    masks.apply_(model)
    if dense:
        model = prepare_perp(model, f"{method}+head", masks, r=4).eval()
    else:
        model = get_peft_model(model, CONFIGS[method](r=4, masks=masks)).eval()
    randomised(model)
    if method == "lora_prune" and not dense:  # its forward pass is W + c B A, its delta what merging adds, c (B A) ∘ m
        with pytest.raises(ValueError, match="LoRA-Prune adapter"):
            output_head(model)
        return
    assert output_head(model).weight is not weight
    assert_same_logits(model, rtol=1e-5)
    assert_trains_alike(model, "lm_head.lora_A")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_dropout": 0.1}, "has lora_dropout 0.1"),
        ({"use_dora": True}, "is a DoraLinearVariant"),
        ({"trainable_token_indices": [3], "target_modules": ["q_proj"]}, "TrainableTokens"),
        (None, "adapter, but only LoRA"),
    ],
)
def test_adapters_without_a_known_effective_weight_are_refused(settings: dict[str, Any] | None, says: str) -> None:
    model = build("llama", tie_word_embeddings=settings is not None and "trainable_token_indices" in settings)
    if settings is None:
        model = get_peft_model(model, IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    else:
        model = with_lora(model, **settings)
    with pytest.raises(ValueError, match=says):
        output_head(model.train())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_heads(bits: int, adapted: bool, compute: torch.dtype) -> None:
    model = build("llama", compute, hidden_size=64, tie_word_embeddings=False)
    model.lm_head = packed(model.lm_head, bits, compute)
    head = output_head(model)
    assert head.weight.shape == (96, 64) and not head.weight.requires_grad
    if adapted:
        model = with_lora(model, target_modules=["lm_head"])
    for _ in range(2):  # the first evaluation would repack a 4-bit weight
        with torch.no_grad():
            states, logits = states_and_logits(model)
        check_head(output_head(model), states[0], logits[0], model=model)
    if adapted and compute == torch.float32 and bits == 4:
        assert_trains_alike(model, "lm_head.lora_A")


def packed(linear: nn.Linear, bits: int, compute: torch.dtype) -> nn.Module:
    size = (linear.in_features, linear.out_features, False)
    if bits == 4:
        layer = bnb.nn.Linear4bit(*size, compute_dtype=compute, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").eval()


def test_a_repacked_head_is_refused() -> None:
    model = build("llama", hidden_size=64, tie_word_embeddings=False)
    model.lm_head = packed(model.lm_head, 4, torch.float32)
    model.lm_head.support_avx512bf16_for_cpu = True
    before = output_head(model).weight
    assert not model.lm_head.support_avx512bf16_for_cpu
    assert torch.equal(output_head(model).weight, before)
    model.lm_head.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="has repacked the output head of model type 'llama'"):
        output_head(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: torch.empty(0), "is sharded"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "float8"),
        (lambda weight: weight.to("meta"), "on meta"),
    ],
)
def test_weights_that_are_not_there_are_refused(change: Callable[[Tensor], Tensor], says: str) -> None:
    model = build("llama")
    model.lm_head.weight = nn.Parameter(change(model.lm_head.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=says):
        output_head(model)


def test_a_distributed_tensor_is_refused() -> None:
    model = build("llama")
    model.lm_head.weight = nn.Parameter(_Sharded(model.lm_head.weight.detach()))
    with pytest.raises(ValueError, match="is sharded"):
        output_head(model)


class _Sharded(Tensor):
    """What tells a DTensor: a type of its own with placements."""

    placements = ("Shard(0)",)
