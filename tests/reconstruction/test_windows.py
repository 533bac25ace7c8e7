"""Blocks are cut where the attention's result is complete, and their parts run in a row are the block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from reconstruction.pairs import FAMILIES, forward_inputs, hidden, texts
from tiny_models import TINY
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from sparse_ft.models import find_blocks
from sparse_ft.pruning.replay import map_tensors
from sparse_ft.reconstruction.windows import Arguments, Window, WindowCopy, find_windows

_SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
OTHERS: dict[str, Callable[[], Any]] = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    ),
    "neox in a row": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_SIZES, intermediate_size=48, use_parallel_residual=False)
    ),
    "opt post-norm": lambda: OPTForCausalLM(
        OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES, intermediate_size=48)),
    "llama, eager": lambda: _eager(TINY["llama"]()),
}


def _eager(model: Any) -> Any:
    model.set_attn_implementation("eager")
    return model


def build(name: str) -> Any:
    torch.manual_seed(0)
    return (OTHERS[name]() if name in OTHERS else TINY[name]()).eval()


def calls_of_blocks(model: Any) -> list[tuple[str, nn.Module, Callable[[], Arguments]]]:
    """Each block with a function that gives copies of the arguments the model calls it with."""
    given: dict[nn.Module, Arguments] = {}
    blocks = find_blocks(model)
    hooks = [
        block.register_forward_pre_hook(lambda module, a, k: given.update({module: (a, k)}), with_kwargs=True)
        for _, block in blocks
    ]
    with torch.no_grad():
        model(**forward_inputs(model, texts()[0]))
    for hook in hooks:
        hook.remove()
    return [(name, block, partial(map_tensors, given[block], torch.clone)) for name, block in blocks]


CUTS = {
    "llama": ["post_attention_layernorm"],
    "llama, eager": ["post_attention_layernorm"],
    "gpt2": ["ln_2"],
    "opt": ["final_layer_norm"],
    "opt post-norm": ["self_attn_layer_norm"],
    "mixtral": ["post_attention_layernorm"],
    "bert": ["intermediate"],
    "gemma2": ["pre_feedforward_layernorm"],
    "neox in a row": ["post_attention_layernorm"],
    "neox": [],
    "gptj": [],
    "phi": [],
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name: str) -> None:
    for _, block, fresh in calls_of_blocks(build(name)):
        windows = find_windows(block, fresh, "attn_mlp", [])
        assert [window.stop for window in windows if window.stop] == CUTS[name]
        assert [window.name for window in windows] == (["attn", "mlp"] if CUTS[name] else ["block"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "gemma2", "t5"])
def test_only_hidden_states_are_handed_on(name: str) -> None:
    """But for T5, whose first blocks also hand on the bias of positions that their attention made."""
    for _, block, fresh in calls_of_blocks(build(name)):
        windows = find_windows(block, fresh, "attn_mlp", [])
        assert [window.is_rest for window in windows[:-1]] == [False] * (len(windows) - 1)
        assert windows[-1].is_rest is (name != "t5")


class Sharing(nn.Module):
    """A block whose attention leaves something in a dictionary for later blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor, shared: Any) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize(("shared", "expected"), [(None, True), ({}, False), (object(), False)])
def test_what_might_be_written_into_is_handed_on(shared: Any, expected: bool) -> None:
    windows = find_windows(Sharing(), lambda: ((torch.ones(2, 3, 4),), {"shared": shared}), "attn_mlp", [])
    assert [window.is_rest for window in windows] == [False, expected]


