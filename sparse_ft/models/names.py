"""One name per weight, whatever wraps the model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

_WRAPPER_PREFIXES = ("base_model.model.", "module.", "_orig_mod.")
_WRAPPER_PARTS = (".base_layer", "._orig_mod", "._checkpoint_wrapped_module")


def canonical_name(name: str) -> str:
    """The parameter's name in the plain transformers model.

    PEFT (`base_model.model.`, `.base_layer`), DistributedDataParallel (`module.`), `torch.compile` (`_orig_mod`) and
    activation-checkpoint wrappers add to names; masks and files never see those additions.

    Example:
        >>> canonical_name("base_model.model.lm.layers.0.q_proj.base_layer.weight")
        'lm.layers.0.q_proj.weight'
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, stripped = name[len(prefix) :], True
    for part in _WRAPPER_PARTS:
        name = name.replace(part, "")
    return name


def named_weights(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter of a model, or every tensor of a mapping, by canonical name.

    A tensor that several modules share is listed once, under its first name.
    """
    items = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {canonical_name(name): tensor for name, tensor in items}
