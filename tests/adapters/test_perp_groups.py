"""Which parameters the PERP groups hold, how methods are read, and the published shares of trained parameters."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from adapters.sparse_models import FAMILIES, sparse_model, train
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, tiny_batch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, Qwen3Config

from sparse_ft.adapters import group_parameters, merge_perp, parse_method, prepare_perp, trainable_share
from sparse_ft.adapters.perp import PerpMethod, check_rank, share_by_part
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets

EMBEDDINGS = {
    "llama": "model.embed_tokens.weight",
    "mixtral": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "bert": "bert.embeddings.word_embeddings.weight",
    "t5": "shared.weight",
}
UNTIED = ("llama", "mixtral", "neox")


def declared(model: nn.Module, family: str, group: str) -> set[str]:
    """The group by the parameters' names alone, as these families call them."""
    names = {name for name, _ in model.named_parameters()}
    if group == "biases":
        return {name for name in names if name.endswith(".bias")}
    if group == "norms":
        return {name for name in names if re.search(r"(norm|ln_\d|ln_f)\.(weight|bias)$", name, re.IGNORECASE)}
    if group == "embeddings":
        return {EMBEDDINGS[family]}
    return {"lm_head.weight"} & names


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", ["biases", "norms", "embeddings"])
def test_groups_are_found_by_structure(family: str, group: str) -> None:
    model = TINY[family]()
    found = group_parameters(model, group)
    assert set(found) == declared(model, family, group)
    assert len(found) == len(set(found))
    order = [name for name, _ in model.named_parameters()]
    assert found == sorted(found, key=order.index)


def test_groups_of_a_model_under_an_adapter_keep_their_names() -> None:
    plain = {group: group_parameters(TINY["llama"](), group) for group in ("norms", "head", "embeddings")}
    model, masks = sparse_model("llama")
    prepared = prepare_perp(model, "mask_lora+norms+head+embeddings", masks, r=4)
    assert {group: group_parameters(prepared, group) for group in plain} == plain


def test_a_norm_is_one_by_its_class_and_its_weight() -> None:
    class ScaleNormOfMine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class NormedLinear(nn.Linear):
        """Called like a norm, but with a matrix."""

    model = nn.Sequential(ScaleNormOfMine(), NormedLinear(4, 4, bias=False), nn.LayerNorm(4, elementwise_affine=False))
    assert group_parameters(model, "norms") == ["0.weight"]


def test_norms_of_queries_and_keys_and_the_last_one_are_norms() -> None:
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8))
    found = group_parameters(model, "norms")
    assert {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"} < set(found)
    assert found[-1] == "model.norm.weight" and len(found) == 5


def test_masked_weights_are_in_no_group() -> None:
    model, masks = sparse_model("llama")
    more = {name: masks[name] for name in masks}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        more[name] = torch.rand(model.get_parameter(name).shape) > 0.5
    everything = MaskSet(more)
    everything.apply_(model)
    for group in ("head", "embeddings"):
        with pytest.raises(ValueError, match=f"LlamaForCausalLM has no {group} to train that are not pruned"):
            prepare_perp(model, group, everything)
    with pytest.warns(UserWarning, match="no head to train that are not pruned"):
        prepared = prepare_perp(model, "norms+head", everything)
    assert set(trainable_share(prepared).names) == declared(model, "llama", "norms")


# -- reading methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mask_lora", PerpMethod("mask_lora", ())),
        ("norms+mask_lora", PerpMethod("mask_lora", ("norms",))),
        ("embeddings + norms + biases", PerpMethod(None, ("biases", "norms", "embeddings"))),
        ("head+lora_prune+biases", PerpMethod("lora_prune", ("biases", "head"))),
    ],
)
def test_parts_in_any_order(text: str, expected: PerpMethod) -> None:
    assert parse_method(text) == expected
    assert parse_method(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_lora+nroms", "Unknown part 'nroms' .* Did you mean 'norms'"),
        ("", "Unknown part '' .* Known: mask_lora"),
        ("norms+", r"Method 'norms\+' has a \+ with nothing on one side"),
        ("norms+biases+norms", "'norms' 2 times"),
        ("mask_lora+norms+scale_lora", "two adapters, mask_lora and scale_lora"),
    ],
)
def test_methods_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_method(text)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5"])
def test_no_biases(family: str) -> None:
    model, masks = sparse_model(family)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="has no biases to train; use another group, or an adapter"):
        prepare_perp(model, "biases", masks)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    with pytest.warns(UserWarning, match=r"has no biases to train; the rest of biases\+norms is trained"):
        prepare_perp(model, "biases+norms", masks)
    assert set(trainable_share(model).names) == declared(model, family, "norms")


