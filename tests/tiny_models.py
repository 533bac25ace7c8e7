"""Tiny transformers models, one of each family, built from configs in code: `TINY["llama"]()`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
_SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_SPECIAL, intermediate_size=48, num_key_value_heads=2))


def _qwen() -> PreTrainedModel:
    config = Qwen2Config(**_SIZES, **_SPECIAL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    return Qwen2ForCausalLM(config)


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**_SIZES, **_SPECIAL, ffn_dim=48, word_embed_proj_dim=32))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=48, **_SPECIAL)
    return GPT2LMHeadModel(config)


def _neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES, **_SPECIAL, intermediate_size=48))


def _mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        **_SIZES, **_SPECIAL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return MixtralForCausalLM(config)


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**_SIZES, pad_token_id=2, intermediate_size=48))


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=2,
        eos_token_id=1,
    )
    return T5ForConditionalGeneration(config)


_BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen": _qwen,
    "opt": _opt,
    "gpt2": _gpt2,
    "neox": _neox,
    "mixtral": _mixtral,
    "bert": _bert,
    "t5": _t5,
}


def _seeded(build: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    def make(seed: int = 0) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build().eval()

    return make


TINY = {name: _seeded(build) for name, build in _BUILDERS.items()}
CAUSAL = [name for name in TINY if name not in ("bert", "t5")]


def tiny_batch(model: PreTrainedModel, *, batch: int = 2, length: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids `(batch, length)` with labels, and decoder ids where the model has a decoder of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
