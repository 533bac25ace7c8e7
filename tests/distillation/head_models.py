"""Tiny models of many families for the tests of output heads: what they do to logits has values that show."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_ft.distillation import output_module

VOCABULARY = 96
_SPECIAL = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
_SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)
_PLAIN = dict(**_SIZES, **_SPECIAL, intermediate_size=48)
_GROUPED = dict(**_PLAIN, num_key_value_heads=2)
_GEMMA = dict(**_GROUPED, head_dim=8)
_WINDOW = dict(**_GEMMA, sliding_window=16, query_pre_attn_scalar=8)
_CODED = dict(
    **_SPECIAL,
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))},
    **{"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    vocab_size=VOCABULARY,
    d_model=32,
    max_position_embeddings=64,
    decoder_start_token_id=0,
)
_T5 = dict(
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
_GPT = dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SPECIAL)
_MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
_EXPERTS = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)


class Family(NamedTuple):
    """A class of model with its config, and what its head is said to be beside the weight."""

    model: str
    config: str
    settings: dict[str, Any]
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "qwen2-tied": Family("Qwen2ForCausalLM", "Qwen2Config", dict(_GROUPED, tie_word_embeddings=True)),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", _GPT),
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", dict(_GPT, rotary_dim=4), bias=True),
    "opt": Family("OPTForCausalLM", "OPTConfig", dict(_SIZES, **_SPECIAL, ffn_dim=48, word_embed_proj_dim=32)),
    "opt-narrow": Family("OPTForCausalLM", "OPTConfig", dict(_SIZES, **_SPECIAL, ffn_dim=48, word_embed_proj_dim=16)),
    "neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _PLAIN),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", dict(_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", dict(_WINDOW, final_logit_softcapping=3.0), softcap=3.0),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", dict(_WINDOW, final_logit_softcapping=3.0), softcap=3.0),
    "nanochat": Family(
        "NanoChatForCausalLM", "NanoChatConfig", dict(_GROUPED, final_logit_softcapping=3.0), softcap=3.0
    ),
    "recurrent_gemma": Family(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        dict(_PLAIN, num_hidden_layers=3, lru_width=32, logits_soft_cap=3.0, attention_window_size=16),
        softcap=3.0,
    ),
    "cohere": Family("CohereForCausalLM", "CohereConfig", dict(_GROUPED, logit_scale=0.37), scale=0.37),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", dict(_GROUPED, logit_scale=0.37), scale=0.37),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", dict(_GROUPED, logits_scaling=5.0), scale=0.2),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        dict(_GROUPED, logits_scaling=5.0, num_local_experts=4, num_experts_per_tok=2),
        scale=0.2,
    ),
    "hyperclovax": Family(
        "HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", dict(_GROUPED, logits_scaling=0.37), scale=0.37
    ),
    "minicpm3": Family("MiniCPM3ForCausalLM", "MiniCPM3Config", dict(_PLAIN, num_key_value_heads=4, dim_model_base=8)),
    "falcon_h1": Family(
        "FalconH1ForCausalLM", "FalconH1Config", dict(_GROUPED, **_MAMBA, lm_head_multiplier=0.37), scale=0.37
    ),
    "inkling": Family(
        "InklingForCausalLM",
        "InklingTextConfig",
        dict(
            _GROUPED,
            **_EXPERTS,
            head_dim=8,
            swa_head_dim=8,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            d_rel=4,
            rel_extent=16,
            unpadded_vocab_size=90,
            logits_mup_width_multiplier=1.5,
        ),
    ),
    "falcon": Family("FalconForCausalLM", "FalconConfig", dict(_SIZES, **_SPECIAL)),
    "phi": Family("PhiForCausalLM", "PhiConfig", _PLAIN, bias=True),
    "mpt": Family(
        "MptForCausalLM",
        "MptConfig",
        dict(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, logit_scale="inv_sqrt_d_model"),
    ),
    "bloom": Family(
        "BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", _PLAIN, bias=True),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", _PLAIN, bias=True),
    "esm": Family("EsmForMaskedLM", "EsmConfig", dict(_PLAIN, mask_token_id=3), bias=True),
    "bart": Family("BartForConditionalGeneration", "BartConfig", _CODED, bias=True),
    "marian": Family("MarianMTModel", "MarianConfig", dict(_CODED, decoder_vocab_size=VOCABULARY), bias=True),
    "pegasus": Family("PegasusForConditionalGeneration", "PegasusConfig", _CODED, bias=True),
    "t5-tied": Family("T5ForConditionalGeneration", "T5Config", _T5),
    "t5-untied": Family(
        "T5ForConditionalGeneration", "T5Config", dict(_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    ),
    "t5gemma": Family(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        dict(encoder=_WINDOW, decoder=dict(_WINDOW, final_logit_softcapping=3.0), vocab_size=VOCABULARY),
        softcap=3.0,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        dict(_CODED, num_mel_bins=8, max_source_positions=8, max_target_positions=64),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """The model with a head of large weights, and random biases everywhere."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(hf, family.model)(getattr(hf, family.config)(**{**family.settings, **settings})).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        head = output_module(model)
        if head is not None:
            head.weight.mul_(10)
    return model.to(dtype)


def batch_of(model: nn.Module) -> dict[str, Tensor]:
    """Random tokens (2, 12), and what else the model reads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    if model.config.model_type == "whisper":
        features = torch.randn(2, 8, 16, generator=generator).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


def states_and_logits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What enters the output module, with its graph, and the logits, of `batch_of` the model."""
    seen: list[Tensor] = []
    hook = output_module(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(**batch_of(model)).logits
    hook.remove()
    (states,) = seen
    return states, logits