@pytest.mark.parametrize("method", ["head", "head+norms", "mask_lora+head"])
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "t5"])
def test_a_tied_head_is_refused(family: str, method: str) -> None:
    model, masks = sparse_model(family)
    with pytest.raises(ValueError, match=r"share their weight, so merging LoRA into the head .* untie them"):
        prepare_perp(model, method, masks, r=4)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "t5"])
def test_tied_embeddings(family: str) -> None:
    """By themselves they move with the head; an adapter would train a copy, and the head would keep the old ones."""
    model, masks = sparse_model(family)
    with pytest.raises(ValueError, match=r"with an adapter only a copy .* leave out embeddings"):
        prepare_perp(model, "mask_lora+embeddings", masks, r=4)
    with pytest.warns(UserWarning, match="training the embeddings changes both"):
        prepare_perp(model, "embeddings", masks)
    train(model, steps=1)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_peft_would_untie_embeddings() -> None:
    """The reason for the refusal above, as PEFT does it."""
    model, _ = sparse_model("gpt2")
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["transformer.wte"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
    copy = adapted.get_input_embeddings().modules_to_save["default"].weight
    assert copy.data_ptr() != adapted.get_output_embeddings().weight.data_ptr()


def test_the_way_to_untie_that_the_message_names(tmp_path: Path) -> None:
    model, masks = sparse_model("opt")
    expected = model(**tiny_batch(model)).logits
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.save_pretrained(tmp_path)
    model = OPTForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(model(**tiny_batch(model)).logits, expected)
    embeddings = model.get_input_embeddings().weight.clone()
    prepared = prepare_perp(model, "head", masks, r=4)
    train(prepared)
    prepared.eval()
    trained = prepared(**tiny_batch(model)).logits
    merged = merge_perp(prepared)
    torch.testing.assert_close(merged(**tiny_batch(model)).logits, trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)


def test_refusals_of_prepare() -> None:
    model, masks = sparse_model("llama")
    with pytest.raises(ValueError, match="break_symmetry belongs to scale_lora, not to norms"):
        prepare_perp(model, "norms", masks, break_symmetry=True)
    with pytest.raises(ValueError, match="norms trains no adapter, so it does not take lora_alpha, use_rslora"):
        prepare_perp(model, "norms", masks, lora_alpha=8, use_rslora=True)
    with pytest.raises(ValueError, match=r"r=33 is not between 1 and 32, .* the head's weight \(96, 32\)"):
        prepare_perp(model, "head", masks, r=33)
    prepared = prepare_perp(model, "mask_lora", masks, r=4)
    with pytest.raises(ValueError, match="has an adapter already; merge it"):
        prepare_perp(prepared, "norms", masks)
    with pytest.raises(ValueError, match="Unknown group 'norm'"):
        group_parameters(model, "norm")


@pytest.mark.parametrize("r", [0, -1, 17])
def test_ranks_that_a_weight_cannot_have(r: int) -> None:
    model, masks = sparse_model("llama")
    with pytest.raises(ValueError, match=f"r={r} is not between 1 and "):
        check_rank(model, parse_method("mask_lora"), masks, r)
    check_rank(model, parse_method("mask_lora"), masks, 16)
    check_rank(model, parse_method("norms"), masks, r)


# -- counts ----------------------------------------------------------------------------------------------------------


def test_the_share_counts_every_weight_once() -> None:
    """PEFT keeps the original beside each trained copy; r (o + d) per adapted matrix."""
    model, masks = sparse_model("opt")
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    factors = sum(4 * sum(target.shape) for target in find_targets(model))
    norms, biases = declared(model, "opt", "norms"), declared(model, "opt", "biases")
    prepared = prepare_perp(model, "mask_lora+norms+biases", masks, r=4)
    share = trainable_share(prepared)
    assert share.trainable == factors + sum(sizes[name] for name in norms | biases)
    assert share.total == total + factors
    assert {name for name in share.names if ".lora_" not in name} == norms | biases
    parts = share_by_part(prepared, parse_method("mask_lora+norms+biases"))
    assert parts["mask_lora"].trainable == factors and len(parts["mask_lora"].names) == 2 * len(masks)
    assert set(parts["norms"].names) == norms
    assert set(parts["biases"].names) == biases - norms
    assert sum(part.trainable for part in parts.values()) == share.trainable


def test_the_heads_factors_are_the_heads() -> None:
    model, masks = sparse_model("llama")
    parts = share_by_part(prepare_perp(model, "scale_lora+head", masks, r=4), parse_method("scale_lora+head"))
    assert set(parts["head"].names) == {"lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"}
    assert parts["head"].trainable == 4 * (96 + 32)
    model, masks = sparse_model("llama")
    parts = share_by_part(prepare_perp(model, "head+norms", masks, r=2), parse_method("head+norms"))
    assert {name: part.trainable for name, part in parts.items()} == {"norms": 5 * 32, "head": 2 * (96 + 32)}


def test_shares_of_llama_2_7b() -> None:
    config = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    share = trainable_share(prepare_perp(model, "norms"))
    assert (share.trainable, share.total) == (65 * 4096, 6_738_415_616)
    assert f"{share.share:.7%}"[:7] == "0.00395"
    names = [target.module for target in find_targets(model)]
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=names), low_cpu_mem_usage=True)
    share = trainable_share(adapted)
    assert share.trainable == 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert f"{share.share:.3%}" == "0.590%"


