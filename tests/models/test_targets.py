"""Targets are the linear weights of the repeated blocks, and nothing else."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY, tiny_batch
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from sparse_ft.models import canonical_name, find_blocks, find_targets, load_skeleton, matrix_view, named_weights

EXPECTED = {
    "llama": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "qwen": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "opt": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    "mixtral": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    + ["mlp.experts", "mlp.experts"],
    "bert": ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
    + ["intermediate.dense", "output.dense"],
}
PREFIX = {
    "llama": "model.layers",
    "qwen": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "neox": "gpt_neox.layers",
    "mixtral": "model.layers",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("family", EXPECTED)
def test_target_modules_are_exactly_these(family: str) -> None:
    modules = [t.module for t in find_targets(TINY[family]())]
    assert modules == [f"{PREFIX[family]}.{block}.{tail}" for block in (0, 1) for tail in EXPECTED[family]]


def test_t5_targets_cover_both_stacks() -> None:
    attention = [f"layer.0.SelfAttention.{p}" for p in "qkvo"]
    feed_forward = ["DenseReluDense.wi", "DenseReluDense.wo"]
    encoder = attention + [f"layer.1.{p}" for p in feed_forward]
    decoder = attention + [f"layer.1.EncDecAttention.{p}" for p in "qkvo"] + [f"layer.2.{p}" for p in feed_forward]
    expected = [f"encoder.block.{b}.{t}" for b in (0, 1) for t in encoder]
    expected += [f"decoder.block.{b}.{t}" for b in (0, 1) for t in decoder]
    assert [t.module for t in find_targets(TINY["t5"]())] == expected


@pytest.mark.parametrize("family", TINY)
def test_input_dim_is_the_axis_the_inputs_run_along(family: str) -> None:
    """Zeroing one input's slice of a weight makes the module ignore that input: the orientation is what it says."""
    model = TINY[family]()
    for target in find_targets(model):
        if target.kind == "experts":
            continue
        module = model.get_submodule(target.module)
        view = matrix_view(module.weight.data, target.input_dim)
        assert view.shape[-1] == target.in_features
        with torch.no_grad():
            view[:, 0] = 0
            x = torch.randn(3, target.in_features)
            changed = x.clone()
            changed[:, 0] += 1
            assert torch.equal(module(x), module(changed))


def _gpt_oss() -> nn.Module:
    config = GptOssConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, num_local_experts=4,
    )  # fmt: skip
    return GptOssForCausalLM(config)


@pytest.mark.parametrize(("build", "input_dim"), [(TINY["mixtral"], 2), (_gpt_oss, 1)])
def test_fused_experts_have_their_orientation(build: object, input_dim: int) -> None:
    model = build()  # type: ignore[operator]
    hidden = model.config.hidden_size
    experts = {t.name.rsplit(".", 1)[1]: t for t in find_targets(model) if t.kind == "experts"}
    assert set(experts) == {"gate_up_proj", "down_proj"}
    assert all(t.input_dim == input_dim for t in experts.values())
    assert experts["gate_up_proj"].in_features == hidden
    assert experts["down_proj"].in_features == model.config.intermediate_size


def test_routers_and_single_output_gates_are_left_alone() -> None:
    config = Qwen2MoeConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, moe_intermediate_size=8, shared_expert_intermediate_size=12, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    names = [t.name for t in find_targets(Qwen2MoeForCausalLM(config))]
    assert any("shared_expert.up_proj" in n for n in names)
    assert not any(n.endswith(("mlp.gate.weight", "shared_expert_gate.weight")) for n in names)


class _SeparateExperts(nn.Module):
    """The classic layout: a router Linear beside a ModuleList of expert Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"gate": nn.Linear(8, 3), "experts": self._experts()})])

    @staticmethod
    def _experts() -> nn.ModuleList:
        return nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])


class _Tied(nn.Module):
    """Inside its blocks, a weight shared with the embedding and one shared between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({k: nn.Linear(8, 8) for k in ("own", "head", "again")})])
        self.layers[0]["head"].weight = self.embedding.weight  # type: ignore[index]
        self.layers[0]["again"].weight = self.layers[0]["own"].weight  # type: ignore[index]


def test_weights_tied_to_an_embedding_are_left_alone_and_shared_ones_are_listed_once() -> None:
    assert [t.module for t in find_targets(_Tied())] == ["layers.0.own"]


class _StackedExperts(nn.Module):
    """Fused experts that do not say which way round their weights are."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        shapes = [(4, 8, 24), (4, 12, 8)] if transposed else [(4, 24, 8), (4, 8, 12)]
        self.gate_up_proj, self.down_proj = (nn.Parameter(torch.randn(*shape)) for shape in shapes)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_hidden_size_tells_the_orientation_of_experts_that_do_not(transposed: bool) -> None:
    block = nn.ModuleDict({"experts": _StackedExperts(transposed)})
    targets = find_targets(nn.ModuleDict({"layers": nn.ModuleList([block])}))
    assert [t.in_features for t in targets] == [8, 12]


def test_router_beside_separate_experts_is_left_alone() -> None:
    assert [t.module for t in find_targets(_SeparateExperts())] == [f"layers.0.experts.{e}.0" for e in range(3)]


def _switch() -> nn.Module:
    config = SwitchTransformersConfig(
        vocab_size=96, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)


def _jetmoe() -> nn.Module:
    config = JetMoeConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=24,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return JetMoeForCausalLM(config)


@pytest.mark.parametrize("build", [_switch, _jetmoe])
def test_routers_that_hold_their_linear_inside_are_left_alone(build: object) -> None:
    model = build()  # type: ignore[operator]
    names = [t.name for t in find_targets(model)]
    assert any("experts" in name for name in names)
    assert any("router" in name for name, _ in model.named_parameters())
    assert not any("router" in name for name in names)


@pytest.mark.parametrize("family", TINY)
def test_targets_of_the_empty_skeleton_are_the_same(family: str, tmp_path: object) -> None:
    model = TINY[family]()
    model.save_pretrained(tmp_path)
    skeleton = load_skeleton(str(tmp_path))
    assert find_targets(skeleton) == find_targets(model)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert all(b.device.type == "cpu" for b in skeleton.buffers())


def test_blocks_run_in_the_order_they_are_listed() -> None:
    for family in TINY:
        model, order = TINY[family](), list[str]()
        blocks = find_blocks(model)
        for name, block in blocks:
            block.register_forward_pre_hook(lambda _m, _a, name=name, order=order: order.append(name))
        model(**tiny_batch(model))
        assert order == [name for name, _ in blocks], family


def test_exclude_removes_what_it_names_and_refuses_what_matches_nothing() -> None:
    model = TINY["llama"]()
    left = [t.module for t in find_targets(model, exclude=["k_proj", "layers.0.*"])]
    assert left and not any("k_proj" in m or ".0." in m for m in left)
    with pytest.raises(ValueError, match="'kproj' matches none of the 14 prunable modules"):
        find_targets(model, exclude=["kproj"])
    with pytest.raises(ValueError, match="leaves none"):
        find_targets(model, exclude=["layers.*"])


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no prunable weight"):
        find_targets(nn.Sequential(nn.Linear(4, 4)))


def test_wrapped_models_have_the_plain_names() -> None:
    from peft import LoraConfig, get_peft_model

    model = TINY["gpt2"]()
    plain, names = find_targets(model), set(named_weights(model))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    assert find_targets(wrapped) == plain
    assert names <= set(named_weights(wrapped))
    assert canonical_name("module._orig_mod.base_model.model.a.base_layer.weight") == "a.weight"
