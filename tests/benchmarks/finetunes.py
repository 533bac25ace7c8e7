"""Fine-tunes of the small Llama that the experiments on deltas and merging share, each trained once and kept.

Tasks: `sst2`, a sequence classifier on SST-2, and two causal models, `sentences` on the text of SST-2's training
sentences and `docstrings` on those of Python's standard library. Each starts from the same base, trains all weights
with a plain loop (32 sentences, or 8 windows of 128 tokens, a step; 10% warm-up, linear decay, gradient norm cut at 1,
bf16 autocast) and is kept as a model directory under `runs/finetunes`, which git ignores.

One step costs about half a CPU second: sentences of similar length share a batch, so little of it is padding.
"""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from quality import ROOT
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from sparse_ft.checkpoints import atomic_directory
from sparse_ft.cli.demo_corpus import write_corpus
from sparse_ft.data import tokenize, windows
from sparse_ft.models import load_model, load_tokenizer
from sparse_ft.training import AdamR, adamr_groups

Task = Literal["sst2", "sentences", "docstrings"]
Example = tuple[list[int], int]
Batch = dict[str, Tensor]

SENTENCES, WINDOWS, WINDOW = 32, 8, 128
LONGEST = 64  # tokens of a training sentence
DECAY = 0.01
MIN_WORDS = 8  # SST-2's training text is mostly phrases; only longer ones are text to model


@dataclass(frozen=True)
class Recipe:
    """One fine-tune."""

    task: Task
    optimizer: Literal["AdamW", "AdamR"]
    learning_rate: float
    steps: int

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.optimizer}, {self.learning_rate:g}"

    @property
    def directory(self) -> Path:
        """Where it is kept."""
        name = f"{self.task}-{self.optimizer}-{self.learning_rate:g}-{self.steps}".lower()
        return ROOT / "runs" / "finetunes" / name


class Workshop:
    """Base, tokenizer and data, and the fine-tunes made of them.

    Args:
        base: directory of the causal model all fine-tunes start from.
        sst2: directory with train.tsv.gz, dev.tsv.gz and test.tsv.gz.
    """

    def __init__(self, base: str, sst2: Path) -> None:
        if not (sst2 / "train.tsv.gz").is_file():
            sys.exit(f"SST-2 is not in '{sst2}', so this experiment is left out; put train, dev and test.tsv.gz there.")
        self.base, self.sst2 = base, sst2
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base)
        corpus = ROOT / "runs" / "finetunes" / "docstrings-text"
        self.docstrings = corpus if (corpus / "test.txt").is_file() else write_corpus(corpus)

    def examples(self, split: str) -> list[Example]:
        """(token ids, label) of every line of a split of SST-2."""
        lines = gzip.decompress((self.sst2 / f"{split}.tsv.gz").read_bytes()).decode().splitlines()[1:]
        pairs = [line.rsplit("\t", 1) for line in lines]
        encoded = self.tokenizer([text.strip() for text, _ in pairs])["input_ids"]
        return [(ids, int(label)) for ids, (_, label) in zip(encoded, pairs, strict=True)]

    def text(self, task: Task, split: Literal["train", "validation", "test"]) -> Tensor:
        """Token ids of the text of a causal task."""
        if task == "docstrings":
            return tokenize((self.docstrings / f"{split}.txt").read_text(encoding="utf-8"), self.tokenizer)
        name = "dev" if split == "validation" else split
        lines = gzip.decompress((self.sst2 / f"{name}.tsv.gz").read_bytes()).decode().splitlines()[1:]
        texts = [line.rsplit("\t", 1)[0].strip() for line in lines]
        return tokenize("\n".join(text for text in texts if len(text.split()) >= MIN_WORDS), self.tokenizer)

    def start(self, task: Task) -> PreTrainedModel:
        """The base in fp32, for `sst2` with a new head that is the same every time."""
        if task != "sst2":
            return load_model(self.base, dtype=torch.float32)
        torch.manual_seed(0)
        model = LlamaForSequenceClassification.from_pretrained(self.base, num_labels=2, dtype=torch.float32)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.eval()

    def finetuned(self, recipe: Recipe) -> PreTrainedModel:
        """The fine-tune in fp32 and eval mode, its weights without gradients; trained now if it is not kept."""
        if not (recipe.directory / "config.json").is_file():
            model = self.start(recipe.task)
            self._train(model, recipe)
            with atomic_directory(recipe.directory, overwrite=True) as directory:
                model.save_pretrained(directory)
                self.tokenizer.save_pretrained(directory)
        # autocast keeps bf16 copies of weights that require a gradient and would miss what is written into them
        return load_model(recipe.directory, dtype=torch.float32).requires_grad_(False)

    def _train(self, model: PreTrainedModel, recipe: Recipe) -> None:
        if recipe.optimizer == "AdamR":
            optimizer: Any = AdamR(adamr_groups(model, load_model(self.base)), lr=recipe.learning_rate, decay=DECAY)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
        warmup = max(recipe.steps // 10, 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup, (recipe.steps - step) / (recipe.steps - warmup + 1))
        )
        model.train()
        for batch in self._training_batches(recipe):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()

    def _training_batches(self, recipe: Recipe) -> Iterator[Batch]:
        """`steps` batches, in an order of one seed."""
        order = random.Random(0)
        if recipe.task != "sst2":
            blocks = windows(self.text(recipe.task, "train"), WINDOW)
            for _ in range(recipe.steps):
                rows = blocks[order.sample(range(len(blocks)), WINDOWS)]
                yield {"input_ids": rows, "labels": rows}
            return
        examples = [example for example in self.examples("train") if len(example[0]) <= LONGEST]
        made = 0
        while made < recipe.steps:
            pool = sorted(order.sample(examples, SENTENCES * 16), key=lambda example: len(example[0]))
            starts = list(range(0, len(pool), SENTENCES))
            order.shuffle(starts)
            for start in starts[: recipe.steps - made]:
                yield padded(pool[start : start + SENTENCES], self.tokenizer.pad_token_id)
                made += 1


def padded(examples: list[Example], pad: int) -> Batch:
    """Token ids (B, T) filled up on the right, and labels; causal attention needs no mask for what comes after."""
    length = max(len(ids) for ids, _ in examples)
    rows = [ids + [pad] * (length - len(ids)) for ids, _ in examples]
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor([label for _, label in examples])}


def by_length(examples: list[Example], pad: int, size: int = 64) -> list[Batch]:
    """All examples in batches of similar length."""
    ordered = sorted(examples, key=lambda example: len(example[0]))
    return [padded(ordered[start : start + size], pad) for start in range(0, len(ordered), size)]


@torch.no_grad()
def accuracy(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Share of examples classified rightly, bf16 autocast."""
    right = total = 0
    with torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            predicted = model(input_ids=batch["input_ids"]).logits.argmax(-1)
            right += int((predicted == batch["labels"]).sum())
            total += len(predicted)
    return right / total
