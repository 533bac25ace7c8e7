"""Which tokens of a batch count in the losses on hidden states: one mask per stack, and how many tokens it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def valid_tokens(
    batch: Mapping[str, Any], names: Sequence[str], *, no_padding: bool = False, skip_first: bool = False
) -> list[tuple[Tensor | None, Tensor]]:
    """(mask, number of valid tokens) for each stack of a model.

    The mask is None where every position counts, as in an audio encoder, whose frames have no padding unless the batch
    brings an attention_mask for them. A decoder's tokens are those of decoder_attention_mask, or else those with a
    label: its inputs are the labels shifted right.

    Args:
        batch: what the model is called with.
        names: of the stacks, `("",)` or `("encoder", "decoder")`.
        no_padding: a batch without attention_mask has no padding.
        skip_first: leave out the first valid token of each row of text, where states are often extreme.

    Raises:
        ValueError: the batch has no mask by which padding could be told, or one that is not (B, T).

    Example:
        >>> [(mask, count)] = valid_tokens(batch, ("",))
    """
    found = [_decoder(batch, no_padding) if name == "decoder" else _first_stack(batch, no_padding) for name in names]
    if not skip_first:
        return found
    audio = batch.get("input_features") is not None
    return [
        pair if audio and name != "decoder" else _without_first(*pair, batch)
        for name, pair in zip(names, found, strict=True)
    ]


def _without_first(mask: Tensor | None, count: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The mask without the first valid token of each row; there is none without tokens of some kind."""
    if mask is None:
        ids = next(batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None)
        mask = torch.ones(ids.shape[0], int(count) // ids.shape[0], dtype=torch.bool, device=ids.device)
    keep = mask.bool()
    keep = keep & (keep.cumsum(-1) > 1)
    return keep, keep.sum()


def _first_stack(batch: Mapping[str, Any], no_padding: bool) -> tuple[Tensor | None, Tensor]:
    """A model's only stack, or its encoder."""
    mask, frames = batch.get("attention_mask"), batch.get("input_features")
    if frames is not None:
        if mask is None:
            return None, torch.tensor(frames.shape[0] * frames.shape[-1], device=frames.device)
        mask = mask[:, ::2]  # the convolutions halve the frames
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, but padding is told by one value per token (B, T): "
                f"let the collator return such a mask."
            )
        return mask, mask.bool().sum()
    if not no_padding:
        raise ValueError(
            "The batch has no attention_mask, so padding cannot be told from text: let the collator return one, or say "
            "DistillationConfig(no_padding=True) if there is none."
        )
    ids = batch.get("input_ids")
    shape = batch["inputs_embeds"].shape[:2] if ids is None else ids.shape
    return None, torch.tensor(shape[0] * shape[1])


def _decoder(batch: Mapping[str, Any], no_padding: bool) -> tuple[Tensor | None, Tensor]:
    """The decoder of an encoder-decoder."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if mask is None and labels is not None:
        mask = labels != IGNORED
    if mask is not None:
        return mask, mask.bool().sum()
    ids = batch.get("decoder_input_ids")
    if ids is None or not no_padding:
        raise ValueError(
            "The batch has neither decoder_attention_mask nor labels, so the decoder's padding cannot be told: let the "
            "collator return one of them."
        )
    return None, torch.tensor(ids.numel())
