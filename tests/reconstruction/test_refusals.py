"""Bad input is refused in one sentence that names it, before any work; the model is untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters.sparse_models import adapted
from reconstruction.pairs import QUICK, bits, changed, pair, texts
from tiny_models import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.masks import MaskSet
from sparse_ft.reconstruction import reconstruct

ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "granularity": (dict(granularity="attn-mlp"), ("granularity", "attn-mlp", "'attn_mlp'")),
    "stream": (dict(stream="dens"), ("stream", "dens", "'dense'")),
    "train": (dict(train="mask_lra"), ("mask_lra", "'mask_lora'")),
    "train, second part": (dict(train="full+norm"), ("norm", "'norms'")),
    "head": (dict(train="full+head"), ("'head'", "outside the blocks")),
    "embeddings": (dict(train="embeddings"), ("'embeddings'", "outside the blocks")),
    "two ways": (dict(train="full+mask_lora"), ("full+mask_lora", "choose one")),
    "two adapters": (dict(train="scale_lora+mask_lora"), ("two adapters",)),
    "twice": (dict(train="full+norms+norms"), ("norms", "2 times")),
    "NaN learning rate": (dict(learning_rate=float("nan")), ("learning rate", "nan")),
    "infinite learning rate": (dict(learning_rate=float("inf")), ("learning rate", "inf")),
    "no learning rate": (dict(learning_rate=0.0), ("learning rate", "0.0")),
    "text as learning rate": (dict(learning_rate="1e-4"), ("learning rate", "'1e-4'")),
    "iterations": (dict(iterations=-1), ("iterations", "-1")),
    "batch size": (dict(batch_size=0), ("batch_size", "0")),
    "rank": (dict(train="mask_lora", r=0), ("r is 0",)),
    "lora_alpha": (dict(lora_alpha=8), ("lora_alpha", "full")),
    "no scale": (dict(train="mask_lora", lora_alpha=0), ("lora_alpha is 0", "positive")),
    "negative scale": (dict(train="lora_prune", lora_alpha=-8), ("lora_alpha is -8", "positive")),
    "NaN scale": (dict(train="mask_lora+norms", lora_alpha=float("nan")), ("lora_alpha is nan", "positive")),
    "infinite scale": (dict(train="mask_lora", lora_alpha=float("inf")), ("lora_alpha is inf", "positive")),
    "text as scale": (dict(train="mask_lora", lora_alpha="32"), ("lora_alpha is '32'", "positive")),
    "warmup": (dict(warmup=-0.1), ("warmup", "-0.1")),
    "autocast": (dict(autocast=torch.float16), ("float16", "bfloat16")),
    "few samples": (dict(batch_size=9), ("6 calibration sequences", "takes 9")),
    "no calibration": (dict(calibration=None), ("calibration",)),
    "text as calibration": (dict(calibration="some text"), ("some text", "token ids")),
    "empty calibration": (dict(calibration=[]), ("no tokens",)),
    "ids of another tokenizer": (dict(calibration=[torch.tensor([[96, 3]])]), ("96", "vocabulary")),
    "empty group alone": (dict(train="biases"), ("LlamaForCausalLM", "no biases")),
    "norms of a matrix": (dict(granularity="linear", train="full+norms"), ("linear", "norms")),
    "drift of a matrix": (dict(granularity="linear", stream="sparse_to_dense"), ("linear", "sparse_to_dense")),
}  # fmt: skip


def refused(naming: tuple[str, ...], kind: type[Exception] = ValueError, **options: Any) -> None:
    model, masks, dense = pair("llama")
    arguments: dict[str, Any] = dict(model=model, masks=masks, dense=dense, calibration=texts(), progress=False)
    arguments |= options
    before = bits(arguments["model"])
    with pytest.raises(kind) as caught:
        reconstruct(**arguments)
    sentence = str(caught.value)
    assert all(part in sentence for part in naming), sentence
    assert "\n" not in sentence and sentence.endswith((".", "?"))
    assert not changed(arguments["model"], before)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    options, naming = ARGUMENTS[case]
    refused(naming, **options)


def _larger() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


DENSE: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "another architecture": (TINY["gpt2"], ("model.embed_tokens.weight", "dense model has none")),
    "another shape": (_larger, ("mlp.gate_proj.weight", "(48, 32)", "(64, 32)")),
    "more tensors": (TINY["qwen"], ("q_proj.bias", "sparse model has none")),
    "another dtype": (lambda: TINY["llama"]().bfloat16(), ("float32", "bfloat16")),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_models(case: str) -> None:
    build, naming = DENSE[case]
    refused(naming, dense=build())


def test_the_model_itself_is_no_dense_model() -> None:
    model, masks, _ = pair("llama")
    refused(("the sparse model itself",), model=model, masks=masks, dense=model)


@pytest.mark.parametrize("which", ["model", "dense"])
def test_quantised_models(which: str) -> None:
    """As bitsandbytes leaves a weight: two 4-bit codes per byte in one column, or one per weight in a subclass."""

    class Params4bit(torch.nn.Parameter):
        pass

    model, masks, dense = pair("llama")
    one = {"model": model, "dense": dense}[which]
    layer = one.model.layers[0].self_attn.q_proj
    codes = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = torch.nn.Parameter._make_subclass(Params4bit, codes, False)
    name = {"model": "sparse", "dense": "dense"}[which]
    naming = (f"The {name} model is quantised", "q_proj.weight", "Params4bit of uint8 (512, 1)", "unquantised model")
    refused(naming, model=model, masks=masks, dense=dense)


def test_masks_of_another_model() -> None:
    refused(("no tensor 'transformer.h.0",), masks=pair("gpt2")[1])


def test_weights_that_are_not_pruned() -> None:
    model, masks, dense = pair("llama")
    refused(("are not zero",), kind=RuntimeError, model=dense, masks=masks, dense=model)


def test_masks_outside_the_blocks() -> None:
    model, _, dense = pair("llama")
    outside = MaskSet({"lm_head.weight": torch.ones(96, 32, dtype=torch.bool)})
    refused(("lm_head.weight", "LlamaForCausalLM"), model=model, masks=outside, dense=dense)


def test_a_model_with_an_adapter() -> None:
    model, masks, dense = pair("llama")
    adapted(model, masks)
    refused(("sparse model has an adapter",), model=model, masks=masks, dense=dense)


def test_a_group_that_is_empty_beside_others_is_left_out_with_a_warning() -> None:
    """Llama has no biases: the rest is trained as if they had not been named."""
    model, masks, dense = pair("llama")
    other = pair("llama")[0]
    with pytest.warns(UserWarning, match="blocks of LlamaForCausalLM have no biases .*rest of full") as caught:
        reconstruct(model, masks, dense, calibration=texts(), train="full+biases", **QUICK)
    assert caught[0].filename == __file__
    reconstruct(other, masks, dense, calibration=texts(), train="full", **QUICK)
    assert not changed(model, bits(other))
