"""Several adapters as one, by their factors: what `add_weighted_adapter` does with masked adapters.

All adapters of a layer have the same mask there, so Σ wᵢ (Bᵢ Aᵢ) ∘ m = (Σ wᵢ Bᵢ Aᵢ) ∘ m: the products add up as those
of plain LoRA do, and the mask is applied to the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_ft.adapters.masked_config import MaskedLoraConfig
from sparse_ft.masks import MaskSet


class Factors(NamedTuple):
    """A (E, r, in) and B (E, out, r) of E experts, E = 1 for a linear, in fp32 or wider, and the weight of B A."""

    A: Tensor
    B: Tensor
    weight: float = 1.0


def concatenated(parts: Sequence[Factors]) -> Factors:
    """Σ w B A exactly, with the sum of the ranks."""
    return Factors(torch.cat([part.A * part.weight for part in parts], 1), torch.cat([part.B for part in parts], 2))


def summed(parts: Sequence[Factors]) -> Factors:
    """(Σ √w B) (Σ √w A): the rank of one, but it has the products of one adapter's B and another's A too.

    A negative weight has its sign on A.
    """
    roots = [abs(part.weight) ** 0.5 for part in parts]
    A = sum(part.A * (root if part.weight >= 0 else -root) for part, root in zip(parts, roots, strict=True))
    B = sum(part.B * root for part, root in zip(parts, roots, strict=True))
    assert isinstance(A, Tensor) and isinstance(B, Tensor)
    return Factors(A, B)


def truncated(parts: Sequence[Factors], r: int) -> Factors:
    """The best approximation of Σ w B A of rank r (Eckart-Young), without forming the product.

    Of a thin SVD of the product only its core is computed: B = Q R, Aᵀ = P S, and the SVD of R Sᵀ.
    """
    A, B, _ = concatenated(parts)
    Q, R = torch.linalg.qr(B)
    P, S = torch.linalg.qr(A.mT)
    U, values, V = torch.linalg.svd(R @ S.mT, full_matrices=False)
    roots = values[:, :r].sqrt()
    return Factors(roots[:, :, None] * (V[:, :r] @ P.mT), (Q @ U[:, :, :r]) * roots[:, None])


def combined_config(configs: Sequence[MaskedLoraConfig], ranks: dict[str, int]) -> MaskedLoraConfig:
    """The config of an adapter on every tensor that one of these adapts.

    Args:
        configs: of one method.
        ranks: of the new adapter by parameter name. Its scaling is 1 where the method has one.

    Raises:
        ValueError: if two adapters have different masks on a tensor, or one trains modules of its own.
    """
    masks: dict[str, Tensor] = {}
    known = [config.masks for config in configs if config.masks is not None]
    for its_masks in known:
        for name in its_masks:
            mask = its_masks[name]
            if not torch.equal(masks.setdefault(name, mask), mask):
                raise ValueError(
                    f"The adapters have different masks on '{name}', so no single one can stand for them; activate "
                    f"several with set_adapter."
                )
    if any(config.modules_to_save for config in configs):
        raise ValueError("Adapters with modules_to_save cannot be combined; activate one at a time with set_adapter.")
    patterns = {name: pattern for its_masks in known for name, pattern in its_masks.patterns.items()}
    input_dims = {name: dim for its_masks in known for name, dim in its_masks.input_dims.items()}
    dense = sorted({module for config in configs for module in config.dense_modules or ()})
    r = Counter(ranks.values()).most_common(1)[0][0]
    own = {name.removesuffix(".weight"): rank for name, rank in ranks.items() if rank != r}
    scaled = configs[0].lora_alpha is not None
    changes: dict[str, Any] = dict(
        r=r,
        rank_pattern=own,
        lora_alpha=r if scaled else None,
        alpha_pattern=dict(own) if scaled else {},
        use_rslora=False,
        target_modules={name.removesuffix(".weight") for name in masks if masks[name].ndim == 2},
        target_parameters=[name for name in masks if masks[name].ndim == 3] or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        dense_modules=dense or None,
        masks=MaskSet(masks, pattern=patterns, input_dims=input_dims),
        masks_digest=None,
        weights_digest=None,
    )
    return replace(configs[0], **changes)
