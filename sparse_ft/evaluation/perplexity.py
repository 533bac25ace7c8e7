"""Perplexity of a causal language model, with the protocol it was measured under.

    perplexity = exp(mean over scored tokens of -log p(token | tokens before it in the window))

Two perplexities compare only when sequence length, stride, tokenizer and text agree, so a result carries all of them
and prints them with the number.

    ids = tokenize(load_text("wikitext-2", split="test"), tokenizer)
    result = perplexity(model, ids, sequence_length=256, dataset="wikitext-2", split="test")
    print(result)      # perplexity ...: wikitext-2 test, ... windows of 256 tokens (no overlap, ...), ...

Windows do not overlap by default and the first token of each, which has no context, is not scored: the protocol of the
pruning papers. With `stride` smaller than the length, windows overlap and each scores only the tokens no window before
it has seen, all of them with at least `sequence_length - stride` tokens to their left. What is left of the text after
the last whole window is not scored.

Limits: causal models only. Nothing is added to the text: no BOS token is put in front of a window.

Source: windows that overlap and score their new tokens only: Baevski & Auli 2019 (arXiv 1809.10853), evaluation.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from sparse_ft.evaluation.model_facts import (
    class_name,
    config_of,
    dtype_line,
    eval_mode,
    sees_the_right,
    short_dtype,
    unwrapped,
)

# Logits are cast to fp32 this many values at a time (64 MiB), whatever the vocabulary and the batch.
_LOGITS_PER_CHUNK = 2**24


class EvaluationProtocol(dict[str, Any]):
    """What must be equal for two perplexities to compare; a dict whose `str` is one readable line.

    Keys: `dataset`, `split`, `sequence_length`, `stride`, `windows`, `tokens` (scored), `text_tokens` (in the whole
    text), `dtype`, `attention`, `bos`.
    """

    def __str__(self) -> str:
        text = " ".join(part for part in (self["dataset"], self["split"]) if part) or "unnamed text"
        length, stride = self["sequence_length"], self["stride"]
        overlap = "no overlap, first token not scored" if stride == length else f"stride {stride}, new tokens scored"
        return (
            f"{text}, {self['windows']:,} windows of {length:,} tokens ({overlap}), "
            f"{self['tokens']:,} of {self['text_tokens']:,} tokens scored, "
            f"{self['dtype']}, {self['attention']} attention, BOS {self['bos']}"
        )


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and everything needed to measure it again.

    Attributes:
        perplexity: exp of `nll`; inf or nan when the model's logits were.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: how many tokens were scored.
        windows: how many windows were run.
        protocol: the settings; `str(protocol)` is the line to print with the number.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    protocol: EvaluationProtocol

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.4g}: {self.protocol}"

    def __float__(self) -> float:
        return self.perplexity

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Plain values, as stored in `sparse_ft.json` and `report.json`; `extra` adds keys such as `label="dense"`."""
        return {
            **extra,
            "perplexity": self.perplexity,
            "nll": self.nll,
            "tokens": self.tokens,
            "windows": self.windows,
            "protocol": dict(self.protocol),
        }


def perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    sequence_length: int,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    dataset: str = "",
    split: str = "",
    progress: bool = True,
) -> PerplexityResult:
    """Measure the perplexity of a causal language model on one long text.

    Args:
        model: a transformers causal LM, plain or wrapped by PEFT; run in eval mode, without gradients.
        ids: int64 `(T,)`, the text tokenised once.
        sequence_length: tokens per window.
        stride: step from window to window, 1 to `sequence_length`; None means `sequence_length`, no overlap.
        max_windows: use only the first so many windows.
        batch_size: windows per forward pass; does not change the result.
        dtype: autocast to this dtype (bfloat16 or float16); None computes in the dtype of the weights.
        dataset: name of the text, for the protocol.
        split: name of its split, for the protocol.
        progress: show a bar if it takes more than two seconds.

    Raises:
        ValueError: if the model is not a causal LM, the text is shorter than one window or not 1-D, holds tokens the
            model does not have, or a size is out of range.

    Warns:
        UserWarning: if some log-likelihood is not finite; the result then says inf or nan.
    """
    stride = sequence_length if stride is None else stride
    _check_sizes(sequence_length, stride, max_windows, batch_size)
    _check_model(model, sequence_length, dtype)
    _check_ids(model, ids, sequence_length)
    count = (len(ids) - sequence_length) // stride + 1
    count = count if max_windows is None else min(count, max_windows)
    batches = list(_batches(count, sequence_length, stride, batch_size))
    with eval_mode(model):
        shown = tqdm(batches, desc="perplexity", unit="batch", disable=not progress or _rank() != 0, delay=2)
        total, tokens, not_finite = _sum_nll(model, ids, sequence_length, shown, dtype)
    if not_finite:
        warnings.warn(
            f"{not_finite:,} of {tokens:,} log-likelihoods are not finite, so the perplexity is no number to compare; "
            f"look for NaN or Inf in the weights, or evaluate in float32 or bfloat16.",
            stacklevel=2,
        )
    protocol = EvaluationProtocol(
        dataset=dataset,
        split=split,
        sequence_length=sequence_length,
        stride=stride,
        windows=count,
        tokens=tokens,
        text_tokens=len(ids),
        dtype=dtype_line(model, dtype),
        attention=str(getattr(config_of(model), "_attn_implementation", None) or "default"),
        bos=_bos_line(model, ids),
    )
    return PerplexityResult(_exp(total / tokens), total / tokens, tokens, count, protocol)


