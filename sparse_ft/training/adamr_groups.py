"""Parameter groups of AdamR: which parameters have a base that they are pulled to, found by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.models import canonical_name, named_weights

logger = logging.getLogger(__name__)


def adamr_groups(
    model: nn.Module, base: nn.Module | Mapping[str, Tensor], *, exclude: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Trainable parameters of a model in two groups: those that have a base, and those that do not and are not pulled.

    A head that the base lacks is found by its name and named in a warning of this module's logger; the second group's
    `params` are the (name, parameter) pairs in question. The names of a base without the model's prefix
    (`AutoModel` under a classifier) are understood.

    Args:
        model: what is about to be trained.
        base: the model it starts from, or its tensors by name. It is copied when the optimizer is made, so the model
            itself may be given while it still is what it was loaded as.
        exclude: canonical names, or beginnings of them that end at a dot, which shall not be pulled either.

    Returns:
        Groups for `AdamR`; the second is absent if it is empty.

    Raises:
        ValueError: if the base has none of the parameters, has one in another shape, or an exclusion names nothing.
    """
    known = dict(named_weights(base) if isinstance(base, nn.Module) else named_weights(dict(base)))
    prefix = f"{getattr(model, 'base_model_prefix', '') or '-'}."
    excluded = tuple(exclude)
    trained = [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    for entry in excluded:
        if not any(_is_within(name, entry) for name, _ in trained):
            raise ValueError(f"exclude names '{entry}', but no trainable parameter is called that or begins with it.")
    pairs, tensors, free = [], {}, []
    for name, parameter in trained:
        value = known.get(name, known.get(name.removeprefix(prefix)))
        if value is None or any(_is_within(name, entry) for entry in excluded):
            free.append((name, parameter))
            continue
        check_base(name, parameter, value)
        pairs.append((name, parameter))
        tensors[name] = value
    if not pairs:
        raise ValueError(
            f"The base has none of the {len(trained)} trainable parameters: the model's first is "
            f"'{trained[0][0] if trained else None}', the base's '{next(iter(known), None)}'; give the model it starts "
            f"from."
        )
    if free:
        logger.warning("Not pulled to the base: %s.", ", ".join(name for name, _ in free))
    groups: list[dict[str, Any]] = [{"params": pairs, "base": tensors}]
    return [*groups, {"params": free, "decay": 0.0}] if free else groups


def _is_within(name: str, entry: str) -> bool:
    return name == entry or name.startswith(f"{entry.removesuffix('.')}.")


def check_base(name: str, parameter: Tensor, value: Tensor) -> None:
    """Check that a base tensor fits its parameter and is finite.

    Raises:
        ValueError: naming the tensor.
    """
    if value.shape != parameter.shape:
        raise ValueError(
            f"'{name}' has shape {tuple(parameter.shape)} but {tuple(value.shape)} in the base; resize the base in the "
            f"same way (resize_token_embeddings), or leave it out with exclude=['{name}']."
        )
    if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
        raise ValueError(f"'{name}' of the base ({value.dtype}) is not finite everywhere; give the base in floats.")
