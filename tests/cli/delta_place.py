"""Where the tests of `delta` begin: a base, a fine-tune, a text and a delta."""

from __future__ import annotations

from pathlib import Path

import torch
from cli.workspace import save_tokenizer, sentences
from deltas.pairs import save_models

from sparse_ft.deltas.extract import Settings, extract_delta


def write_place(place: Path) -> Path:
    """`base`, `tuned`, `text` and a delta of density 0.1 below a directory, which is returned."""
    save_models(place, "llama", torch.float32)
    (place / "tuned0").rename(place / "tuned")
    for name in ("base", "tuned"):
        save_tokenizer(place / name)
    (place / "text").mkdir()
    (place / "text" / "train.txt").write_text(sentences(300, 1))
    extract_delta(place / "base", place / "tuned", place / "delta", Settings(density=0.1), progress=False)
    return place
