"""The demo: a text that is parsed and never imported, a cache that is keyed by what matters, and a story that holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli.workspace import Result, tree
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from sparse_ft.checkpoints import check_weights, read_sidecars
from sparse_ft.cli import demo_model as demo_model_module
from sparse_ft.cli.demo import LABELS, LAST, PATTERNS
from sparse_ft.cli.demo_corpus import SPLITS, docstrings, split_of, train_tokenizer, write_corpus
from sparse_ft.cli.demo_model import bf16_is_faster, cache_root, demo_model
from sparse_ft.models import load_model

Command = Callable[..., Result]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The demo's own model in a size for tests, kept in a cache for tests."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(demo_model_module, "SIZES", sizes)
    monkeypatch.setattr(demo_model_module, "VOCABULARY", 300)
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Sources with docstrings, some that must not be read, and one that must not be run."""
    root = tmp_path / "library"
    for number in range(60):
        module = root / f"package{number % 7}" / f"module_{number}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        words = " ".join(f"word{(number * 7 + k) % 50}" for k in range(40))
        body = f'"""Module {number}. {words}"""\ndef f():\n    """Function of {number}: {words}"""\n'
        module.write_text(body + "class C:\n    def g(self):\n        pass\n")
    (root / "evil.py").write_text('"""Never run."""\nraise SystemExit("imported")\n')
    (root / "broken.py").write_text('"""Broken"""\ndef (:\n')
    (root / "binary.py").write_bytes(b"\x00\xff\xfe")
    for skipped in ("site-packages/other.py", "test/test_x.py"):
        (root / skipped).parent.mkdir(parents=True, exist_ok=True)
        (root / skipped).write_text('"""Not of the library."""\n')
    (root / "copy.py").write_text((root / "package0" / "module_0.py").read_text())
    return root


def test_docstrings_are_parsed_once_and_in_order(library: Path) -> None:
    found = dict(docstrings(library))
    assert list(found) == sorted(found)
    assert found["evil.py"] == ["Never run."]
    assert not {"broken.py", "binary.py", "site-packages/other.py", "test/test_x.py"} & set(found)
    texts = [text for module in found.values() for text in module]
    assert len(texts) == len(set(texts)) == 121
    assert "package0/module_0.py" not in found, "copy.py came first"


def test_splits_hold_different_modules(library: Path, tmp_path: Path) -> None:
    found = dict(docstrings(library))
    corpus = write_corpus(tmp_path / "corpus", library)
    contents = {split: (corpus / f"{split}.txt").read_text() for split in SPLITS}
    for module, texts in found.items():
        for split, content in contents.items():
            assert all((text in content) == (split == split_of(module)) for text in texts)
    again = write_corpus(tmp_path / "again", library)
    assert tree(corpus) == tree(again)


def test_the_standard_library_has_a_text() -> None:
    """Only a part of it, to be quick: enough to see that this Python has its sources."""
    import sysconfig

    found = dict(docstrings(Path(sysconfig.get_path("stdlib")) / "json"))
    assert "decoder.py" in found and any("JSON" in text for text in found["decoder.py"])


def test_a_python_without_sources_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--dataset"):
        write_corpus(tmp_path / "corpus", tmp_path / "empty")
    assert not (tmp_path / "corpus").exists()


