"""What the experiments with a fine-tuned teacher share: cells, one masked training, learning rates chosen from a grid.

A cell starts from the pruned copy of a dense model that has learnt the task, trains all unpruned weights with AdamW (no
weight decay, 10% warm-up, linear decay, gradient norm cut at 1) with the dense model as the teacher, and is evaluated
on validation data, by which learning rates are chosen, and on test data.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from quality import Table
from transformers import PreTrainedModel, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from sparse_ft.distillation import DistillationConfig, distilling

LOGGED = ("ce", "kl", "squarehead", "squarehead/encoder", "squarehead/decoder")


@dataclass(frozen=True)
class Cell:
    """One training; the fields are the key columns of its row."""

    sparsity: float
    examples: int
    steps: int
    learning_rate: float
    kl_weight: float = 0.0
    squarehead_weight: float = 0.0
    seed: int = 0


DENSE = Cell(0.0, 0, 0, 0.0)
Measure = Callable[[Cell], dict[str, Any]]


def fit(
    trainer_class: type[Trainer],
    cell: Cell,
    *,
    teacher: PreTrainedModel | None = None,
    batch: int,
    callbacks: Sequence[TrainerCallback] = (),
    options: dict[str, Any] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Train `given["model"]` in place; the seconds of processor time per step and the teacher's losses at the end.

    Args:
        trainer_class: `Trainer` or a subclass.
        cell: steps, learning rate, weights and seed.
        teacher: needed where a weight of the cell is above 0.
        batch: samples per step.
        options: for TrainingArguments, beside those above.
        given: model, train_dataset and data_collator.
    """
    with tempfile.TemporaryDirectory() as directory:
        arguments = Seq2SeqTrainingArguments(  # TrainingArguments and what Seq2SeqTrainer asks for
            output_dir=directory,
            max_steps=cell.steps,
            per_device_train_batch_size=batch,
            learning_rate=cell.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(cell.steps // 10, 1),
            weight_decay=0.0,
            use_cpu=True,
            save_strategy="no",
            logging_steps=max(cell.steps // 5, 1),
            report_to="none",
            seed=cell.seed,
            disable_tqdm=True,
            **(options or {}),
        )
        common: dict[str, Any] = {"args": arguments, "callbacks": list(callbacks), **given}
        if cell.kl_weight or cell.squarehead_weight:
            config = DistillationConfig(kl_weight=cell.kl_weight, squarehead_weight=cell.squarehead_weight)
            trainer: Any = distilling(trainer_class)(**common, distillation=config, teacher=teacher)
        else:
            trainer = trainer_class(**common)
        start = time.process_time()
        trainer.train()
        seconds = (time.process_time() - start) / cell.steps
    last = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    named = {name: round(last[f"distill/{name}"], 4) for name in LOGGED if f"distill/{name}" in last}
    return {"cpu_seconds_per_step": round(seconds, 3), "last_log": named or {"ce": round(float(last["loss"]), 4)}}


def best_rate(table: Table, cell: Cell, rates: Sequence[float], measure: Measure) -> Cell:
    """The cell at the rate whose row has the highest `validation`; all rates are run, on the cell's seed."""
    grid = [replace(cell, learning_rate=rate) for rate in rates]
    rows = [table.row(asdict(each), lambda each=each: measure(each)) for each in grid]
    return max(zip(grid, rows, strict=True), key=lambda pair: float(pair[1]["validation"]))[0]


def over_seeds(table: Table, cell: Cell, seeds: Sequence[int], measure: Measure, column: str) -> str:
    """A line for the terminal: the column of the cell with every seed, and their mean."""
    cells = [replace(cell, seed=seed) for seed in seeds]
    values = [float(table.row(asdict(each), lambda each=each: measure(each))[column]) for each in cells]
    weights = f"KL {cell.kl_weight:g}, SquareHead {cell.squarehead_weight:g}"
    shown = " ".join(f"{value:.4f}" for value in values)
    return (
        f"{cell.examples} examples, {weights}, rate {cell.learning_rate:g}: {shown} mean {statistics.fmean(values):.4f}"
    )