def test_both_attentions_of_a_decoder_are_windows() -> None:
    kinds = {}
    for name, block, fresh in calls_of_blocks(build("t5")):
        windows = find_windows(block, fresh, "attn_mlp", [])
        kinds[name.split(".")[0]] = [(window.name, window.modules, window.stop) for window in windows]
    assert kinds["encoder"] == [("attn", ("layer.0",), "layer.1"), ("mlp", ("layer.1",), None)]
    assert kinds["decoder"] == [
        ("attn", ("layer.0",), "layer.1"),
        ("attn2", ("layer.1",), "layer.2"),
        ("mlp", ("layer.2",), None),
    ]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_windows_own_every_weight_once(name: str) -> None:
    for _, block, fresh in calls_of_blocks(build(name)):
        windows = find_windows(block, fresh, "attn_mlp", [])
        for weight, _ in block.named_parameters():
            assert sum(window.owns(weight) for window in windows) == 1, weight


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("share", [True, False])
@torch.no_grad()
def test_windows_in_a_row_are_the_block(name: str, share: bool) -> None:
    """Each window's end is what the block itself has there; replayed outputs stand for the modules, bit for bit."""
    for _, block, fresh in calls_of_blocks(build(name)):
        windows = find_windows(block, fresh, "attn_mlp", [])
        whole = WindowCopy(block, Window("block"), watch=[w.stop for w in windows if w.stop])
        expected = hidden(block(*fresh()[0], **fresh()[1]))
        assert torch.equal(whole(fresh()), expected)
        replayed: dict[str, Any] = {}
        for window in windows:
            needed = {p: unused for w in windows for p, unused in w.unused.items() if p in window.modules}
            part = WindowCopy(block, window, share=share, record=needed)
            result = part(fresh(), replayed)
            assert torch.equal(result, whole.seen[window.stop] if window.stop else expected)
            replayed.update(part.outputs)


@torch.no_grad()
def test_frozen_parts_are_not_run_again() -> None:
    """In the MLP's window the attention is not called, in the attention's the MLP is not; neither has its weights."""
    _, block, fresh = calls_of_blocks(build("llama"))[0]
    attention, mlp = find_windows(block, fresh, "attn_mlp", [])
    first = WindowCopy(block, attention, share=False, record=mlp.unused)
    first(fresh())
    second = WindowCopy(block, mlp, share=False)
    second(fresh(), first.outputs)
    names = [{name.split(".")[0] for name, _ in part.module.named_parameters()} for part in (first, second)]
    assert names == [
        {"self_attn", "input_layernorm"},
        {"mlp", "input_layernorm", "post_attention_layernorm"},
    ]


def test_attention_weights_that_nobody_reads_are_not_kept() -> None:
    _, block, fresh = calls_of_blocks(build("llama, eager"))[0]
    windows = find_windows(block, fresh, "attn_mlp", [])
    part = WindowCopy(block, windows[0], record=windows[1].unused)
    part(fresh())
    output = part.outputs["self_attn"]
    assert isinstance(output[0], Tensor) and output[1] is None


class InPlace(nn.Module):
    """A block that writes into its input, into the attention's output and into what it has given to the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.mlp = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.attention(x)
        x += found
        found.zero_()
        y = self.mlp(self.norm(x))
        x *= 2
        x += y
        return x


@torch.no_grad()
def test_blocks_that_write_in_place() -> None:
    torch.manual_seed(0)
    block, x = InPlace().eval(), torch.randn(2, 3, 4)
    middle = x + block.attention(x)
    expected = block(x.clone())
    windows = find_windows(block, lambda: ((x.clone(),), {}), "attn_mlp", [])
    assert [window.stop for window in windows] == ["norm", None]
    whole = WindowCopy(block, Window("block"), watch=["norm"], record=windows[1].unused)
    assert torch.equal(whole(((x.clone(),), {})), expected) and torch.equal(whole.seen["norm"], middle)
    part = WindowCopy(block, windows[1])
    assert torch.equal(part(((x.clone(),), {}), whole.outputs), expected)


def test_a_block_without_attention_is_one_window() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert find_windows(block, lambda: ((torch.ones(2, 4),), {}), "attn_mlp", []) == [Window("block")]


def test_matrices_are_in_the_order_of_their_calls() -> None:
    _, block, fresh = calls_of_blocks(build("gpt2"))[0]
    names = ["mlp.c_proj.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "attn.c_attn.weight"]
    windows = find_windows(block, fresh, "linear", names)
    assert [window.name for window in windows] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert all(window.alone for window in windows)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_block_is_left_alone(name: str) -> None:
    _, block, fresh = calls_of_blocks(build(name))[0]
    block.train()
    before = {n: (p, p._version, p.requires_grad) for n, p in block.named_parameters()}
    for granularity in ("attn_mlp", "block", "linear"):
        find_windows(block, fresh, granularity, ["self_attn.q_proj.weight"])
    assert all(module.training and not module._forward_hooks for module in block.modules())
    assert not any(module._forward_pre_hooks for module in block.modules())
    for n, parameter in block.named_parameters():
        assert before[n] == (parameter, parameter._version, parameter.requires_grad) and parameter.grad is None