def test_tokenizer_gives_back_any_text(tmp_path: Path) -> None:
    train_tokenizer("def add(a, b): return the sum\n\n" * 50, tmp_path, vocabulary=300, length=128)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("return the sum", "Ünïcode → 你好\n\ttabs", "  two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() <= 300


@pytest.mark.parametrize("variable", ["SPARSE_FT_CACHE", "XDG_CACHE_HOME"])
def test_the_cache_can_be_moved(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_FT_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_root() == tmp_path / ("demo" if variable == "SPARSE_FT_CACHE" else "sparse_ft/demo")


def test_the_model_is_trained_once_per_text_and_settings(
    library: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus", library)
    first = demo_model(corpus, steps=2, batch_size=2)
    before = tree(first)
    load_model(first)
    with monkeypatch.context() as patch:
        patch.setattr(demo_model_module, "_train", lambda *words: pytest.fail("trained again"))
        assert demo_model(corpus, steps=2, batch_size=2) == first
    assert tree(first) == before
    assert demo_model(corpus, steps=3, batch_size=2) != first
    (corpus / "train.txt").write_text((corpus / "train.txt").read_text() + "more\n")
    assert demo_model(corpus, steps=2, batch_size=2) != first
    assert len(list((tmp_path / "cache" / "demo").iterdir())) == 3


def test_an_interrupted_training_is_not_taken_for_a_model(
    library: Path, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus", library)

    def half(corpus: Path, directory: Path, plan: object) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model_module, "_train", half)
        with pytest.raises(KeyboardInterrupt):
            demo_model(corpus, steps=2, batch_size=2)
    load_model(demo_model(corpus, steps=2, batch_size=2))


def test_bf16_is_a_yes_or_no() -> None:
    assert bf16_is_faster() in (True, False)


def demo_words(dense: Path, text: Path, target: Path) -> list[object]:
    own = ["--model_name_or_path", dense, "--dataset", text, "--output_dir", target]
    return ["demo", *own, "--sequence_length", 16, "--samples", 8, "--retrain_steps", 6, "--r", 4, "--eval_windows", 8]


def test_the_story_on_a_model_of_one_s_own(dense: Path, text: Path, tmp_path: Path, command: Command) -> None:
    target = tmp_path / "demo"
    before = tree(dense)
    result = command(*demo_words(dense, text, target))
    assert result.code == 0, result.err
    assert tree(dense) == before
    rows = json.loads((target / "report.json").read_text())["comparison"]
    pruned = [row for row in rows if row["kind"] == "pruned"]
    assert [(row["group"], row["label"]) for row in pruned] == [(g, m) for g in PATTERNS for m in LABELS.values()]
    merged = [row for row in rows if row["kind"] == "merged"]
    assert [row["group"] for row in merged] == list(PATTERNS)
    assert all(row["revived"] == 0 for row in (*pruned, *merged))
    assert all(row["sparsity"] == pytest.approx(0.5) for row in merged if row["group"] == "2:4")
    (broken,) = [row for row in rows if row["kind"] == "broken"]
    assert broken["group"] == LAST and broken["sparsity"] == 0 and broken["revived"] > 1000
    for row in merged:
        start = next(other for other in pruned if other["group"] == row["group"] and other["label"] == row["start"])
        assert row["perplexity"] < start["perplexity"], "training lowers the perplexity"
    for folder in target.glob("recovered-*"):
        masks, record = read_sidecars(folder)
        check_weights(masks, record, load_model(folder))
        weights = load_file(folder / "model.safetensors")
        assert all(np.all(weights[name][~masks[name].numpy()] == 0) for name in masks)
    assert str(target / "report.html") in result.out and "won back" in result.out


def test_a_second_demo_replaces_the_first_but_nothing_else(
    dense: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    target = tmp_path / "demo"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    result = command(*demo_words(dense, text, target))
    assert result.code == 2 and "not empty" in result.complaint
    assert (target / "mine.txt").read_text() == "mine"
    (target / "mine.txt").rename(target / "demo.txt")
    assert command(*demo_words(dense, text, target), "--retrain_steps", 1).code == 0
    assert (target / "report.html").is_file() and not (target / "mine.txt").exists()


@pytest.mark.parametrize(
    ("options", "naming"),
    [
        (["--model_name_or_path", "no/such"], "no/such"),
        (["--dataset", "no/such.txt"], "no/such.txt"),
        (["--retrain_stepz", "3"], "--retrain_steps"),
        (["--retrain_steps", "few"], "--retrain_steps"),
    ],
)
def test_bad_input(options: list[str], naming: str, dense: Path, text: Path, tmp_path: Path, command: Command) -> None:
    result = command(*demo_words(dense, text, tmp_path / "demo"), *options)
    assert result.code == 2 and naming in result.complaint
    assert list(tmp_path.iterdir()) == []
