"""`distilling`: any Trainer, with a teacher.

    trainer = distilling(SFTTrainer)(
        model=student, args=arguments, train_dataset=data, callbacks=[MaskCallback(masks)],
        teacher=dense, distillation=DistillationConfig(kl_weight=1.0, squarehead_weight=0.1),
    )
    trainer.train()

The class that comes back is the given one with two more arguments. Its own loss is computed as ever, with label
smoothing, `compute_loss_func`, `num_items_in_batch` and whatever it overrides; the teacher's losses are added to it.
Evaluation has no teacher: eval_loss is what it is without.

What is divided by what: cross-entropy and KL by the number of labels in all micro-batches of a step (of all processes,
as `average_tokens_across_devices` says), the same number for both. A loss on hidden states is the mean over the valid
tokens of each micro-batch, weighted by its share of the step's valid tokens; with `energy="fixed"` and for the other
losses on states these shares add up to exactly one large batch.

With KL, a plain Trainer and a causal model, cross-entropy and KL are computed together, a few tokens at a time, and
logits of all tokens never exist. Elsewhere the model's own loss makes its logits as it does without a teacher.

Logs: `distill/ce`, `distill/kl`, `distill/squarehead` and, by layer, `distill/squarehead/layer_3`, as means over the
steps since the last log.

Limits: no DeepSpeed or FSDP, no `torch_compile` with losses on hidden states, no DataParallel.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.loss.loss_utils import ForCausalLMLoss

from sparse_ft.distillation.cached_targets import CachedTargets
from sparse_ft.distillation.config import DistillationConfig
from sparse_ft.distillation.distiller import Distiller
from sparse_ft.distillation.head import TokenLoss
from sparse_ft.distillation.kl import ce_kl_loss
from sparse_ft.distillation.output_head import output_head
from sparse_ft.distillation.pruned_values import PrunedValues
from sparse_ft.distillation.recording import Recording
from sparse_ft.distillation.stacks import predicts_next
from sparse_ft.distillation.teacher import check_tokenizers, freeze, load_teacher
from sparse_ft.distillation.tokens import IGNORED, valid_tokens

_AnyTrainer = TypeVar("_AnyTrainer", bound=Trainer)


@cache
def distilling(trainer_class: type[_AnyTrainer]) -> type[_AnyTrainer]:
    """The trainer class with a teacher.

    Args:
        trainer_class: `Trainer`, `SFTTrainer`, `Seq2SeqTrainer`, or a subclass of your own.

    Returns:
        A subclass. Its constructor takes two more keywords: `distillation`, a `DistillationConfig`, and `teacher`, a
        model, `CachedTargets`, or None for the one that the config names. The teacher is frozen and moved to the
        student's device, unless the config names one.

    Raises:
        ValueError: it is not such a class.

    Example:
        >>> trainer = distilling(Trainer)(model=student, args=args, train_dataset=data, teacher=dense,
        ...                               distillation=DistillationConfig(kl_weight=1.0))
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise ValueError(f"distilling() takes a class derived from transformers.Trainer, not {trainer_class!r}.")
    return type(f"Distilling{trainer_class.__name__}", (_Distilling, trainer_class), {})


