"""Distillation of an encoder-decoder: a small T5 that sorts letters, pruned and retrained beside its dense self.

    python tests/benchmarks/quality_distillation_t5.py             # some ten CPU minutes; resumes where it stopped

The task: 8 to 12 letters of 26, with repetitions, come back in alphabetical order. The dense model is trained from its
config with Seq2SeqTrainer and kept in `--cache`. It is pruned by magnitude and retrained on the same samples, in the
same number of steps for every loss, too few for cross-entropy to recover everything. Each loss has its own learning
rate, the best of the grid on the validation samples. `exact_match` is the share of held-out inputs whose greedy
generation is right to the last letter and stops there, `token_accuracy` that of the tokens predicted with the right
ones before them. Cross-entropy alone also gets the number of steps that takes the time of the others.
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
from quality import ROOT, Table, arguments
from torch import Tensor
from transformers import PreTrainedModel, Seq2SeqTrainer, T5Config, T5ForConditionalGeneration

from sparse_ft import MaskCallback, prune

PAD, END, LETTERS, LENGTHS = 0, 1, range(2, 28), (8, 12)
SIZES = {"train": 20_000, "validation": 500, "test": 1_000}
BATCH, DENSE_STEPS, DENSE_RATE = 64, 600, 1e-3
SPARSITY, STEPS = 0.75, 60
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
# (kl_weight, squarehead_weight); SquareHead is a sum over the 6 compared layers
LOSSES = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.1), (1.0, 1.0), (1.0, 0.1), (0.0, 3.0))
WITH_SEEDS = ((0.0, 0.0), (0.0, 1.0), (0.0, 0.1))
LONGER = 84  # steps of cross-entropy that cost what STEPS with a teacher do

Sample = dict[str, list[int]]


def make_samples() -> dict[str, list[Sample]]:
    """The three splits, no input in two of them."""
    draw, seen = random.Random(0), set[tuple[int, ...]]()
    while len(seen) < sum(SIZES.values()):
        seen.add(tuple(draw.choice(LETTERS) for _ in range(draw.randint(*LENGTHS))))
    letters = sorted(seen)
    draw.shuffle(letters)
    samples = [{"input_ids": [*each, END], "labels": [*sorted(each), END]} for each in letters]
    splits, start = {}, 0
    for name, size in SIZES.items():
        splits[name] = samples[start : start + size]
        start += size
    return splits


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Filled up on the right; the labels of padding are -100."""
    length = max(len(sample["input_ids"]) for sample in samples)

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([sample[name] + [value] * (length - len(sample[name])) for sample in samples])

    ids = filled("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": filled("labels", -100)}


def make_model() -> T5ForConditionalGeneration:
    """A T5 of 1.2 M parameters with the gated feed-forward of v1.1."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(LETTERS) + 2,
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        num_decoder_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    )
    return T5ForConditionalGeneration(config)


@torch.no_grad()
def evaluate(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[float, float]:
    """(exact match of greedy generation, accuracy of tokens after the right ones), in fp32."""
    model.eval()
    whole = right = tokens = 0
    for start in range(0, len(samples), 250):
        batch = collate(samples[start : start + 250])
        labels, valid = batch["labels"], batch["labels"] != -100
        right += int((model(**batch).logits.argmax(-1) == labels)[valid].sum())
        tokens += int(valid.sum())
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        made = model.generate(**inputs, max_new_tokens=labels.shape[1], do_sample=False)[:, 1:]
        made = torch.nn.functional.pad(made, (0, labels.shape[1] - made.shape[1]), value=PAD)
        whole += int(((made == labels) | ~valid).all(-1).sum())
    return whole / len(samples), right / tokens


class Bench:
    """The samples and the dense model."""

    def __init__(self, cache: Path) -> None:
        self.samples, self.cache = make_samples(), cache
        if not (cache / "config.json").is_file():
            model = make_model()
            cell = Cell(0.0, SIZES["train"], DENSE_STEPS, DENSE_RATE)
            fit(Seq2SeqTrainer, cell, batch=BATCH, model=model, **self.data)
            model.save_pretrained(cache)

    @property
    def data(self) -> dict[str, Any]:
        """What every training is given."""
        return {"train_dataset": self.samples["train"], "data_collator": collate}

    def load(self) -> T5ForConditionalGeneration:
        """A fresh copy of the dense model."""
        return T5ForConditionalGeneration.from_pretrained(self.cache).eval()

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """Columns of a row."""
        validation, _ = evaluate(model, self.samples["validation"])
        exact, accuracy = evaluate(model, self.samples["test"])
        return {
            "validation": round(validation, 4),
            "exact_match": round(exact, 4),
            "token_accuracy": round(accuracy, 4),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Prune, retrain, evaluate; without steps what pruning leaves."""
        model = self.load()
        if not cell.sparsity:
            return self.scores(model)
        masks = prune(model, method="magnitude", sparsity=cell.sparsity, progress=False)
        if not cell.steps:
            return self.scores(model)
        found = fit(
            Seq2SeqTrainer,
            cell,
            teacher=self.load(),
            batch=BATCH,
            callbacks=[MaskCallback(masks)],
            model=model,
            **self.data,
        )
        masks.verify(model)
        return {**self.scores(model), **found}


def main() -> None:
    """The dense and the pruned model, then every loss with every rate, then seeds."""
    parser = arguments("distillation/t5", __doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "t5-sort", help="where the dense model is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.cache)
    parameters = sum(parameter.numel() for parameter in make_model().parameters())
    protocol = {
        "model": f"T5 with gated feed-forward, 3 + 3 layers of 128, {parameters} parameters, trained here",
        "task": "8 to 12 letters of 26 into alphabetical order",
        "dense": f"{DENSE_STEPS} steps of {BATCH} samples, AdamW, learning rate {DENSE_RATE:g}",
        "retraining": f"{BATCH} samples a step, AdamW without decay, 10% warm-up, linear decay, fp32, same samples",
        "evaluation": f"{SIZES['validation']} validation samples for the rate, {SIZES['test']} test samples",
        "seed": "order of the samples",
    }
    table = Table(args.output, __file__, protocol=protocol, keys=tuple(Cell.__dataclass_fields__), force=args.force)
    table.row(asdict(DENSE), lambda: bench.measure(DENSE))
    pruned = Cell(SPARSITY, 0, 0, 0.0)
    table.row(asdict(pruned), lambda: bench.measure(pruned))
    make = partial(Cell, SPARSITY, SIZES["train"], STEPS, 0.0)
    chosen = {loss: best_rate(table, make(*loss), RATES, bench.measure) for loss in LOSSES}
    for loss, cell in chosen.items():
        seeds = SEEDS if loss in WITH_SEEDS else SEEDS[:1]
        print(over_seeds(table, cell, seeds, bench.measure, "exact_match"), flush=True)
    longer = replace(chosen[0.0, 0.0], steps=LONGER)
    print(over_seeds(table, longer, SEEDS, bench.measure, "exact_match"), flush=True)


if __name__ == "__main__":
    main()
