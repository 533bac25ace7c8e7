"""When does SquareHead pay? A pruned classifier retrained on few labelled sentences beside the dense one.

    python tests/benchmarks/quality_distillation_sst2.py           # half a CPU hour; resumes where it stopped

The dense teacher is the classifier of `finetunes.py`, which has seen 12,800 sentences and phrases of SST-2. Its copy is
pruned by magnitude and retrained on 64, 256 or 768 of them, in the same number of steps, with cross-entropy alone or
beside KL and SquareHead. The seed draws the examples. Each loss has its own learning rate for each number of examples,
the best of the grid on 500 held-out phrases at seed 0. `accuracy` is that on SST-2's 872 test sentences.
With 64 examples both chosen settings also run three times as long.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distillation_runs import DENSE, Cell, best_rate, fit, over_seeds
from finetunes import LONGEST, Batch, Example, Recipe, Workshop, accuracy, by_length, padded
from quality import Table, arguments
from transformers import PreTrainedModel, Trainer

from sparse_ft import MaskCallback, prune

TEACHER = Recipe("sst2", "AdamW", 5e-4, 400)
EXAMPLES, STEPS, BATCH = (64, 768, 256), 48, 16  # of 768 each is seen once
SPARSITIES, SPARSITY = (0.7, 0.8, 0.9, 0.95), 0.9
RATES = (2e-4, 6e-4, 5e-5)
SEEDS = (0, 1, 2)
# (kl_weight, squarehead_weight); SquareHead is a sum over the 8 layers
LOSSES = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))
WITH_SEEDS = ((0.0, 0.0), (0.0, 1.0))
LONGER = 144  # steps, with the fewest examples: states have more to say than labels


class Bench:
    """Teacher and sentences.

    Args:
        shop: base, tokenizer and SST-2.
    """

    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.pad: int = shop.tokenizer.pad_token_id
        self.train = [example for example in shop.examples("train") if len(example[0]) <= LONGEST]
        self.validation = by_length(shop.examples("dev")[:500], self.pad)
        self.test = by_length(shop.examples("test"), self.pad)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A batch with a mask, which tells SquareHead what is padding."""
        batch = padded(list(examples), self.pad)
        lengths = torch.tensor([len(ids) for ids, _ in examples])
        mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
        return {**batch, "attention_mask": mask.long()}

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """Columns of a row."""
        model.eval()
        return {
            "validation": round(accuracy(model, self.validation), 4),
            "accuracy": round(accuracy(model, self.test), 4),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Prune, retrain, evaluate; without steps what pruning leaves."""
        model = self.shop.finetuned(TEACHER)
        if not cell.sparsity:
            return self.scores(model)
        masks = prune(model, method="magnitude", sparsity=cell.sparsity, progress=False)
        if not cell.steps:
            return self.scores(model)
        found = fit(
            Trainer,
            cell,
            teacher=self.shop.finetuned(TEACHER),
            batch=BATCH,
            callbacks=[MaskCallback(masks)],
            options={"bf16": True, "remove_unused_columns": False},
            model=model.requires_grad_(True),
            train_dataset=random.Random(cell.seed).sample(self.train, cell.examples),
            data_collator=self.collate,
        )
        masks.verify(model)
        return {**self.scores(model), **found}


def main() -> None:
    """The dense and the pruned model, then every loss with every rate, then seeds."""
    parser = arguments("distillation/sst2", __doc__.splitlines()[0])
    parser.add_argument("--sst2", type=Path, default=None, help="directory of SST-2's three files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(Workshop(args.model, args.sst2 or Path(args.dataset).parent / "sst2"))
    protocol = {
        "teacher": f"classifier of finetunes.py, {TEACHER.label}, {TEACHER.steps} steps of 32 examples",
        "student": "copy of the teacher pruned by magnitude",
        "retraining": f"{BATCH} examples a step, AdamW without decay, 10% warm-up, linear decay, bf16 autocast",
        "evaluation": "accuracy on 500 phrases of dev for the rate, on SST-2's 872 test sentences, bf16 autocast",
        "seed": "which examples, and their order",
    }
    table = Table(args.output, __file__, protocol=protocol, keys=tuple(Cell.__dataclass_fields__), force=args.force)
    for cell in (DENSE, *(Cell(sparsity, 0, 0, 0.0) for sparsity in SPARSITIES)):
        table.row(asdict(cell), lambda cell=cell: bench.measure(cell))
    make = partial(Cell, SPARSITY)
    order = [(examples, loss) for part in (LOSSES[:2], LOSSES[2:]) for examples in EXAMPLES for loss in part]
    chosen = {}
    for examples, loss in order:
        cell = best_rate(table, make(examples, STEPS, 0.0, *loss), RATES, bench.measure)
        chosen[examples, loss] = cell
        seeds = SEEDS if loss in WITH_SEEDS else SEEDS[:1]
        print(over_seeds(table, cell, seeds, bench.measure, "accuracy"), flush=True)
    for loss in WITH_SEEDS:
        longer = replace(chosen[min(EXAMPLES), loss], steps=LONGER)
        print(over_seeds(table, longer, SEEDS, bench.measure, "accuracy"), flush=True)


if __name__ == "__main__":
    main()
