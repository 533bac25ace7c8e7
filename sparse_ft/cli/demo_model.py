"""The demo's own model: a small Llama, trained once on the demo's text and kept in the user's cache.

2.0 million parameters, about two minutes on two CPU cores. The cache is `$SPARSE_FT_CACHE`, else
`$XDG_CACHE_HOME/sparse_ft`, else `~/.cache/sparse_ft`; its entries are named by a digest of the text and of everything
below, so that a change of either trains anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import atomic_directory
from sparse_ft.cli.demo_corpus import train_tokenizer, write_corpus

__all__ = ["bf16_is_faster", "cache_root", "demo_corpus", "demo_model"]

VOCABULARY = 1024
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
SEQUENCE_LENGTH = 128
TRAINING = {"steps": 1800, "batch_size": 8, "learning_rate": 3e-3, "weight_decay": 0.1, "seed": 0}


def cache_root() -> Path:
    """Where the demo keeps its text and its model."""
    named = os.environ.get("SPARSE_FT_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(named) if named else home / "sparse_ft") / "demo"


def demo_corpus() -> Path:
    """The directory with the demo's `train.txt`, `validation.txt` and `test.txt`, made on first use."""
    target = cache_root() / f"docstrings-{platform.python_implementation().lower()}-{platform.python_version()}"
    return target if (target / "train.txt").is_file() else write_corpus(target)


def demo_model(corpus: Path, **training: Any) -> Path:
    """The directory of the dense demo model for `corpus`, trained on first use.

    Args:
        corpus: What `demo_corpus` returned.
        training: Replaces values of `TRAINING`, for a quick look.
    """
    plan = {**TRAINING, **training}
    target = cache_root() / f"llama-{_digest(corpus, plan)[:16]}"
    if not (target / "config.json").is_file():
        with atomic_directory(target, overwrite=True) as directory:
            _train(corpus, directory, plan)
    return target


def _digest(corpus: Path, plan: dict[str, Any]) -> str:
    settings = {"vocabulary": VOCABULARY, "sizes": SIZES, "length": SEQUENCE_LENGTH, "training": plan}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    sha.update((corpus / "train.txt").read_bytes())
    return sha.hexdigest()


def _train(corpus: Path, directory: Path, plan: dict[str, Any]) -> None:
    """Train tokenizer and model and save both into `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from sparse_ft.cli.demo_training import train
    from sparse_ft.data import training_dataset
    from sparse_ft.models import load_tokenizer

    text = (corpus / "train.txt").read_text(encoding="utf-8")
    train_tokenizer(text, directory, vocabulary=VOCABULARY, length=SEQUENCE_LENGTH)
    dataset = training_dataset(str(corpus), load_tokenizer(directory), sequence_length=SEQUENCE_LENGTH)
    set_seed(plan["seed"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=SEQUENCE_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            **SIZES,
        )
    )
    train(
        model,
        dataset,
        "training the demo's model",
        steps=plan["steps"],
        bf16=bf16_is_faster(),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        per_device_train_batch_size=plan["batch_size"],
        learning_rate=plan["learning_rate"],
        weight_decay=plan["weight_decay"],
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        seed=plan["seed"],
    )
    model.to(torch.bfloat16).save_pretrained(directory)


def bf16_is_faster() -> bool:
    """Whether this machine multiplies matrices faster in bf16 than in fp32, measured in some ten milliseconds."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        start = time.perf_counter()
        for _ in range(3):
            a @ a
        seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < 0.7 * seconds[torch.float32]
