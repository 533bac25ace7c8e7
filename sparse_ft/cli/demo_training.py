"""One short training run as the demo needs it: nothing saved, one progress bar, everything else the Trainer's."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

__all__ = ["Progress", "train"]


class Progress(TrainerCallback):
    """A bar with the loss beside it, instead of a line per log."""

    def __init__(self, name: str) -> None:
        interval = 1.0 if sys.stderr.isatty() else 20.0  # a log file shall not fill with bars
        self._bar: tqdm[Any] = tqdm(desc=name, unit="step", leave=False, mininterval=interval, delay=2)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Now the number of steps is known."""
        self._bar.reset(total=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self._bar.update(1)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the loss."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self._bar.set_postfix(loss=f"{float(loss):.2f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the bar."""
        self._bar.close()


def train(
    model: nn.Module,
    data: Any,
    name: str,
    *,
    steps: int,
    bf16: bool,
    device: torch.device,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Train a model in place and return the log.

    Args:
        model: what is trained, on any device.
        data: dataset of `input_ids` and `labels` blocks.
        name: for the bar.
        steps: optimizer steps.
        bf16: compute in bf16 autocast.
        device: where to train.
        callbacks: of the Trainer.
        arguments: further `TrainingArguments`.
    """
    on_cpu = device.type == "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            bf16=bf16,
            use_cpu=on_cpu,
            dataloader_pin_memory=not on_cpu,
            logging_steps=max(1, steps // 30),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **arguments,
        )
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=[*callbacks, Progress(name)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return list(trainer.state.log_history)
