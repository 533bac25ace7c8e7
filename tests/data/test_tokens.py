"""Windows hold each token of the text once and in order; random ones depend on the seed alone."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from data.tokenizers_for_tests import SENTENCE, byte_level, with_added_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.data import load_text, random_windows, tokenize, windows


def test_the_whole_text_comes_back() -> None:
    tokenizer, text = byte_level(), SENTENCE * 40 + "ünïcode \n \n\n end"
    ids = tokenize(text, tokenizer)
    assert ids.dtype == torch.int64 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == tokenizer(text)["input_ids"]


def test_no_special_tokens_but_one_bos_on_request() -> None:
    added = with_added_tokens()
    assert not {1, 2} & set(tokenize(SENTENCE * 3, added).tolist())
    tokenizer = byte_level()
    plain, with_bos = tokenize([SENTENCE] * 3, tokenizer), tokenize([SENTENCE] * 3, tokenizer, add_bos=True)
    assert with_bos.tolist() == [tokenizer.bos_token_id, *plain.tolist()]
    assert tokenizer.bos_token_id not in plain
    with pytest.raises(ValueError, match="no BOS token"):
        tokenize(SENTENCE, added, add_bos=True)


def test_documents_are_joined_by_a_blank_line() -> None:
    tokenizer = byte_level()
    assert torch.equal(tokenize(["a b", "c", "d"], tokenizer), tokenize("a b\n\nc\n\nd", tokenizer))


def test_long_text_gives_no_warning(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            for piece in (None, 50):
                assert len(tokenize(SENTENCE * 40, byte_level(), piece_characters=piece)) > 16
    finally:
        transformers_logging.set_verbosity(before)
    assert not caplog.records and "longer than" not in capfd.readouterr().err


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(["a", " b", "  ", "\n", "\n\n", " \n ", "the", " = x =", ",", "ü", "\t", "\r\n"])),
    size=st.integers(1, 12),
)
def test_pieces_give_the_same_ids_as_the_whole(words: list[str], size: int) -> None:
    text = "".join(words)
    whole, pieces = (tokenize(text, byte_level(), piece_characters=piece) for piece in (None, size))
    assert whole.tolist() == pieces.tolist()


def test_empty_text_gives_no_tokens() -> None:
    for text in ("", []):
        for piece in (None, 10):
            ids = tokenize(text, byte_level(), piece_characters=piece)
            assert ids.shape == (0,) and ids.dtype == torch.int64


@given(total=st.integers(1, 60), length=st.integers(1, 20))
def test_windows_are_the_text_cut_up(total: int, length: int) -> None:
    ids = torch.arange(total) + 7
    if total < length:
        with pytest.raises(ValueError, match=rf"The text has {total} tokens, too few for one window of {length}"):
            windows(ids, length)
        return
    cut = windows(ids, length)
    assert cut.shape == (total // length, length)
    assert torch.equal(cut.flatten(), ids[: total // length * length])


@given(total=st.integers(5, 80), length=st.integers(1, 5), count=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_random_windows(total: int, length: int, count: int, seed: int) -> None:
    ids = torch.arange(total)
    drawn = random_windows(ids, count=count, length=length, seed=seed)
    assert drawn.shape == (count, length) and drawn.dtype == torch.int64
    starts = drawn[:, 0]
    assert torch.equal(drawn, starts[:, None] + torch.arange(length)), "each window is a stretch of the text"
    assert torch.equal(drawn, random_windows(ids, count=count, length=length, seed=seed))
    places = total - length + 1
    if count <= places:
        assert len(set(starts.tolist())) == count, "no window twice while there are enough"
        fewer = random_windows(ids, count=max(1, count // 2), length=length, seed=seed)
        assert torch.equal(fewer, drawn[: len(fewer)]), "more samples keep the first ones"
    if count == places:
        assert sorted(starts.tolist()) == list(range(places)), "the last window of the text can be drawn"


def test_random_windows_depend_on_their_seed_and_not_on_the_global_one() -> None:
    ids = torch.arange(1000)
    torch.manual_seed(0)
    first = random_windows(ids, count=20, length=4, seed=0)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert torch.equal(first, random_windows(ids, count=20, length=4, seed=0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, random_windows(ids, count=20, length=4, seed=1))


def test_random_starts_are_uniform() -> None:
    counts = torch.zeros(10)
    for seed in range(600):
        counts += torch.bincount(random_windows(torch.arange(12), count=2, length=3, seed=seed)[:, 0], minlength=10)
    # 1200 draws over 10 places: mean 120, standard deviation about 10.
    assert counts.min() > 70 and counts.max() < 170


def test_refusals() -> None:
    ids = torch.arange(10)
    with pytest.raises(ValueError, match="'notes' has 10 tokens, too few for one window of 11"):
        random_windows(ids, count=1, length=11, seed=0, source="'notes'")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        random_windows(ids, count=0, length=2, seed=0)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        windows(ids, 0)
    with pytest.raises(ValueError, match=r"shape \(tokens,\), got \(2, 5\)"):
        windows(ids.view(2, 5), 2)


@pytest.mark.realdata
def test_wikitext_counts(shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "llama-wt2")
    text = load_text(shared_dir / "data" / "wikitext-2", split="test")
    ids = tokenize(text, tokenizer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert torch.equal(ids, tokenize(text, tokenizer, piece_characters=20_000))
    assert len(windows(ids, 256)) == len(ids) // 256 == 1262
