"""`MaskCallback`: full fine-tuning and adapter training with `Trainer` or `SFTTrainer`, pruned weights exactly zero.

With mask m, weight w and the gradient g summed over micro-batches, one optimizer step is

    g <- g * m;   clip g;   w <- step(w, g);   [ w <- w * m ]

The gradient is masked by a hook when backward has added to it, so clipping and the logged norm see live weights only.
An optimizer that treats each weight by itself (`ELEMENTWISE_OPTIMIZERS`) then leaves a zero weight with zero gradient
and zero state at zero, weight decay included, and nothing more is paid for. After any other optimizer (Adafactor, Muon,
8-bit states, your own) the weight is masked too, by a hook that fires when its `step` returns.

Memory while training: on an accelerator a mask is int8, one byte per weight (`masks.keep_bits`). On the CPU it has the
weight's own width, 4 bytes beside the 16 of an fp32 weight with gradient and moments, because there torch would widen
int8 into a temporary first, which takes half as long again.

Example:
    >>> masks = sparse_ft.prune(model, pattern="2:4", method="wanda", calibration=batches)
    >>> trainer = Trainer(model=model, ..., callbacks=[MaskCallback(masks)])
    >>> trainer.train(resume_from_checkpoint=latest_complete_checkpoint(arguments.output_dir))

Several processes: with a whole copy of the model in each (DDP by `torchrun` or `accelerate launch`) nothing changes in
the script. Each masks its own gradient before the average is taken; see `training.processes`. Two processes with one
micro-batch each per step end, on the CPU in fp32, with the very bits of one process that accumulates the two; with more
of either, or against one larger batch, the weights agree to the rounding of the sum of gradients. Pruned weights are
exactly zero on every process.

Averages of the weights (`torch.optim.swa_utils.AveragedModel`, TRL's `BEMACallback`) are sums of masked weights, hence
masked; `masks.verify(averaged.module)` checks it. Neither writes the masks: `masks.save(directory)` puts them beside.

Limits: no DeepSpeed, FSDP or other sharding; the Trainer's optimizer may not step inside backward (LOMO); a DDP
communication hook that mixes elements (PowerSGD) makes gradients dense after they were masked, which the check after
the first step finds.
"""

from __future__ import annotations

import math
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_ft.checkpoints import make_record, write_sidecars
from sparse_ft.masks import MASKS_FILE, MaskSet, keep_bits, mask_
from sparse_ft.models.names import canonical_name, named_weights
from sparse_ft.training.gradient_flow import check_gradients_came, watch_gradient_flow
from sparse_ft.training.processes import check_same_masks, check_strategy, check_whole, wait_for_everyone
from sparse_ft.training.resume import disown_checkpoint

# Their update of a weight reads nothing but this weight, its gradient and its state, and is 0 where all three are 0.
# Subclasses are not members: they may do anything.
ELEMENTWISE_OPTIMIZERS: set[type[torch.optim.Optimizer]] = {
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
}
# PEFT types whose update of a weight is dense: it is no longer sparse once they are merged.
_DENSE_ADAPTERS = {"LORA", "ADALORA"}
_FIX = "find what writes weights outside the optimizer's step (a callback, an optimizer that updates inside backward)"


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that owns the update: what is left without accelerate's (and later other) wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer) or not isinstance(optimizer, torch.optim.Optimizer):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(
                f"MaskCallback needs a torch.optim.Optimizer, got {type(optimizer).__name__}; wrap it in one."
            )
        optimizer = optimizer.optimizer
    return optimizer


