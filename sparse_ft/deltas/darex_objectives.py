"""What DAREx-q makes large: a metric on labelled data, or, without labels, minus the change of the model's outputs.

    no labels, encoders:  f(q) = - mean |h_q - h|        h: last hidden states of the fine-tuned model
    no labels, decoders:  f(q) = - mean (z_q - z)^2      z: its K largest logits of each token
    with labels:          f(q) = metric(model)

Each is averaged over mask seeds; of three or more values the one farthest from their mean is left out.

Example:
    >>> with DeltaProbe(model, base_state, density=0.01) as probe:
    ...     found = search_scale(output_objective(probe, batches, kind="logits"), density=0.01)

Limits: use text of the training set, never of the test set; the paper used 50 windows of 128 tokens (encoders) or 100
of 256 (decoders).

Source: Deng et al. 2024, "DARE the Extreme", arXiv 2410.09344, section 4.1, 1/q_v and 1/q_e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_ft.deltas.probe import DeltaProbe

#: Keyword arguments of the model's forward, or token ids (B, T).
Batch = Mapping[str, Any] | Tensor
Scale = float | Mapping[str, float]


def output_change(reference: Tensor, outputs: Tensor) -> float:
    """Mean absolute difference in fp32.

    Args:
        reference: outputs of the fine-tuned model, any shape.
        outputs: those of the pruned one, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> output_change(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        1.0
    """
    _check_same(reference, outputs)
    return float((outputs.float() - reference.float()).abs().mean())


def top_logits_change(reference_logits: Tensor, logits: Tensor, *, k: int = 5) -> float:
    """Mean squared difference, in fp32, at the k largest logits of the fine-tuned model.

    Args:
        reference_logits: (..., vocabulary), of the fine-tuned model: it alone decides which k are compared.
        logits: (..., vocabulary), of the pruned model.
        k: number of logits compared per token, at most the vocabulary.

    Raises:
        ValueError: if the shapes differ, or k is out of range.

    Example:
        >>> top_logits_change(torch.tensor([[1.0, 5.0]]), torch.tensor([[9.0, 4.0]]), k=1)
        1.0
    """
    _check_same(reference_logits, logits)
    top = _top(reference_logits, k)
    return float((logits.gather(-1, top.indices).float() - top.values.float()).square().mean())


def average_over_seeds(scores: Sequence[float]) -> float:
    """Mean of the scores; of three or more the one farthest from their mean is left out, the first of equally far ones.

    Raises:
        ValueError: if there are none.

    Example:
        >>> average_over_seeds([1.0, 2.0, 30.0])
        1.5
    """
    if not scores:
        raise ValueError("There are no scores to average; use at least one mask seed.")
    kept = list(scores)
    if len(kept) >= 3 and all(math.isfinite(score) for score in kept):
        mean = math.fsum(kept) / len(kept)
        kept.pop(max(range(len(kept)), key=lambda index: abs(kept[index] - mean)))
    return sum(kept) / len(kept)


def last_hidden_state(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states (B, T, d) after the last block and its norm; the head is not run where the model can do without."""
    backbone: Any = getattr(model, "base_model", model)
    outputs = backbone(**batch)
    found = getattr(outputs, "last_hidden_state", None)
    if found is None:
        outputs = model(**batch, output_hidden_states=True)
        states = getattr(outputs, "decoder_hidden_states", None) or getattr(outputs, "hidden_states", None)
        if not states:
            raise ValueError(
                f"{type(model).__name__} shows no hidden states; pass outputs=, a function that returns some."
            )
        found = states[-1]
    return found


def output_logits(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's logits (..., vocabulary or classes)."""
    logits: Tensor = model(**batch).logits
    return logits


class OutputChange:
    """How far a model's outputs are from those it had when this was made, whatever its weights are by then.

    Args:
        model: in eval mode, with the weights of reference: the fine-tuned ones.
        batches: samples, forward arguments or token ids (B, T); labels are left out. Padding (attention_mask 0) does
            not count.
        kind: "hidden" compares last hidden states, "logits" the top logits.
        k: logits compared per token; fewer where there are fewer classes.
        outputs: (model, batch) -> tensor to be compared in place of the usual one, for instance what RoBERTa's
            classifier has after its first layer.

    Raises:
        ValueError: a model in training mode, no batch, another kind, or k below 1.
        RuntimeError: NaN or infinite outputs.

    Example:
        >>> change = OutputChange(model, batches, kind="hidden")
        >>> change.measure()
        0.0
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        kind: Literal["hidden", "logits"] = "hidden",
        k: int = 5,
        outputs: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    ) -> None:
        if kind not in ("hidden", "logits"):
            raise ValueError(f"kind is {kind!r}; compare 'hidden' states or 'logits'.")
        check_eval(model)
        self._model = model
        self._outputs = outputs or (last_hidden_state if kind == "hidden" else output_logits)
        self._references: list[tuple[dict[str, Any], Tensor, Tensor | None]] = []
        for given in batches:
            batch = model_inputs(model, given)
            reference = _real_tokens(self._outputs(model, batch), batch)
            if not bool(reference.isfinite().all()):
                raise RuntimeError(f"{type(model).__name__} gives NaN or infinite outputs before any pruning.")
            if kind == "logits":
                top = _top(reference, min(k, reference.shape[-1]))
                self._references.append((batch, top.values.float(), top.indices))
            else:
                self._references.append((batch, reference.float(), None))
        if not self._references:
            raise ValueError("There are no samples to measure the output change on; pass at least one batch.")

    @torch.no_grad()
    def measure(self) -> float:
        """Mean absolute change of the hidden states, or mean squared change of the top logits, over all samples."""
        check_eval(self._model)
        total, count = 0.0, 0
        for batch, reference, indices in self._references:
            found = _real_tokens(self._outputs(self._model, batch), batch)
            difference = (found if indices is None else found.gather(-1, indices)).float() - reference
            total += float((difference.abs() if indices is None else difference.square()).sum(dtype=torch.float64))
            count += difference.numel()
        return total / count


def output_objective(
    probe: DeltaProbe,
    batches: Iterable[Batch],
    *,
    kind: Literal["hidden", "logits"] = "hidden",
    seeds: Sequence[int] = (0, 1, 2, 3),
    k: int = 5,
    outputs: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> Callable[[Scale], float]:
    """Make the objective that needs no labels: minus the change of the outputs under pruning.

    The outputs of the fine-tuned model are computed once, here.

    Args:
        probe: sets the model's weights; its model must be in eval mode.
        batches: the user's own samples, as in `OutputChange`.
        kind: "hidden" compares last hidden states (encoders), "logits" the top logits (decoders).
        seeds: of the masks, averaged by `average_over_seeds`.
        k: logits compared per token.
        outputs: another output to be compared, as in `OutputChange`.

    Returns:
        Function of a scale, or of scales by tensor name, whose value is at most 0, the larger the better.

    Raises:
        ValueError: no seed, or as `OutputChange`.
        RuntimeError: NaN or infinite outputs of the fine-tuned model.

    Example:
        >>> objective = output_objective(probe, batches, kind="logits", seeds=(0,))
        >>> objective(0.01)
        -3.2

    Source: arXiv 2410.09344, section 4.1, 1/q_e.
    """
    probe.restore()
    change = OutputChange(probe.model, batches, kind=kind, k=k, outputs=outputs)
    return _over_seeds(probe, lambda: -change.measure(), seeds)


def label_objective(
    probe: DeltaProbe, metric: Callable[[nn.Module], float], *, seeds: Sequence[int] = (0,)
) -> Callable[[Scale], float]:
    """Make the objective with labels: a metric of the pruned model on a held-out split.

    Args:
        probe: sets the model's weights.
        metric: model -> score, higher is better. It sees the same model each time, with other weights.
        seeds: of the masks, averaged by `average_over_seeds`. One, as published, is cheap; a noisy metric needs more.

    Raises:
        ValueError: no seed.

    Example:
        >>> objective = label_objective(probe, lambda model: accuracy(model, validation))

    Source: arXiv 2410.09344, section 4.1, 1/q_v.
    """
    return _over_seeds(probe, lambda: metric(probe.model), seeds)


def _over_seeds(probe: DeltaProbe, score: Callable[[], float], seeds: Sequence[int]) -> Callable[[Scale], float]:
    if not seeds:
        raise ValueError("seeds is empty; use at least one mask seed.")

    @torch.no_grad()
    def objective(scale: Scale) -> float:
        scores = []
        for seed in seeds:
            probe.prune(scale, seed=seed)
            found = float(score())
            scores.append(-math.inf if math.isnan(found) else found)
        return average_over_seeds(scores)

    return objective


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword arguments for the model's forward on its device, labels left out.

    Example:
        >>> model_inputs(model, torch.tensor([[1, 2, 3]])).keys()
        dict_keys(['input_ids'])
    """
    device = next(model.parameters()).device
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    return {
        key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items() if key != "labels"
    }


def check_eval(model: nn.Module) -> None:
    """Check that the model is in eval mode.

    Raises:
        ValueError: if it is not.
    """
    if model.training:
        raise ValueError("The model is in training mode, where dropout changes every output; call model.eval() first.")


def real_tokens(batch: Mapping[str, Any], shape: Sequence[int]) -> Tensor | None:
    """Bool (B, T) of the positions that are no padding, if tensors of this shape have a row per position; else None."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and tuple(shape[:2]) == tuple(mask.shape) and len(shape) > 2:
        return mask.bool()
    return None


def _real_tokens(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    mask = real_tokens(batch, outputs.shape)
    return outputs if mask is None else outputs[mask]


def _top(logits: Tensor, k: int) -> torch.return_types.topk:
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k is {k} but there are {logits.shape[-1]} logits per token; it must lie between 1 and that.")
    return logits.topk(k, dim=-1)


def _check_same(reference: Tensor, outputs: Tensor) -> None:
    if reference.shape != outputs.shape:
        raise ValueError(
            f"The reference has shape {tuple(reference.shape)} and the outputs {tuple(outputs.shape)}; they must agree."
        )
