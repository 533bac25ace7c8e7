"""Tiny models with a tokenizer and a text of their own, and what a command left behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_models import TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil two green eggs in an old iron pot".split()


def sentences(count: int, seed: int) -> str:
    """Text with some structure: each sentence repeats one of a few orders of words."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        start = int(torch.randint(len(WORDS), (1,), generator=generator))
        step = int(torch.randint(1, 4, (1,), generator=generator))
        lines.append(" ".join(WORDS[(start + step * i) % len(WORDS)] for i in range(8)) + ".")
    return "\n".join(lines) + "\n"


def save_tokenizer(directory: Path, vocabulary: int = 96, length: int = 64) -> None:
    """A word-level tokenizer whose ids fit the tiny models."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordLevelTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>", "<pad>", "<unk>"])
    tokenizer.train_from_iterator([sentences(50, 0)], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_model(directory: Path, name: str = "llama", seed: int = 0) -> Path:
    """A tiny model of one family with the tokenizer, as `save_pretrained` writes it."""
    TINY[name](seed).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@dataclass
class Result:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error, without `sparse-ft verb: error: `."""
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(lines) == 1, self.err
        return lines[0].split(": error: ", 1)[1]


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, hidden ones included, with the content of files."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in paths}