def _sum_nll(
    model: nn.Module, ids: Tensor, length: int, batches: Iterable[tuple[Tensor, int]], dtype: torch.dtype | None
) -> tuple[float, int, int]:
    """Sum of -log p over all batches, how many tokens that was, and how many of them were not finite."""
    total, tokens, not_finite = 0.0, 0, 0
    for starts, first_scored in batches:
        windows = ids.cpu()[starts.unsqueeze(1) + torch.arange(length)]
        nll = _token_nll(model, windows, first_scored, dtype)
        total += float(nll.sum())
        tokens += nll.numel()
        not_finite += int((~nll.isfinite()).sum())
    return total, tokens, not_finite


@torch.no_grad()
def _token_nll(model: nn.Module, windows: Tensor, first_scored: int, dtype: torch.dtype | None) -> Tensor:
    """-log p of the tokens from position `first_scored` on, float64 on the CPU, flat.

    Args:
        windows: int64 `(batch, length)`.
        first_scored: at least 1; the token at position p is predicted by the logits at p - 1.
    """
    needed = windows.shape[1] - first_scored + 1
    device = _input_device(model)
    windows = windows.to(device)
    options: dict[str, Any] = {}
    accepted = inspect.signature(unwrapped(model).forward).parameters
    if "use_cache" in accepted:
        options["use_cache"] = False
    if needed < windows.shape[1] and "logits_to_keep" in accepted:
        options["logits_to_keep"] = needed
    with _autocast(device, dtype):
        logits: Tensor = model(input_ids=windows, **options).logits
    if logits.ndim != 3 or logits.shape[0] != len(windows) or logits.shape[1] < needed:
        raise ValueError(
            f"{class_name(model)} gives logits of shape {tuple(logits.shape)} for token ids of shape "
            f"{tuple(windows.shape)}; perplexity needs a causal language model with logits (batch, length, vocabulary)."
        )
    rows = max(1, _LOGITS_PER_CHUNK // logits.shape[2])
    parts: list[Tensor] = []
    for of_window, targets in zip(logits[:, -needed:-1], windows[:, first_scored:].to(logits.device), strict=True):
        for chunk, target in zip(of_window.split(rows), targets.split(rows), strict=True):
            wide = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
            parts.append(functional.cross_entropy(wide, target, reduction="none"))
    return torch.cat(parts).cpu().double()


def _batches(count: int, length: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """Start positions of the windows of each batch, and the position in the window of its first scored token."""
    starts = torch.arange(count) * stride
    first_scored = max(1, length - stride)
    if first_scored > 1:  # nothing before the first window has scored its beginning
        yield starts[:1], 1
        starts = starts[1:]
    for batch in starts.split(batch_size):
        if len(batch):
            yield batch, first_scored


def _check_sizes(length: int, stride: int, max_windows: int | None, batch_size: int) -> None:
    if length < 2:
        raise ValueError(f"sequence_length is {length} but a window needs at least 2 tokens; pass 2 or more.")
    if not 1 <= stride <= length:
        raise ValueError(
            f"stride is {stride} but must be between 1 and sequence_length {length}; leave it out for no overlap."
        )
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows is {max_windows} but must be at least 1; leave it out to use the whole text.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1; pass the windows per forward pass.")


def _check_model(model: nn.Module, length: int, dtype: torch.dtype | None) -> None:
    config, name = config_of(model), class_name(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder but perplexity is for causal language models; pass one.")
    if sees_the_right(name, config):
        raise ValueError(
            f"{name} predicts a token from both sides but perplexity is for causal language models; pass one."
        )
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise ValueError(f"sequence_length is {length} but {name} has {limit} positions; pass at most {limit}.")
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"Autocast cannot compute in {short_dtype(dtype)}, only in bfloat16 or float16; "
            f"leave dtype out to compute in the dtype of the weights."
        )


def _check_ids(model: nn.Module, ids: Tensor, length: int) -> None:
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(
            f"ids is {short_dtype(ids.dtype)} of shape {tuple(ids.shape)} but must be one text, int64 of shape (T,); "
            f"pass ids[0] of a batch."
        )
    if len(ids) < length:
        raise ValueError(
            f"The text has {len(ids)} tokens but sequence_length is {length}; use a longer text or shorter windows."
        )
    vocabulary = getattr(config_of(model), "vocab_size", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ValueError(
            f"The text holds token id {low if low < 0 else high} but {class_name(model)} has a vocabulary of "
            f"{vocabulary}; tokenise it with the model's own tokenizer."
        )


def _input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the embedding may lie on another device than the rest of the model."""
    find_embeddings = getattr(unwrapped(model), "get_input_embeddings", None)
    embeddings = find_embeddings() if find_embeddings is not None else None
    weight = embeddings.weight if isinstance(embeddings, nn.Embedding) else next(model.parameters(), torch.empty(0))
    return weight.device


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _bos_line(model: nn.Module, ids: Tensor) -> str:
    bos = getattr(config_of(model), "bos_token_id", None)
    return "at the start of the text only" if isinstance(bos, int) and int(ids[0]) == bos else "not added"


def _rank() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if ready else 0


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
