"""One student, one teacher, one micro-batch: what is recorded of the student, and what the teacher makes of it.

The student runs first. Its states are in memory for the backward pass anyway; the teacher then runs without gradients,
and each of its layers is compared and forgotten as soon as it is there, so one layer of its states is alive at a time.
The teacher's output head is not run: KL takes the states in front of it and multiplies a few tokens at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.distillation.cached_targets import CachedTargets
from sparse_ft.distillation.config import DistillationConfig
from sparse_ft.distillation.features import cosine_layer, mse_layer
from sparse_ft.distillation.output_head import check_head, output_head, output_module
from sparse_ft.distillation.recording import Recording, check_recorded, watching
from sparse_ft.distillation.squarehead import squarehead_layer, teacher_energy
from sparse_ft.distillation.stacks import Stack, StateRecorder, bare_model, find_stacks, listening
from sparse_ft.distillation.teacher import check_pair
from sparse_ft.distillation.tokens import IGNORED
from sparse_ft.distillation.top_k import TopK

# What a trainer adds to a batch for the loss; a teacher that got labels would compute logits for all tokens.
_FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "completion_mask", "assistant_masks")


@dataclass(frozen=True)
class FeatureTotals:
    """Losses on hidden states of one micro-batch.

    Attributes:
        total: scalar with gradient, weights and shares included.
        values: for logs, by name: `"squarehead"`, `"squarehead/encoder"`, `"squarehead/layer_3"`.
    """

    total: Tensor
    values: dict[str, Tensor]


class Distiller:
    """Compares a student with its teacher.

    Args:
        student: a transformers model or a PeftModel; hooks are placed on it during a recording only.
        teacher: a frozen model, or stored targets, which have no hidden states.
        config: the weights and layers.

    Raises:
        ValueError: the two cannot be compared, or the student has nothing KL could be computed from.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | CachedTargets, config: DistillationConfig) -> None:
        self.student = bare_model(student)
        self.teacher = teacher
        self.config = config
        self.energies: list[list[Tensor]] | None = None
        self._head_seen = False
        if isinstance(teacher, CachedTargets):
            check_targets(self.student, teacher, config)
        else:
            check_pair(student, teacher, config)
            self._keywords = inspect.signature(bare_model(teacher).forward).parameters
        self.stacks: tuple[Stack, ...] = ()
        self.pairs: tuple[tuple[tuple[int, int], ...], ...] = ()
        if config.feature_weights:
            self.stacks = find_stacks(self.student)
            self._teacher_stacks = find_stacks(self.model)
            depths = zip(self.stacks, self._teacher_stacks, strict=True)
            self.pairs = tuple(config.pairs(ours.depth, its.depth) for ours, its in depths)
        self.head = output_module(self.student)
        self.classifies = self.head is None and "Classification" in type(self.student).__name__
        if config.kl:
            self._check_kl()

    @property
    def model(self) -> nn.Module:
        """The teacher, where it is a model."""
        assert isinstance(self.teacher, nn.Module), "stored targets have no hidden states"
        return self.teacher

    def _check_kl(self) -> None:
        """Raise ValueError unless there are logits to compare."""
        name = type(self.student).__name__
        if self.head is None and not self.classifies:
            raise ValueError(
                f"kl_weight is {self.config.kl} but {name} has no output head, so it predicts nothing: set "
                f"kl_weight to 0, or take the model's class with a head."
            )
        if self.classifies:
            kind = getattr(self.student.config, "problem_type", None)
            if kind not in (None, "single_label_classification") or getattr(self.student.config, "num_labels", 2) < 2:
                raise ValueError(
                    f"kl_weight is {self.config.kl} but {name} is trained on {kind or 'regression'}, which has "
                    f"no distribution over classes: set kl_weight to 0."
                )
            return
        # what a head cannot express is refused now, and bitsandbytes is kept from repacking one in the first pass
        for model in (self.student, self.teacher):
            if isinstance(model, nn.Module):
                output_head(model)

    # -- the student -------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, *, cut_head: bool = False) -> Iterator[Recording]:
        """Record the student's forward pass with gradients inside the block.

        Args:
            cut_head: let the output head see the first token of each row only.
        """
        record = Recording(tuple(StateRecorder() for _ in self.stacks))
        with ExitStack() as stack:
            for own, pairs, recorder in zip(self.stacks, self.pairs, record.states, strict=True):
                layers = {ours for ours, _ in pairs}
                stack.enter_context(listening(own, layers, recorder))
            stack.enter_context(watching(self.student, record, cut_head=cut_head, with_gradient=True))
            yield record
        for own, pairs, recorder in zip(self.stacks, self.pairs, record.states, strict=True):
            check_recorded(own, {ours for ours, _ in pairs}, recorder)

    # -- the teacher -------------------------------------------------------------------------------------------------

    def compare(
        self, batch: Mapping[str, Any], record: Recording, masks: Sequence[Tensor | None], shares: Sequence[Tensor]
    ) -> tuple[FeatureTotals | None, Recording]:
        """Run the teacher once, and the losses on hidden states with it.

        Args:
            batch: what the student was called with.
            record: of the student.
            masks: (B, T) valid tokens of each stack, None = all.
            shares: what part of the step's valid tokens these are, by stack.

        Returns:
            The losses on hidden states, None if there are none, and what was recorded of the teacher.
        """
        running = [_Comparison(self, index, record, masks, shares) for index in range(len(self.stacks))]
        seen = self.run_teacher(batch, record, running)
        if not running:
            return None, seen
        values: dict[str, Tensor] = {}
        for comparison in running:
            values.update(comparison.named_values())
        total = torch.stack([comparison.total for comparison in running]).sum()
        for name in self.config.feature_weights:
            values[name] = torch.stack([comparison.sums[name] for comparison in running]).sum()
        return FeatureTotals(total, values), seen

    @torch.no_grad()
    def run_teacher(self, batch: Mapping[str, Any], record: Recording, listeners: Sequence[Any]) -> Recording:
        """One forward pass of the teacher; `listeners` hear the compared layers of its stacks."""
        teacher, seen = self.model, Recording()
        device = next(teacher.parameters()).device
        inputs = {
            name: value for name, value in {**batch, **record.decoder_inputs}.items() if name not in _FOR_THE_LOSS
        }
        inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        dtype = getattr(bare_model(teacher), "dtype", torch.float32)  # of audio frames and embeddings
        inputs = {name: v.to(dtype) if _is_float(v) else v for name, v in inputs.items()}
        if "use_cache" in self._keywords:
            inputs["use_cache"] = False
        with ExitStack() as stack:
            for its, pairs, listener in zip(getattr(self, "_teacher_stacks", ()), self.pairs, listeners, strict=True):
                stack.enter_context(listening(its, {layer for _, layer in pairs}, listener))
            stack.enter_context(watching(bare_model(teacher), seen, cut_head=True, with_gradient=False))
            teacher(**inputs)
        return seen

    def measure_energies(self, batches: Iterable[tuple[Mapping[str, Any], Sequence[Tensor | None]]]) -> None:
        """Fix SquareHead's denominators to the teacher's energies on these batches, each with its masks.

        Raises:
            ValueError: no token in them is valid.
        """
        sums = [[torch.zeros(()) for _ in pairs] for pairs in self.pairs]
        counts = [torch.zeros(()) for _ in self.pairs]
        for batch, masks in batches:
            listeners = [_energy_sums(sums[i], counts[i], masks[i], self.pairs[i]) for i in range(len(self.pairs))]
            self.run_teacher(batch, Recording(decoder_inputs=self._decoder_inputs(batch)), listeners)
        if not all(float(count) for count in counts):
            raise ValueError("No token of the samples for energy 'fixed' is valid: raise energy_samples.")
        self.energies = [[energy / count for energy in of_stack] for of_stack, count in zip(sums, counts, strict=True)]

    def _decoder_inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the student would feed its decoder with, where the batch does not say."""
        config: Any = self.student.config
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" in batch:
            return {}
        shift = getattr(self.student, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            return {"decoder_input_ids": shift(labels=batch["labels"])}
        shifted = batch["labels"].roll(1, -1)  # as Whisper does it in its forward
        shifted[:, 0] = config.decoder_start_token_id
        return {"decoder_input_ids": shifted.masked_fill(shifted == IGNORED, config.pad_token_id)}

    # -- output heads ------------------------------------------------------------------------------------------------

    def check_heads(self, record: Recording, seen: Recording | None) -> None:
        """Once: what `output_head` says of both models is what they compute.

        Raises:
            RuntimeError: if not.
        """
        if self._head_seen:
            return
        self._head_seen = True
        sides = [(self.student, record)]
        if seen is not None:
            sides.append((bare_model(self.model), seen))
        for model, side in sides:
            if side.head_input is not None and side.logits is not None:
                states, logits = side.head_input[:, :1].flatten(0, 1), side.logits[:, :1].flatten(0, 1)
                check_head(output_head(model), states.detach(), logits.detach(), model=model)

    def describe(self) -> str:
        """What is compared with what, in one line per loss and stack."""
        its = "stored targets" if isinstance(self.teacher, CachedTargets) else type(bare_model(self.teacher)).__name__
        lines = [f"teacher {self.config.teacher or ''} ({its})".replace("  ", " ")]
        if self.config.kl:
            lines.append(f"KL of next tokens, weight {self.config.kl:g}, temperature {self.config.temperature:g}")
        named = ", ".join(f"{name} {weight:g}" for name, weight in self.config.feature_weights.items())
        for stack, pairs in zip(self.stacks, self.pairs, strict=True):
            shown = " ".join(f"{ours}:{its}" for ours, its in pairs)
            lines.append(f"{stack.name or 'hidden'} states, student:teacher layers {shown}, weight {named}")
        return "\n".join(lines)

    def targets(self, batch: Mapping[str, Any]) -> TopK:
        """The stored targets of a batch."""
        assert isinstance(self.teacher, CachedTargets)
        return self.teacher.lookup(batch["input_ids"], batch.get("attention_mask"))


class _Comparison:
    """Losses of one stack, added up while the teacher runs."""

    def __init__(
        self,
        distiller: Distiller,
        index: int,
        record: Recording,
        masks: Sequence[Tensor | None],
        shares: Sequence[Tensor],
    ) -> None:
        self.name = distiller.stacks[index].name
        self.config = distiller.config
        self.pairs = distiller.pairs[index]
        self.energies = None if distiller.energies is None else distiller.energies[index]
        self.states = record.states[index].states
        self.mask, self.share = masks[index], shares[index]
        device = next(iter(self.states.values())).device
        self.total = torch.zeros((), device=device)
        self.sums = {name: torch.zeros((), device=device) for name in self.config.feature_weights}
        self.layers: dict[str, Tensor] = {}

    def __call__(self, layer: int, teacher: Tensor) -> None:
        """Compare a layer of the teacher with each student layer it is paired with."""
        for index, (ours, its) in enumerate(self.pairs):
            if its != layer:
                continue
            weight = 1.0 if self.config.layer_weights is None else self.config.layer_weights[index]
            energy = None if self.energies is None else self.energies[index]
            student = self.states[ours]
            with torch.enable_grad():
                for name, factor in self.config.feature_weights.items():
                    value = _layer_loss(name, student, teacher, self.mask, energy) * self.share.to(student.device)
                    self.total = self.total + (factor * weight) * value.to(self.total.device)
                    self.layers[f"{name}/{self.name or 'layer'}_{ours}"] = value.detach()
                    self.sums[name] += weight * value.detach().to(self.total.device)

    def named_values(self) -> dict[str, Tensor]:
        """For logs: each layer, and the sums of encoder and decoder apart."""
        if not self.name:
            return self.layers
        return {**self.layers, **{f"{name}/{self.name}": value for name, value in self.sums.items()}}


def _layer_loss(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None, energy: Tensor | None) -> Tensor:
    if name == "squarehead":
        return squarehead_layer(student, teacher, mask, energy=energy)
    return mse_layer(student, teacher, mask) if name == "mse" else cosine_layer(student, teacher, mask)


def _energy_sums(sums: list[Tensor], count: Tensor, mask: Tensor | None, pairs: Sequence[tuple[int, int]]) -> Any:
    """A listener that adds each layer's energy, and with the first of them the number of tokens."""
    counted: list[bool] = []

    def listener(layer: int, state: Tensor) -> None:
        tokens = state.shape[0] * state.shape[1] if mask is None else int(mask.bool().sum())
        if not counted:
            counted.append(True)
            count.add_(tokens)
        for index, (_, its) in enumerate(pairs):
            if its == layer:
                sums[index].add_(teacher_energy(state, mask).to(sums[index].device) * tokens)

    return listener


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def check_targets(student: nn.Module, targets: CachedTargets, config: DistillationConfig) -> None:
    """Raise ValueError for stored targets that do not fit the student or the config."""
    if config.feature_weights:
        raise ValueError(
            f"{next(iter(config.feature_weights))}_weight compares hidden states, which stored targets do not have: "
            f"set it to 0, or give the teacher itself."
        )
    if getattr(student.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(student).__name__} is an encoder-decoder, but stored targets are found by one sequence of tokens: "
            f"give the teacher itself."
        )
    if targets.temperature != config.temperature:
        raise ValueError(
            f"The targets were made at temperature {targets.temperature} but {config.temperature} is asked for: use "
            f"the same, or make them again."
        )
    ours = getattr(student.config, "vocab_size", None)
    if ours != targets.vocabulary:
        raise ValueError(
            f"The targets are of a vocabulary of {targets.vocabulary} but the student has {ours}: make them with a "
            f"teacher of the student's tokenizer."
        )
