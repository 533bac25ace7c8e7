"""Calibration batches and training blocks: unpadded stretches of the text, or the user's own batches untouched."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from data.tokenizers_for_tests import SENTENCE, byte_level
from tiny_models import TINY
from transformers import Trainer, TrainingArguments

from sparse_ft.data import calibration_batches, random_windows, tokenize, tokens_digest, training_dataset, windows


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = "".join(f"{i} {SENTENCE}" for i in range(120))
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text(f"{name} {text}")
    return tmp_path


def test_calibration_windows_come_from_the_text(corpus: Path) -> None:
    tokenizer = byte_level()
    batches = calibration_batches(corpus, tokenizer, samples=11, sequence_length=8, batch_size=4, seed=3)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 8), (4, 8), (3, 8)]
    assert all(
        batch["attention_mask"].dtype == torch.int64 and bool(batch["attention_mask"].all()) for batch in batches
    )
    ids = tokenize((corpus / "train.txt").read_text(), tokenizer)
    expected = random_windows(ids, count=11, length=8, seed=3)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), expected)


def test_batching_and_length_defaults(corpus: Path) -> None:
    one = calibration_batches(str(corpus), byte_level(), samples=6, batch_size=100)
    assert len(one) == 1 and one[0]["input_ids"].shape == (6, 16), "16 is the tokenizer's model length"
    many = calibration_batches(str(corpus), byte_level(), samples=6, batch_size=1)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in many]), one[0]["input_ids"])
    other = calibration_batches(corpus, byte_level(), samples=6, split="validation")
    assert not torch.equal(other[0]["input_ids"], one[0]["input_ids"])
    unlimited = byte_level(int(1e30))
    assert len(tokenize((corpus / "train.txt").read_text(), unlimited)) > 2048
    assert calibration_batches(corpus, unlimited, samples=1)[0]["input_ids"].shape == (1, 2048)


def test_only_the_beginning_of_a_large_corpus_is_read(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_ft.data.calibration.MAX_CHARACTERS", 400)
    text = (corpus / "train.txt").read_text()
    batches = calibration_batches(corpus, byte_level(), samples=20, sequence_length=8)
    beginning = tokenize(text[: text.rfind("\n", 0, 400) + 1], byte_level())
    expected = random_windows(beginning, count=20, length=8, seed=0)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), expected)


def test_own_batches_are_used_as_they_are() -> None:
    ids, padded = torch.arange(6).view(2, 3), torch.tensor([[1, 1, 0], [1, 1, 1]])
    given = [ids, {"input_ids": ids, "attention_mask": padded, "decoder_input_ids": ids + 1}]
    first, second = calibration_batches(given)
    assert first["input_ids"] is ids and bool((first["attention_mask"] == 1).all())
    assert second["attention_mask"] is padded and torch.equal(second["decoder_input_ids"], ids + 1)
    source = {"input_ids": ids}
    assert len(calibration_batches(iter([source]))) == 1 and set(source) == {"input_ids"}, (
        "the user's dict is not changed"
    )


@pytest.mark.parametrize(
    ("batches", "reason"),
    [
        ([], "is empty"),
        (torch.zeros(2, 3, dtype=torch.int64), "must be a list, got one Tensor"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.int64)}, "must be a list, got one dict"),
        ([torch.zeros(2, 3)], r"shape \(2, 3\) and torch.float32"),
        ([torch.ones(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)], r"batch 2 has.*shape \(3,\)"),
        ([torch.zeros(0, 3, dtype=torch.int64)], r"shape \(0, 3\)"),
        ([{"ids": torch.zeros(2, 3)}], "has no tensor input_ids"),
        (["some text"], r"has no tensor input_ids \(got str\)"),
        ([{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}], r"attention_mask of \(2, 4\)"),
    ],
)
def test_wrong_batches_are_refused(batches: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        calibration_batches(batches)
    assert "\n" not in str(caught.value)


def test_too_short_text_names_file_tokens_and_fix(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two")
    tokens = len(tokenize("one two", byte_level()))
    for call, kind in ((calibration_batches, "calibration"), (training_dataset, "training")):
        with pytest.raises(
            ValueError, match=rf"{kind} text '.*short\.txt' has {tokens} tokens, too few.* of 50"
        ) as caught:
            call(tmp_path / "short.txt", byte_level(), sequence_length=50)
        assert "--sequence_length" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_batches(tmp_path / "short.txt")
    for options, reason in ((dict(samples=0), "got 0"), (dict(batch_size=0), "got 0")):
        with pytest.raises(ValueError, match=reason):
            calibration_batches(tmp_path / "short.txt", byte_level(), sequence_length=1, **options)


def test_more_samples_than_sequences_are_refused(corpus: Path) -> None:
    count = len(tokenize((corpus / "train.txt").read_text(), byte_level())) - 8 + 1
    assert sum(len(b["input_ids"]) for b in calibration_batches(corpus, byte_level(), samples=count, sequence_length=8))
    with pytest.raises(
        ValueError, match=f"has {count} different sequences of 8 tokens but {count + 1} samples"
    ) as caught:
        calibration_batches(corpus, byte_level(), samples=count + 1, sequence_length=8)
    assert "lower samples or sequence_length" in str(caught.value) and "--" not in str(caught.value)


def test_training_blocks_are_the_text_without_padding(corpus: Path) -> None:
    tokenizer = byte_level()
    dataset = training_dataset(corpus, tokenizer, sequence_length=8)
    blocks = torch.stack([row["input_ids"] for row in dataset])
    ids = tokenize((corpus / "train.txt").read_text(), tokenizer)
    assert blocks.dtype == torch.int64 and torch.equal(blocks, windows(ids, 8))
    assert all(torch.equal(row["labels"], row["input_ids"]) for row in dataset)
    assert set(dataset.column_names) == {"input_ids", "labels"}
    assert len(training_dataset(corpus, tokenizer)[0]["input_ids"]) == 16


def test_trainer_takes_the_dataset(corpus: Path) -> None:
    dataset = training_dataset(corpus, byte_level(), sequence_length=8)
    model = TINY["llama"]()
    model.resize_token_embeddings(320)
    arguments = TrainingArguments(
        output_dir=str(corpus / "out"), max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    result = Trainer(model=model, args=arguments, train_dataset=dataset).train()
    assert result.global_step == 2 and 0 < result.training_loss < 20


def test_the_digest_is_of_every_token_in_order(corpus: Path, tmp_path: Path) -> None:
    """Computed a second time from the blocks; another word, or the same blocks in another order, changes it."""
    text = (corpus / "train.txt").read_text()
    packed = training_dataset(corpus, byte_level(), sequence_length=8)
    expected = hashlib.sha256(torch.stack([row["input_ids"] for row in packed]).numpy().tobytes()).hexdigest()
    assert tokens_digest(packed) == expected
    (tmp_path / "other.txt").write_text(text.replace("117 ", "711 "))
    assert tokens_digest(training_dataset(tmp_path / "other.txt", byte_level(), sequence_length=8)) != expected
    assert tokens_digest(packed.select(range(len(packed) - 1, -1, -1))) != expected
    (tmp_path / "same.txt").write_text(text)
    assert tokens_digest(training_dataset(tmp_path / "same.txt", byte_level(), sequence_length=8)) == expected
