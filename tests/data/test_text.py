"""Text is found where the user keeps it, under the names people use, and anything else gets one sentence."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from sparse_ft.data import load_text


def refused(kind: type[Exception], *arguments: object, **options: object) -> str:
    with pytest.raises(kind) as caught:
        load_text(*arguments, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def put(path: Path, content: str | bytes) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_one_string_exactly_as_it_is(tmp_path: Path, suffix: str) -> None:
    text = " \n = Títle = \n\r\n tab\there \n"
    assert load_text(put(tmp_path / f"any{suffix}", text)) == text
    assert load_text(str(tmp_path / f"any{suffix}"), split="test") == text


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_jsonl_file_is_a_list_of_rows(tmp_path: Path, suffix: str) -> None:
    rows = ["first\nline", "zwei \u2028 ü", ""]
    lines = "\n".join(json.dumps({"text": row, "body": row.upper()}, ensure_ascii=False) for row in rows)
    path = put(tmp_path / f"x{suffix}", lines + "\n\n")
    assert load_text(path) == rows
    assert load_text(path, text_field="body") == [row.upper() for row in rows]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("stored", ["validation", "valid", "dev", "val"])
@pytest.mark.parametrize("asked", ["validation", "valid", "dev", "val"])
def test_validation_is_found_under_its_usual_names(tmp_path: Path, stored: str, asked: str, suffix: str) -> None:
    for name in ("train", "test", stored):
        put(tmp_path / f"{name}{suffix}", name if "txt" in suffix else json.dumps({"text": name}))
    for split, name in (("train", "train"), ("test", "test"), (asked, stored)):
        assert load_text(tmp_path, split=split) in (name, [name])


def test_the_name_asked_for_comes_first(tmp_path: Path) -> None:
    put(tmp_path / "dev.txt", "dev")
    put(tmp_path / "valid.txt", "valid")
    put(tmp_path / "special.txt", "special")
    assert [load_text(tmp_path, split=name) for name in ("dev", "valid", "validation", "special")] == [
        "dev", "valid", "valid", "special",
    ]  # fmt: skip


def test_a_missing_or_ambiguous_split_names_the_files(tmp_path: Path) -> None:
    put(tmp_path / "train.txt", "x")
    put(tmp_path / "notes.md", "x")
    message = refused(FileNotFoundError, tmp_path, split="validation")
    assert "validation or valid or dev or val" in message and "found notes.md, train.txt" in message
    put(tmp_path / "train.jsonl.gz", '{"text": "x"}')
    message = refused(ValueError, tmp_path)
    assert "train.txt and train.jsonl.gz" in message
    (tmp_path / "empty").mkdir()
    assert "found no files" in refused(FileNotFoundError, tmp_path / "empty")


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    for name in ("x.txt", "x.txt.gz"):
        message = refused(ValueError, put(tmp_path / name, content))
        assert f"{name}'" in message and "empty" in message
    assert "empty" in refused(ValueError, put(tmp_path / "x.jsonl", json.dumps({"text": content})))


def test_binary_text_names_the_byte(tmp_path: Path) -> None:
    for content, place, value in (
        (b"ab\x00cd", 2, "0x00"),
        (b"caf\xe9 au lait", 3, "0xe9"),
        ("hi".encode("utf-16"), 3, "0x00"),
    ):
        for name in ("x.txt", "x.txt.gz", "x.jsonl"):
            message = refused(ValueError, put(tmp_path / name, content))
            assert name in message and f"byte {place} is {value}" in message and "UTF-8" in message


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_text(put(tmp_path / "x.txt", "\ufeffhello")) == "hello"


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text " * 1000)
    for content in (whole[:-12], b"not gzip at all", whole[:30] + b"\xff" * 10 + whole[40:]):
        (tmp_path / "x.txt.gz").write_bytes(content)
        assert "gzip" in refused(ValueError, tmp_path / "x.txt.gz")


def test_bad_jsonl_lines_are_numbered(tmp_path: Path) -> None:
    good = json.dumps({"text": "x"})
    for bad, reason in (
        ("{", "not JSON"),
        ("[1]", "holds a list"),
        ('{"body": "x"}', "has body"),
        ('{"text": 3}', "is a int"),
    ):
        message = refused(ValueError, put(tmp_path / "x.jsonl", f"{good}\n\n{bad}\n{good}"))
        assert "ine 3 of" in message and "x.jsonl" in message and reason in message


def test_unknown_places(tmp_path: Path) -> None:
    assert "No file or directory" in refused(FileNotFoundError, str(tmp_path / "nowhere"))
    assert "No file or directory" in refused(FileNotFoundError, "missing.jsonl")
    message = refused(FileNotFoundError, "no-such-owner/no-such-dataset", split="test")
    assert "'no-such-owner/no-such-dataset'" in message and "test" in message
    assert "must end in .txt" in refused(ValueError, put(tmp_path / "x.parquet", b"PAR1"))


def test_max_characters_stops_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = "".join(f"línea {i}\n" for i in range(100))
    for name in ("x.txt", "x.txt.gz"):
        part = load_text(put(tmp_path / name, text), max_characters=200)
        assert isinstance(part, str) and text.startswith(part) and part.endswith("\n") and 150 < len(part) <= 200
        assert load_text(tmp_path / name, max_characters=10**6) == text
    assert load_text(put(tmp_path / "long.txt", "é" * 1000), max_characters=101) == "é" * 51
    rows = [{"text": f"row {i}"} for i in range(100)]
    put(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    part = load_text(tmp_path / "x.jsonl", max_characters=200)
    assert part == [row["text"] for row in rows[: len(part)]] and 5 < len(part) < 20


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    rows = ["one", "", "two"]
    table = Dataset.from_dict({"text": rows, "number": [1, 2, 3]})
    table.save_to_disk(tmp_path / "one")
    DatasetDict(train=table, validation=table.select([2])).save_to_disk(tmp_path / "splits")
    assert load_text(tmp_path / "one") == rows
    assert load_text(tmp_path / "one", max_characters=3) == ["one"]
    assert load_text(tmp_path / "splits") == rows and load_text(tmp_path / "splits", split="dev") == ["two"]
    assert "has train, validation" in refused(FileNotFoundError, tmp_path / "splits", split="test")
    assert "it has text, number" in refused(ValueError, tmp_path / "one", text_field="body")
    assert "is a int" in refused(ValueError, tmp_path / "one", text_field="number")


@pytest.mark.realdata
def test_wikitext_directory(shared_dir: Path) -> None:
    directory = shared_dir / "data" / "wikitext-2"
    texts = {split: load_text(directory, split=split) for split in ("train", "validation", "test")}
    for split, file in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert texts[split] == gzip.decompress((directory / f"{file}.txt.gz").read_bytes()).decode()


def test_named_datasets_are_asked_for_in_their_own_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is out of reach here, so `datasets` is stood in for; what is checked is what we ask of it."""
    calls: list[tuple[str, str | None, str, bool]] = []
    can_stream = True

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        if streaming and not can_stream:
            raise ConnectionError("offline")
        table = Dataset.from_dict({"text": ["one", "two", "three"]})
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_text("wikitext", split="dev") == ["one", "two", "three"]
    assert load_text("owner/name", config="c", split="train[:10%]") == ["one", "two", "three"]
    assert load_text("owner/name", split="test", max_characters=5) == ["one", "two"]
    can_stream = False
    assert load_text("owner/name", split="test", max_characters=5) == ["one", "two"]
    assert calls == [
        ("wikitext", "wikitext-2-raw-v1", "validation", False),
        ("owner/name", "c", "train[:10%]", False),
        ("owner/name", None, "test", True),
        ("owner/name", None, "test", True),
        ("owner/name", None, "test", False),
    ]