@pytest.mark.parametrize(
    ("hidden", "layers", "biases", "norms", "both", "with_lora", "with_head"),
    [
        (2560, 32, ".0341", ".0126", ".0404", ".922", ".953"),
        (4096, 32, ".0217", ".0080", ".0257", ".589", ".602"),
        (5120, 40, ".0176", ".0065", ".0208", ".478", ".484"),
        (7168, 48, ".0127", ".0046", ".0150", ".344", ".348"),
    ],
    ids=["2.7B", "6.7B", "13B", "30B"],
)
def test_shares_of_opt(
    hidden: int, layers: int, biases: str, norms: str, both: str, with_lora: str, with_head: str
) -> None:
    """Percent of all parameters of OPT, published."""
    config = OPTConfig(
        vocab_size=50272, hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=layers, num_attention_heads=32,
        word_embed_proj_dim=hidden, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model.tie_weights()
    shares = [trainable_share(prepare_perp(model, group)).share for group in ("biases", "norms", "biases+norms")]
    assert [f"{100 * share:.4f}"[1:] for share in shares] == [biases, norms, both]
    group = trainable_share(model).names
    names = [target.module for target in find_targets(model)]
    for more, expected in (([], with_lora), (["lm_head"], with_head)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the head is tied, which counting does not mind
            adapted = get_peft_model(model, LoraConfig(r=16, target_modules=names + more), low_cpu_mem_usage=True)
        for name, parameter in adapted.named_parameters():
            if name.removeprefix("base_model.model.").replace(".base_layer", "") in group:
                parameter.requires_grad_(True)
        # published is the sum of two shares, of the totals with and without the adapter: up to 2e-4 more
        assert 100 * trainable_share(adapted).share == pytest.approx(float(expected), abs=7e-4)
        model = adapted.unload()
