"""What the quality experiments share: the small Llama, WikiText-2, one evaluation protocol, and rows kept as they come.

A script calls `Table.row` for every cell; a cell that the result file already holds is not run again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from results import write_result
from torch import Tensor
from transformers import PreTrainedModel

from sparse_ft.data import load_text, random_windows, tokenize
from sparse_ft.evaluation import perplexity
from sparse_ft.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE_LENGTH = 256
CALIBRATION_WINDOWS = 128
EVALUATION_WINDOWS = 240


def arguments(topic: str, description: str) -> argparse.ArgumentParser:
    """The options every quality script has."""
    parser = argparse.ArgumentParser(description=description)
    shared = ROOT.parent / "shared"
    parser.add_argument("--model", default=str(shared / "models/llama-wt2"), help="directory of a causal LM")
    parser.add_argument("--dataset", default=str(shared / "data/wikitext-2"), help="directory with train and test text")
    parser.add_argument("--output", type=Path, default=ROOT / f"docs/results/{topic}.json", help="result file")
    parser.add_argument("--force", action="store_true", help="run cells again that the result file already holds")
    parser.add_argument("--only", nargs="*", default=[], help="run only cells of these methods")
    return parser


@dataclass
class Bench:
    """Model and texts, loaded once."""

    model: str
    dataset: str
    test: Tensor = field(init=False)
    validation: Tensor = field(init=False)
    train: Tensor = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = load_tokenizer(self.model)
        self.test = tokenize(load_text(self.dataset, split="test"), tokenizer)
        self.validation = tokenize(load_text(self.dataset, split="validation"), tokenizer)
        self.train = tokenize(load_text(self.dataset, split="train"), tokenizer)

    def load(self) -> PreTrainedModel:
        """A fresh copy of the model in fp32."""
        return load_model(self.model, dtype=torch.float32)

    def calibration(self, seed: int) -> list[Tensor]:
        """Random windows of the training text, (16, 256) token ids each."""
        windows = random_windows(self.train, count=CALIBRATION_WINDOWS, length=SEQUENCE_LENGTH, seed=seed)
        return list(windows.split(16))

    def perplexity(self, model: PreTrainedModel, split: str = "test") -> float:
        """Perplexity of the test or validation text: non-overlapping windows, fp32 weights, bf16 autocast."""
        result = perplexity(
            model,
            self.test if split == "test" else self.validation,
            sequence_length=SEQUENCE_LENGTH,
            max_windows=EVALUATION_WINDOWS,
            dtype=torch.bfloat16,
            progress=False,
        )
        return result.perplexity


PROTOCOL = {
    "weights": "fp32",
    "evaluation": f"first {EVALUATION_WINDOWS} non-overlapping windows of {SEQUENCE_LENGTH} test tokens, first token "
    "of each not scored, bf16 autocast",
    "calibration": f"{CALIBRATION_WINDOWS} random windows of {SEQUENCE_LENGTH} training tokens",
}


class Table:
    """Rows of one result file, each found by its key columns. Several processes may fill the same file."""

    def __init__(
        self, path: Path, script: str, *, protocol: dict[str, Any], keys: tuple[str, ...], force: bool
    ) -> None:
        self.path, self.script, self.protocol, self.keys = path, script, protocol, keys
        if force:
            path.unlink(missing_ok=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What the file holds now."""
        stored: list[dict[str, Any]] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        return stored

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The stored row of a key."""
        return next((r for r in self.rows if all(r.get(k) == key.get(k) for k in self.keys)), None)

    def row(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a key: the stored one, or measured now, printed and written at once."""
        found = self.find(key)
        if found is None:
            found = {**key, **measure()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                rows = self.rows if self.find(key) else [*self.rows, found]
                seeds = sorted({r["seed"] for r in rows if r.get("seed") is not None})
                write_result(self.path, self.script, rows, self.protocol, seeds)
            print(json.dumps(found), flush=True)
        return found


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
