"""Recovery by distillation: cross-entropy, KL and SquareHead after magnitude pruning, and what SquareHead depends on.

    python tests/benchmarks/quality_distillation.py                  # hours on one core; resumes where it stopped
    python tests/benchmarks/quality_distillation.py --only weight    # one part: main, eighty, weight, kl, seeds, ...

Every cell prunes a fresh copy by magnitude, trains the stated number of steps of 12 x 256 tokens with AdamW (no weight
decay, 10% warm-up, linear decay, bf16 autocast) with the dense model as the teacher, merges adapters, verifies the
zeros, and evaluates on the validation and the test text. Settings are chosen by the column `validation`.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from quality import PROTOCOL, SEQUENCE_LENGTH, Bench, Table, arguments
from quality_retraining import BATCH, adapted, measured_sparsity
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from sparse_ft import MaskCallback, MaskSet, prune
from sparse_ft.data import windows
from sparse_ft.distillation import DistillationConfig, distilling


@dataclass(frozen=True)
class Cell:
    """One training; the fields are the key columns of its row."""

    part: str
    sparsity: float
    steps: int
    learning_rate: float
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    squarehead_weight: float = 0.0
    temperature: float = 1.0
    layers: str = "all"
    method: str = "full"
    seed: int = 0


# (kl_weight, squarehead_weight) of the four losses of the main table
LOSSES = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def cells() -> list[Cell]:
    """All trainings, those that matter most first."""
    main = [Cell("main", 0.9, 240, 1e-3, kl_weight=kl, squarehead_weight=sh) for kl, sh in LOSSES]
    weight = [
        Cell("weight", 0.9, 240, 1e-3, kl_weight=kl, squarehead_weight=sh)
        for kl, sh in ((1.0, 0.1), (0.0, 0.1), (0.0, 0.03))
    ]
    kl = [
        Cell("kl", 0.9, 240, 1e-3, kl_weight=3.0),
        Cell("kl", 0.9, 240, 2e-3, kl_weight=1.0),
    ]
    eighty = [Cell("eighty", 0.8, 150, 5e-4, kl_weight=kl, squarehead_weight=sh) for kl, sh in LOSSES]
    seeds = [Cell("seeds", 0.8, 150, 5e-4, squarehead_weight=sh, seed=seed) for seed in (1, 2) for _, sh in LOSSES[::2]]
    lora = [
        Cell("lora", 0.8, 150, 4e-3, kl_weight=kl, squarehead_weight=sh, method="mask_lora") for kl, sh in LOSSES[:3]
    ]
    both = (0.0, 0.1)
    layers = [
        Cell("layers", 0.8, 150, 5e-4, squarehead_weight=0.1),
        Cell("layers", 0.8, 150, 5e-4, squarehead_weight=0.3, layers="8"),
    ]
    length = [Cell("length", 0.8, 50, 5e-4, squarehead_weight=sh) for sh in both]
    lr = [Cell("lr", 0.8, 150, 1e-3, squarehead_weight=sh) for sh in both]
    return [*main, *eighty, *weight, *kl, *seeds, *lora, *layers, *length, *lr]


def train(model: PreTrainedModel, ids: Tensor, masks: MaskSet, cell: Cell, teacher: PreTrainedModel) -> dict[str, Any]:
    """Train in place; the seconds of processor time per step and the last log."""
    blocks = windows(ids, SEQUENCE_LENGTH)
    dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")
    with tempfile.TemporaryDirectory() as directory:
        common: dict[str, Any] = {
            "model": model,
            "args": TrainingArguments(
                output_dir=directory,
                max_steps=cell.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=cell.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=cell.steps // 10,
                weight_decay=0.0,
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                save_strategy="no",
                logging_steps=cell.steps // 4,
                report_to="none",
                seed=cell.seed,
                disable_tqdm=True,
            ),
            "train_dataset": dataset,
            "data_collator": default_data_collator,
            "callbacks": [MaskCallback(masks)] if cell.method == "full" else [],
        }
        if cell.kl_weight or cell.squarehead_weight:
            config = DistillationConfig(
                ce_weight=cell.ce_weight,
                kl_weight=cell.kl_weight,
                squarehead_weight=cell.squarehead_weight,
                temperature=cell.temperature,
                distill_layers=None if cell.layers == "all" else cell.layers.split(),
                no_padding=True,
            )
            trainer: Any = distilling(Trainer)(**common, distillation=config, teacher=teacher)
        else:
            trainer = Trainer(**common)
        start = time.process_time()
        trainer.train()
        seconds = (time.process_time() - start) / cell.steps
    logged = next(entry for entry in reversed(trainer.state.log_history) if "loss" in entry)
    named = {
        name: round(logged[f"distill/{name}"], 4) for name in ("ce", "kl", "squarehead") if f"distill/{name}" in logged
    }
    return {"cpu_seconds_per_step": round(seconds, 3), "last_log": named}


def measure(bench: Bench, cell: Cell, dense: float) -> dict[str, Any]:
    """Prune, train, merge, evaluate."""
    teacher, model = bench.load(), bench.load()
    masks = prune(model, method="magnitude", pattern="unstructured", sparsity=cell.sparsity, progress=False)
    pruned = bench.perplexity(model)
    wrapped = adapted(model, masks, cell.method)
    found = train(wrapped, bench.train, masks, cell, teacher)
    model = wrapped.merge_and_unload() if cell.method != "full" else model
    masks.verify(model)
    model.eval()
    after = bench.perplexity(model)
    return {
        **found,
        "pruned_perplexity": round(pruned, 3),
        "validation": round(bench.perplexity(model, "validation"), 3),
        "perplexity": round(after, 3),
        "gap_closed": round(math.log(pruned / after) / math.log(pruned / dense), 4),
        "merged_sparsity": round(measured_sparsity(model, masks), 6),
    }


def main() -> None:
    """Run all cells."""
    args = arguments("distillation/llama_wt2", __doc__.splitlines()[0]).parse_args()
    bench = Bench(args.model, args.dataset)
    protocol = {**PROTOCOL, "training": f"AdamW, {BATCH} x {SEQUENCE_LENGTH} tokens a step, teacher: the dense model"}
    keys = tuple(Cell.__dataclass_fields__)
    table = Table(args.output, __file__, protocol=protocol, keys=keys, force=args.force)
    reference = Cell("dense", 0.0, 0, 0.0)
    dense = table.row(
        asdict(reference),
        lambda: {
            "perplexity": round(bench.perplexity(bench.load()), 3),
            "validation": round(bench.perplexity(bench.load(), "validation"), 3),
        },
    )["perplexity"]
    for cell in cells():
        if args.only and cell.part not in args.only:
            continue
        table.row(asdict(cell), lambda cell=cell: measure(bench, cell, dense))


if __name__ == "__main__":
    main()
