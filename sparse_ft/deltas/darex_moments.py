"""First and second moments of what flows into a model's linear layers, for Wanda on deltas and the analytic scales.

Everything is a sum over tokens in fp64, so results of several batches or processes are joined by adding.

Example:
    >>> moments = collect_moments(finetuned, batches, deltas=probe.deltas)
    >>> moments["model.layers.0.mlp.up_proj.weight"].mean.shape
    torch.Size([4096])

Limits: linear layers and Conv1D in the model's repeated blocks; stacked experts are left out.

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, section 4.1 (mean inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.deltas.darex_objectives import Batch, check_eval, model_inputs, real_tokens
from sparse_ft.models import Target, canonical_name, find_targets, matrix_view


@dataclass(frozen=True)
class InputMoments:
    """Sums over the tokens that reached one layer.

    Attributes:
        tokens: how many.
        total: (in,) fp64, sum of x.
        squares: (in,) fp64, sum of x^2.
        delta_output: sum of ||delta x + bias delta||^2; NaN if it was not asked for.
        input_dim: axis of the weight along which inputs run.
    """

    tokens: int
    total: Tensor
    squares: Tensor
    delta_output: float
    input_dim: int

    @property
    def mean(self) -> Tensor:
        """(in,) mean of x."""
        return self.total / max(self.tokens, 1)

    @property
    def second_moment(self) -> Tensor:
        """(in,) mean of x^2."""
        return self.squares / max(self.tokens, 1)

    @property
    def mean_delta_output(self) -> float:
        """Token mean of ||delta x + bias delta||^2."""
        return self.delta_output / max(self.tokens, 1)

    def norms(self) -> Tensor:
        """(in,) 2-norm of each feature over all tokens, what `wanda_delta` takes."""
        return self.squares.sqrt()

    def joined(self, other: InputMoments) -> InputMoments:
        """Moments over the tokens of both."""
        return InputMoments(
            self.tokens + other.tokens,
            self.total + other.total.to(self.total.device),
            self.squares + other.squares.to(self.squares.device),
            self.delta_output + other.delta_output,
            self.input_dim,
        )


@torch.no_grad()
def collect_moments(
    model: nn.Module, batches: Iterable[Batch], *, deltas: Mapping[str, Tensor] | None = None
) -> dict[str, InputMoments]:
    """Run batches through a model and collect the moments of the inputs of its linear layers.

    Args:
        model: run as it is; the fine-tuned one, in eval mode.
        batches: forward arguments or token ids (B, T); padding (attention_mask 0) does not count.
        deltas: by weight name; where given, the layer's delta output is collected too, with the delta of its bias, and
            layers without one are left out.

    Returns:
        Moments by canonical weight name, of the layers that at least one token reached.

    Raises:
        ValueError: a model in training mode or without linear layers, no batch, or NaN or infinite inputs.

    Example:
        >>> norms = collect_moments(model, [{"input_ids": ids}])["transformer.h.0.mlp.c_fc.weight"].norms()
    """
    check_eval(model)
    targets = [t for t in find_targets(model) if t.kind != "experts" and (deltas is None or t.name in deltas)]
    modules = {canonical_name(f"{name}.x")[:-2]: module for name, module in model.named_modules()}
    moments: dict[str, InputMoments] = {}
    current: dict[str, Any] = {}
    hooks = []
    ran = False
    try:
        for target in targets:
            hook = _hook(target, current, moments, deltas)
            hooks.append(modules[target.module].register_forward_pre_hook(hook, with_kwargs=True))
        for batch in batches:
            ran = True
            current.clear()
            current.update(model_inputs(model, batch))
            model(**current)
    finally:
        for handle in hooks:
            handle.remove()
    if not ran:
        raise ValueError("There are no samples to collect moments on; pass at least one batch.")
    for name, found in moments.items():
        if not bool(found.squares.isfinite().all()):
            raise ValueError(f"The inputs of '{name}' contain NaN or infinite values; check the model's dtype.")
    return moments


def _hook(
    target: Target, batch: Mapping[str, Any], moments: dict[str, InputMoments], deltas: Mapping[str, Tensor] | None
) -> Callable[..., None]:
    bias = f"{target.module}.bias"

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        mask = real_tokens(batch, inputs.shape)
        rows = (inputs if mask is None else inputs[mask]).detach().reshape(-1, inputs.shape[-1])
        if not len(rows):
            return
        output = float("nan")
        if deltas is not None:
            made = rows.float() @ matrix_view(deltas[target.name], target.input_dim).to(rows.device).T
            made = made + deltas[bias].to(rows.device) if bias in deltas else made
            output = float(made.square().sum(dtype=torch.float64))
        wide = rows.double()
        found = InputMoments(len(rows), wide.sum(0), wide.square().sum(0), output, target.input_dim)
        moments[target.name] = moments[target.name].joined(found) if target.name in moments else found

    return observe
