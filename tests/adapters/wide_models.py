"""Tiny models of six families that are wide enough for rank 64 and for the blocks of 4-bit quantisation."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

# bitsandbytes' kernels for the CPU need rows of whole blocks: numbers of inputs are multiples of 64
_SIZES = dict(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
_SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
_KV = dict(intermediate_size=128, num_key_value_heads=2)
_T5 = dict(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
WIDE: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, **_SPECIAL, **_KV)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=128, **_SPECIAL)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_SIZES, **_SPECIAL, ffn_dim=128, word_embed_proj_dim=64)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SIZES, **_SPECIAL, **_KV, num_local_experts=4, num_experts_per_tok=2)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**_SIZES, pad_token_id=2, intermediate_size=128)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5, decoder_start_token_id=0, pad_token_id=2, eos_token_id=1)),
}