def keeps_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weights that are 0, with gradient and state 0, are exactly 0 after a step.

    True for `ELEMENTWISE_OPTIMIZERS`, unless an `eps` is 0 in the weights' dtype: then Adam divides 0 by 0.
    """
    if type(optimizer) not in ELEMENTWISE_OPTIMIZERS:
        return False
    return all(
        torch.tensor(float(group.get("eps", 1.0)), dtype=parameter.dtype) > 0
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


class _Sparsity(NamedTuple):
    """Measured: share of zeros over the masked weights, and how many zeros are kept weights."""

    total: float
    kept_zero: int


class MaskCallback(TrainerCallback):
    """Keep pruned weights exactly zero while `Trainer` or `SFTTrainer` trains, and check that they are.

    Checked at the start, after the first step, at each evaluation and save, and at the end (after
    `load_best_model_at_end`). A step that is to be saved is checked before the checkpoint is written. Each
    `checkpoint-N` gets `sparse_masks.safetensors` and `sparse_ft.json`, so it is a sparse checkpoint itself; MaskLoRA
    saves its own masks.

    Each log of the Trainer gains `sparsity/total` (share of zeros in the masked weights, as last measured) and
    `sparsity/kept_zero` (kept weights that are zero). They are in `trainer.state.log_history`, in `trainer_state.json`
    and on the console. The Trainer calls its own reporters before any callback of yours; a reporter that shall show
    them goes behind this one: `report_to="none", callbacks=[MaskCallback(masks), TensorBoardCallback()]`.

    Frozen weights (under an adapter) are checked, not enforced. Weights whose mask is all True cost nothing. One
    callback can serve several `train()` calls. If training ends by an exception its hooks stay until the next
    `train()`, `remove_hooks()`, or until the callback is garbage.

    Args:
        masks: the masks; None takes the zeros of the model when training begins (on resuming, the masks that the
            checkpoint of that step in `output_dir` carries).

    Raises (from `trainer.train()`):
        ValueError: before the first step, if a mask's tensor is absent, packed in 4 bits or of another shape, masks is
            None and the model is dense, nothing is trainable, the processes have different masks, or the model is
            sharded among them.
        RuntimeError: if a pruned weight is not zero, trainable parameters of a block get no gradient, or training has
            diverged: weights or, at a log, the gradient are not finite. Loss scaling of fp16 skips such a gradient.
    """

    def __init__(self, masks: MaskSet | None = None) -> None:
        self.masks = masks
        self._measured: _Sparsity | None = None
        self._check_next_step = False
        self._handles: list[RemovableHandle] = []
        # Hooks sit on the parameters and would outlive the callback; they hold no reference to it.
        weakref.finalize(self, _remove_all, self._handles)

    def remove_hooks(self) -> None:
        """Take the hooks off the model and the optimizer. Training on without them revives pruned weights."""
        _remove_all(self._handles)

    # -- Trainer's events --------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check masks against the model, then place the hooks."""
        self.remove_hooks()
        check_strategy(args)
        model, optimizer = kwargs["model"], base_optimizer(kwargs["optimizer"])
        check_whole(model)
        if self.masks is None:
            self.masks = _masks_of(model, args, state)
        _check_not_packed(self.masks, model)
        check_same_masks(self.masks, args)
        self._measured = self._check(model, "when training begins", fix="set them to zero with masks.apply_(model)")
        self._check_next_step = True
        _warn_of_dense_adapter(self.masks, model)
        self._handles += watch_gradient_flow(model)
        bits = _bits_of_trainable(self.masks, model)
        for parameter, keep in bits:
            _mask_state(optimizer, parameter, keep)
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(_mask_gradient, keep)))
        if bits and not keeps_zeros(optimizer):
            self._handles.append(optimizer.register_step_post_hook(partial(_mask_weights, bits)))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check in the first step that what trains has a gradient."""
        if self._check_next_step:
            check_gradients_came(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check after the first step, and before a checkpoint is written."""
        if control.should_save or self._check_next_step:
            self._measured = self._check(kwargs["model"], f"after step {state.global_step}")
            self._check_next_step = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check before a checkpoint is written."""
        if control.should_save:
            self._measured = self._check(kwargs["model"], f"after step {state.global_step}")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and check."""
        if self._measured is not None:
            self._measured = self._check(kwargs["model"], f"after step {state.global_step}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check, and write the sidecars into the checkpoint just written.

        They come when every process has written its part, and no process goes on before they are there.
        """
        checkpoint = _checkpoint_of(args, state)
        try:
            self._measured = self._check(kwargs["model"], f"at the save of step {state.global_step}")
        except RuntimeError:
            if args.should_save:
                disown_checkpoint(checkpoint)
            raise
        wait_for_everyone()
        if args.should_save and checkpoint.is_dir():  # a hyperparameter search saves elsewhere
            _write_sidecars(checkpoint, self._known_masks(), kwargs["model"], state)
        wait_for_everyone()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the last measurement to the entry just logged; RuntimeError if that says the gradient is NaN."""
        _check_gradient_norm(args, state, kwargs)
        if self._measured is None:
            return
        values = {"sparsity/total": self._measured.total, "sparsity/kept_zero": self._measured.kept_zero}
        kwargs["logs"].update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks and check the model that the user gets."""
        self.remove_hooks()
        self._check(kwargs["model"], "at the end of training")
        self._measured = None

    # -- checking ----------------------------------------------------------------------------------------------------

    def _known_masks(self) -> MaskSet:
        if self.masks is None:
            raise RuntimeError("MaskCallback has no masks yet: they are taken when training begins.")
        return self.masks

    def _check(self, model: nn.Module, when: str, fix: str = _FIX) -> _Sparsity:
        """Measure the sparsity.

        Raises:
            RuntimeError: if a weight is not finite or a pruned one not zero.
            ValueError: if a tensor does not fit.
        """
        masks = self._known_masks()
        surprises = masks.surprises(model)
        revived = {name: s.pruned_nonzero for name, s in surprises.items() if s.pruned_nonzero}
        _check_finite(model, set(revived), when)
        if revived:
            name = next(iter(revived))
            raise RuntimeError(
                f"{sum(revived.values())} pruned weights in {len(revived)} tensors are not zero, the first "
                f"{revived[name]} in '{name}', {when}; {fix}."
            )
        kept_zero = sum(s.kept_zero for s in surprises.values())
        total = sum(total for _, total in masks.counts().values())
        return _Sparsity(masks.sparsity() + kept_zero / total, kept_zero)


def _check_not_packed(masks: MaskSet, model: nn.Module) -> None:
    """4-bit loading leaves a column of bytes in a weight's place; 8-bit keeps shape and zeros, so it can be checked."""
    for name, weight in named_weights(model).items():
        if name in masks and not weight.is_floating_point() and tuple(weight.shape) != masks.shape(name):
            raise ValueError(
                f"'{name}' is packed, {str(weight.dtype).removeprefix('torch.')} {tuple(weight.shape)} in place of "
                f"{masks.shape(name)}, as 4-bit loading does it: such a weight can be neither trained nor checked; "
                f"load the model in 16 or 32 bits, or train an adapter (sparse_ft.MaskLoraConfig) without MaskCallback."
            )


def _check_finite(model: nn.Module, suspects: set[str], when: str) -> None:
    """NaN is not zero either, but the mask is not to blame: look at what trains and at tensors that seem revived."""
    broken = [
        canonical_name(name)
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and (parameter.requires_grad or canonical_name(name) in suspects)
        and not bool(torch.isfinite(parameter).all())
    ]
    if broken:
        raise RuntimeError(
            f"Training diverged: the weights of {len(broken)} tensors are not finite, the first '{broken[0]}', {when}; "
            f"lower the learning rate, or repair the model if it came like this."
        )


def _check_gradient_norm(args: TrainingArguments, state: TrainerState, event: dict[str, Any]) -> None:
    """A gradient that is NaN ends in the weights, unless the scaler of fp16 has left its step out."""
    norm = (event.get("logs") or {}).get("grad_norm")
    scaled = args.fp16 or getattr(event.get("optimizer"), "scaler", None) is not None
    if norm is not None and math.isnan(norm) and not scaled:
        raise RuntimeError(
            f"Training diverged: the gradient is not finite at step {state.global_step}; lower the learning rate, or "
            f"look for examples without a label."
        )


def _remove_all(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def _mask_gradient(bits: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not None:  # an optimizer that steps inside backward has taken it
        mask_(parameter.grad, bits)


def _mask_weights(
    pairs: list[tuple[nn.Parameter, Tensor]], optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
) -> None:
    for parameter, bits in pairs:
        mask_(parameter, bits)


def _mask_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, bits: Tensor) -> None:
    """Clear moments of pruned weights, left by training without masks: they would move the weight off zero."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            mask_(value, bits.to(value.device))


def _bits_of_trainable(masks: MaskSet, model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """The parameters to enforce, with their bits on the same device. A shared parameter has one name, so one entry."""
    weights, pairs = named_weights(model), []
    for name, (kept, total) in masks.counts().items():
        parameter = cast(nn.Parameter, weights[name])
        if parameter.requires_grad and kept < total:
            pairs.append((parameter, _widened(keep_bits(masks[name].to(parameter.device)), parameter)))
    return pairs


def _widened(bits: Tensor, weight: Tensor) -> Tensor:
    """Bits of the weight's width on the CPU, as they are elsewhere."""
    by_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return bits.to(by_size[weight.element_size()]) if bits.device.type == "cpu" else bits


def _checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(cast(str, args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _masks_of(model: nn.Module, args: TrainingArguments, state: TrainerState) -> MaskSet:
    """The masks a resumed run was saved with: kept weights may have become zero since. Otherwise the model's zeros."""
    checkpoint = _checkpoint_of(args, state)
    if state.global_step > 0 and (checkpoint / MASKS_FILE).is_file():
        return MaskSet.load(checkpoint)
    return MaskSet.from_zeros(model)


def _write_sidecars(checkpoint: Path, masks: MaskSet, model: nn.Module, state: TrainerState) -> None:
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "masks", None) is not None for config in adapters):
        return  # a masked adapter has saved its own masks with itself
    arguments = {"step": state.global_step, "max_steps": state.max_steps}
    write_sidecars(checkpoint, masks, make_record(masks, model, command="train", arguments=arguments))


def _warn_of_dense_adapter(masks: MaskSet, model: nn.Module) -> None:
    kinds = {
        name: str(getattr(config.peft_type, "value", config.peft_type))
        for name, config in getattr(model, "peft_config", {}).items()
    }
    dense = [name for name, kind in kinds.items() if kind in _DENSE_ADAPTERS]
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    if dense and any(canonical_name(f"{module}.weight") in masks for module in adapted):
        warnings.warn(
            f"Adapter '{dense[0]}' ({kinds[dense[0]]}) updates pruned layers densely and merging it will revive their "
            f"zeros; use sparse_ft.MaskLoraConfig to keep them.",
            stacklevel=2,
        )
