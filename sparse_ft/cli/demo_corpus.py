"""Text and tokenizer of the demo: the docstrings of Python's own standard library, so that it runs anywhere offline.

Modules are parsed, never imported. About 1.7 million characters of English and code; the exact text follows the Python
version, so perplexities of two versions differ a little. A module belongs to one split as a whole, by a hash of its
path, so no function is documented in both training and test text.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparse_ft.checkpoints import atomic_directory

__all__ = ["docstrings", "split_of", "train_tokenizer", "write_corpus"]

SPLITS = ("train", "validation", "test")
_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"})
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SPECIAL_TOKEN = "<|endoftext|>"


def docstrings(root: Path) -> Iterator[tuple[str, list[str]]]:
    """`(module path, its docstrings)` for every module under `root`, in path order, without repetitions."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.intersection(relative.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
        fresh = [text for text in dict.fromkeys(texts) if text and text not in seen]
        seen.update(fresh)
        if fresh:
            yield relative.as_posix(), fresh


def split_of(module: str) -> str:
    """`"train"`, `"validation"` or `"test"` for a module path: 29, 1 and 2 of 32 modules."""
    bucket = hashlib.sha256(module.encode()).digest()[0] % 32
    return "validation" if bucket == 0 else "test" if bucket <= 2 else "train"


def write_corpus(target: Path, root: Path | None = None) -> Path:
    """Write `train.txt`, `validation.txt` and `test.txt` into `target` (atomically) and return it.

    Args:
        target: Directory to make.
        root: Directory of Python sources; the standard library of the running interpreter when None.

    Raises:
        FileNotFoundError: The sources are not there, as in some embedded Pythons.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for module, found in docstrings(root):
        texts[split_of(module)].extend(found)
    empty = [split for split in SPLITS if not texts[split]]
    if empty:
        raise FileNotFoundError(
            f"No docstrings for the {empty[0]} text under {str(root)!r}: this Python has no library sources. "
            "Run the demo on your own text with --dataset."
        )
    with atomic_directory(target, overwrite=True) as directory:
        for split in SPLITS:
            (directory / f"{split}.txt").write_text("\n\n".join(texts[split]) + "\n", encoding="utf-8")
    return target


def train_tokenizer(text: str, target: Path, *, vocabulary: int, length: int) -> None:
    """Train a byte-level BPE tokenizer and write the two files `AutoTokenizer` reads into `target`.

    Args:
        text: Training text; at most this much is known to the tokenizer, nothing of the test split.
        target: An existing directory.
        vocabulary: Number of tokens, the end-of-text token included.
        length: `model_max_length` of the tokenizer, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_SPECIAL_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "eos_token": _SPECIAL_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