class _Distilling(Trainer):
    """Overrides what a Trainer offers for overriding: the batches of a step, the loss, the log."""

    def __init__(
        self,
        *args: Any,
        distillation: DistillationConfig,
        teacher: nn.Module | CachedTargets | None = None,
        **kwargs: Any,
    ) -> None:
        _check_kinds(distillation, teacher)
        super().__init__(*args, **kwargs)
        if self.args.torch_compile and distillation.feature_weights:
            raise ValueError(
                f"{next(iter(distillation.feature_weights))}_weight compares hidden states, which a compiled model "
                f"does not show: leave torch_compile off, or use kl_weight alone."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"A teacher and DataParallel on {self.args.n_gpu} GPUs do not go together: start one process per GPU "
                f"with torchrun or accelerate launch."
            )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            how = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP"
            raise ValueError(f"A teacher needs a whole copy of the model in each process, not {how}: start with DDP.")
        if self.get_tp_size() > 1:
            raise ValueError(
                f"A teacher needs a whole copy of the model in each process, not one split over "
                f"{self.get_tp_size()} by tensor parallelism: start with DDP."
            )
        if self.model_init is not None:
            raise ValueError(
                "model_init makes a new student in each train(), but the teacher is compared with one: give model."
            )
        if teacher is None:
            if distillation.teacher is not None:
                check_tokenizers(self.processing_class, distillation.teacher)
            teacher = load_teacher(distillation, self.args.device)
        self.distiller = Distiller(self.model, teacher, distillation)
        if isinstance(teacher, nn.Module):
            freeze(teacher)
            _check_still_shared(teacher, self.args.device)
            _place(teacher, distillation.teacher_device or self.args.device)
        self._totals: list[Tensor] | None = None
        self._values: dict[str, Tensor] = {}
        self._steps = 0  # since the last log

    # -- the batches of a step ---------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """As the Trainer's, and the valid tokens of all of them are counted.

        Raises:
            ValueError: no token of the step has a label, or padding cannot be told.
        """
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        # the count is of all processes where they are averaged, so that either none of them stops or all do
        if num_items is None or int(num_items) == 0:
            _check_labels(samples)
        self._totals = None
        self._steps += bool(samples)
        if samples and self.distiller.stacks:
            counts = torch.stack([torch.stack([n for _, n in self._valid(batch)]) for batch in samples]).sum(0)
            counts = counts.to(self.args.device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                counts = self.accelerator.reduce(counts, "sum")
            self._totals = list(counts.unbind())
        return samples, num_items

    def _valid(self, batch: Mapping[str, Any]) -> list[tuple[Tensor | None, Tensor]]:
        names, config = [stack.name for stack in self.distiller.stacks], self.distiller.config
        return valid_tokens(batch, names, no_padding=config.no_padding, skip_first=config.skip_first)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The trainer's own loss in evaluation; in training, that of the teacher beside it."""
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch, together = dict(inputs), not return_outputs and self._together(inputs)
        if self.distiller.config.energy == "fixed" and self.distiller.energies is None and self.distiller.stacks:
            self.distiller.measure_energies(self._energy_batches())
        own, outputs = None, None
        with self.distiller.recording(cut_head=together) as record:
            if together:
                model(**{name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")})
            else:
                own = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
                own, outputs = own if return_outputs else (own, None)
        with self.accelerator.autocast():
            loss = self._add_teacher(own, batch, record, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _together(self, inputs: Mapping[str, Any]) -> bool:
        """Whether cross-entropy is known well enough to be computed with KL, from the states before the head."""
        student, config = self.distiller.student, self.distiller.config
        inherited = super().compute_loss
        return (
            config.kl > 0
            and self.distiller.head is not None
            and getattr(inherited, "__func__", None) is Trainer.compute_loss
            and self.compute_loss_func is None
            and predicts_next(student)
            and getattr(student, "loss_type", None) != "ForConditionalGeneration"  # images may lengthen the sequence
            and getattr(student, "loss_function", None) is ForCausalLMLoss
            and not getattr(student.config, "output_router_logits", False)
            and ("labels" in inputs or "shift_labels" in inputs)
        )

    def _scaled(self, num_items: Tensor | int | None) -> bool:
        """Whether the Trainer leaves a micro-batch's loss as it is; else it divides by the number of micro-batches."""
        if self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None

    def _add_teacher(
        self, own: Tensor | None, batch: dict[str, Any], record: Recording, num_items: Tensor | int | None
    ) -> Tensor:
        """ce_weight · own loss + the teacher's, scaled as the Trainer scales its own."""
        distiller, config, scaled = self.distiller, self.distiller.config, self._scaled(num_items)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        micro_batches = 1 if scaled else self.current_gradient_accumulation_steps
        token_factor = processes if num_items is not None and scaled else 1
        seen: Recording | None = None
        loss = torch.zeros((), device=self.args.device)
        if own is not None:
            loss = config.ce_weight * own
            self._note("ce", own / processes / micro_batches)
        if not isinstance(distiller.teacher, CachedTargets):
            valid = self._valid(batch) if distiller.stacks else []
            masks, shares = [mask for mask, _ in valid], self._shares([count for _, count in valid])
            features, seen = distiller.compare(batch, record, masks, shares)
            if features is not None:
                loss = loss + features.total * (processes * micro_batches)
                for name, value in features.values.items():
                    self._note(name, value)
        if config.kl:
            tokens = self._token_loss(own is None, batch, record, seen, num_items if scaled else None)
            loss = loss + tokens.total * token_factor
            share = token_factor / processes / micro_batches
            self._note("kl", tokens.kl * share)
            if own is None:
                self._note("ce", tokens.ce * share)
        return loss

    def _shares(self, counts: Sequence[Tensor]) -> list[Tensor]:
        """What part of the step's valid tokens this micro-batch has, by stack."""
        totals = counts if self._totals is None else self._totals
        return [count / total.to(count.device).clamp(min=1) for count, total in zip(counts, totals, strict=True)]

    def _token_loss(
        self, with_ce: bool, batch: dict[str, Any], record: Recording, seen: Recording | None, num_items: Any
    ) -> TokenLoss:
        """KL, and cross-entropy with it where the model has not computed it."""
        distiller, config = self.distiller, self.distiller.config
        labels, shift = _labels(batch, distiller.student)
        common: dict[str, Any] = {
            "ce_weight": config.ce_weight if with_ce else 0.0,
            "kl_weight": config.kl,
            "temperature": config.temperature,
            "label_smoothing": self.args.label_smoothing_factor if with_ce else 0.0,
            "num_items": num_items,
        }
        if distiller.classifies:
            assert record.logits is not None and seen is not None and seen.logits is not None
            if labels.is_floating_point():
                raise ValueError(
                    f"kl_weight is {config.kl} but the labels are {labels.dtype}, which name no class: set kl_weight "
                    f"to 0."
                )
            rows = labels.shape if labels.ndim > 1 else (len(labels), 1)
            student, teacher = (logits.view(*rows, -1) for logits in (record.logits, seen.logits))
            return ce_kl_loss(student, labels.view(rows), teacher=teacher, shift=False, **common)
        distiller.check_heads(record, seen)
        head = output_head(distiller.student)
        assert record.head_input is not None
        if seen is None:
            return ce_kl_loss(
                record.head_input, labels, teacher=distiller.targets(batch), head=head, shift=shift, **common
            )
        return ce_kl_loss(
            record.head_input,
            labels,
            teacher=seen.head_input,
            head=head,
            teacher_head=output_head(distiller.model),
            shift=shift,
            **common,
        )

    def _energy_batches(self) -> Iterator[tuple[dict[str, Any], list[Tensor | None]]]:
        """The first training samples in their own order, collated as in training, the same on every process."""
        loader: Any = self.callback_handler.train_dataloader
        dataset, wanted = loader.dataset, self.distiller.config.energy_samples
        if not hasattr(dataset, "__len__"):
            raise ValueError("energy 'fixed' needs a training dataset with a length: use energy='batch' for a stream.")
        samples = iter(dataset[index] for index in range(min(wanted, len(dataset))))
        with _seeded(self.args.seed), self.accelerator.autocast():
            while chunk := list(islice(samples, self.args.per_device_train_batch_size)):
                batch: dict[str, Any] = self._prepare_inputs(loader.collate_fn(chunk))
                yield batch, [mask for mask, _ in self._valid(batch)]

    # -- the log -----------------------------------------------------------------------------------------------------

    def _note(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's part to the log; nothing waits for the device."""
        value = value.detach().float().to(self.args.device)
        self._values[name] = self._values[name] + value if name in self._values else value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the means of the teacher's losses since the last log."""
        if "loss" in logs and self._values:
            values = torch.stack(list(self._values.values())) / self._steps
            if self.args.world_size > 1:
                how = "sum" if self.args.average_tokens_across_devices else "mean"
                values = self.accelerator.reduce(values, how)
            logs.update({f"distill/{name}": value for name, value in zip(self._values, values.tolist(), strict=True)})
            self._values, self._steps = {}, 0
        if "train_runtime" in logs:  # the end of train(): what was not logged belongs to no later one
            self._values, self._steps = {}, 0
        super().log(logs, *args, **kwargs)


def _check_kinds(distillation: Any, teacher: Any) -> None:
    """Raise ValueError for arguments of another type than the constructor takes."""
    if not isinstance(distillation, DistillationConfig):
        raise ValueError(f"distillation is a {type(distillation).__name__}: give a DistillationConfig.")
    if teacher is not None and not isinstance(teacher, nn.Module | CachedTargets):
        raise ValueError(
            f"teacher is a {type(teacher).__name__}: give a model or CachedTargets, or name a checkpoint in "
            f"DistillationConfig(teacher=...)."
        )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The generators that collators draw from start at `seed`, and are afterwards as they were before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _check_still_shared(teacher: nn.Module, device: Any) -> None:
    """Raise ValueError for a self-teacher whose student has been moved away from the memory they shared."""
    place = next(teacher.parameters()).device
    if place.type != torch.device(device).type and any(isinstance(m, PrunedValues) for m in teacher.modules()):
        raise ValueError(
            f"The teacher shares the student's weights on {place.type} but training is on {device}, so they would be "
            f"held twice: move the student there with .to('{device}') before self_teacher."
        )


def _place(teacher: nn.Module, device: Any) -> None:
    """Move a teacher, unless it is there already or packed, which cannot be moved."""
    if not getattr(teacher, "is_quantized", False) and next(teacher.parameters()).device != torch.device(device):
        teacher.to(device)


def _check_labels(samples: Sequence[Any]) -> None:
    """Raise ValueError if the micro-batches of a step have labels and all are masked."""
    labels = [batch["labels"] for batch in samples if isinstance(batch, Mapping) and "labels" in batch]
    if labels and all(bool((label == IGNORED).all()) for label in labels):
        raise ValueError(
            f"All {sum(label.numel() for label in labels)} labels of a step are {IGNORED}, so there is nothing to "
            f"learn from it: look at how the data is masked, or at the maximum length that cuts answers off."
        )


def _labels(batch: Mapping[str, Any], student: nn.Module) -> tuple[Tensor, bool]:
    """The labels, and whether position i predicts label i + 1.

    Raises:
        ValueError: the batch has none.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"], False
    if batch.get("labels") is None:
        raise ValueError(f"The batch has {', '.join(batch)} but no labels: KL is computed where there is a label.")
    return batch["labels"], predicts_next(student)
