"""Text from wherever the user keeps it: a `datasets` name, a directory, or one file.

    load_text("wikitext", split="test")           # from the Hub, with the config the papers use
    load_text("data/wikitext-2", split="valid")   # data/wikitext-2/{train,valid,test}.txt[.gz] or .jsonl[.gz]
    load_text("notes.txt")                        # one file has no splits: it is all of them

A text file is one string, line breaks as they are. Rows of a `datasets` table or a jsonl file are a list of strings;
`tokenize` puts a blank line between them, as the pruning papers do for WikiText-2.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_SPLITS = (("train",), ("validation", "valid", "dev", "val"), ("test",))
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
# A `datasets` name with several configs, of which one is what every paper means.
_DEFAULT_CONFIGS = {"wikitext": "wikitext-2-raw-v1", "Salesforce/wikitext": "wikitext-2-raw-v1", "allenai/c4": "en"}


def load_text(
    dataset: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    text_field: str = "text",
    max_characters: int | None = None,
) -> str | list[str]:
    """Read text.

    Args:
        dataset: a directory, a `.txt` or `.jsonl` file (either may end in `.gz`), or the name of a `datasets` dataset.
        split: `"train"`, `"validation"` (also found under the names valid, dev and val) or `"test"`; any name a
            `datasets` table has, slices included. Ignored for a single file.
        config: config of a `datasets` dataset.
        text_field: column or key that holds the text.
        max_characters: stop after about so many characters, at the end of a line or row; nothing more is downloaded.

    Returns:
        The text of a `.txt` file, or the rows of a table.

    Raises:
        FileNotFoundError: if there is no such file, directory or dataset, or a directory lacks the split.
        ValueError: if the text is empty or binary, a row has no text, or a directory has two files for the split.
    """
    path = Path(dataset).expanduser()
    if path.is_dir() and not _is_saved_table(path):
        path = _file_of_split(path, split)
    if path.is_file():
        source = f"'{path}'"
        text = _read_file(path, text_field, max_characters)
    else:
        source = f"dataset '{dataset}' (split '{split}')"
        text = _read_table(str(dataset), split, config, text_field, max_characters)
    if not any(part.strip() for part in ([text] if isinstance(text, str) else text)):
        raise ValueError(f"There is no text in {source}: it is empty; give another dataset or split.")
    return text


def _is_saved_table(directory: Path) -> bool:
    """Whether `Dataset.save_to_disk` made it."""
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def split_names(split: str) -> tuple[str, ...]:
    """The names a split goes by, the given one first."""
    names = next((group for group in _SPLITS if split in group), (split,))
    return (split, *(name for name in names if name != split))


def _file_of_split(directory: Path, split: str) -> Path:
    for name in split_names(split):
        found = [directory / (name + suffix) for suffix in _SUFFIXES if (directory / (name + suffix)).is_file()]
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise ValueError(f"'{directory}' has {names} for split '{split}'; give the path of the one you mean.")
        if found:
            return found[0]
    present = sorted(item.name for item in directory.iterdir())
    shown = ", ".join(present[:8]) + (f" and {len(present) - 8} more" if len(present) > 8 else "")
    raise FileNotFoundError(
        f"No text for split '{split}' in '{directory}': expected {' or '.join(split_names(split))} ending in "
        f"{', '.join(_SUFFIXES)}, found {shown or 'no files'}."
    )


def _read_file(path: Path, text_field: str, max_characters: int | None) -> str | list[str]:
    if not path.name.endswith(_SUFFIXES):
        raise ValueError(f"'{path}' is neither text nor jsonl by its name; it must end in {', '.join(_SUFFIXES)}.")
    text = _decode(path, _read_bytes(path, max_characters))
    if path.name.removesuffix(".gz").endswith(".txt"):
        return text
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [_jsonl_text(path, number, line, text_field) for number, line in lines]


def _read_bytes(path: Path, max_characters: int | None) -> bytes:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read() if max_characters is None else file.read(max_characters + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"'{path}' is no gzip file, or a truncated one ({error}); copy it again.") from None
    if max_characters is None or len(content) <= max_characters:
        return content
    # Without a line break in reach, cut at least between two UTF-8 characters.
    line_end = content.rfind(b"\n") + 1
    return content[:line_end] or content.decode("utf-8", errors="ignore").encode()


def _decode(path: Path, content: bytes) -> str:
    position = content.find(b"\0")
    if position < 0:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            position = error.start
    raise ValueError(
        f"'{path}' is not UTF-8 text: byte {position} is 0x{content[position]:02x}; "
        f"it is binary or in another encoding, so give a text file or convert it (iconv -t utf-8)."
    )


def _jsonl_text(path: Path, number: int, line: str, text_field: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Line {number} of '{path}' is not JSON ({error}); each line must be one object.") from None
    if not isinstance(row, dict):
        raise ValueError(f"Line {number} of '{path}' holds a {type(row).__name__}; each line must be one object.")
    return row_text(row, text_field, f"line {number} of '{path}'")


def row_text(row: Mapping[str, Any], text_field: str, source: str) -> str:
    """The text of one row of a table.

    Raises:
        ValueError: if the row lacks the field, or it is no string.
    """
    if text_field not in row:
        fields = ", ".join(map(str, row))
        raise ValueError(f"There is no field '{text_field}' in {source}, it has {fields}; pass its name as text_field.")
    if not isinstance(row[text_field], str):
        kind = type(row[text_field]).__name__
        raise ValueError(f"Field '{text_field}' of {source} is a {kind}, not a string; name another text_field.")
    return row[text_field]


def _read_table(dataset: str, split: str, config: str | None, text_field: str, max_characters: int | None) -> list[str]:
    path = Path(dataset).expanduser()
    if not path.is_dir() and (dataset.endswith(_SUFFIXES) or dataset[:1] in (".", "/", "~")):
        raise FileNotFoundError(f"No file or directory '{dataset}'; check --dataset.")
    rows = _open_saved(path, split) if path.is_dir() else _open_named(dataset, split, config, max_characters)
    return list(_texts(rows, text_field, f"dataset '{dataset}'", max_characters))


def _open_saved(path: Path, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        table = datasets.load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"Cannot open the dataset saved in '{path}': {_first_line(error)}") from error
    if not isinstance(table, datasets.DatasetDict):
        return table
    name = next((name for name in split_names(split) if name in table), None)
    if name is None:
        raise FileNotFoundError(f"The dataset in '{path}' has no split '{split}', it has {', '.join(table)}.")
    return table[name]


def _open_named(
    dataset: str, split: str, config: str | None, max_characters: int | None
) -> Iterable[Mapping[str, Any]]:
    # Streaming fetches only what is read, but cannot use a dataset that an earlier run downloaded when offline.
    if max_characters is not None:
        try:
            return _load_dataset(dataset, split, config, streaming=True)
        except Exception as error:
            logger.info("Dataset '%s' cannot be streamed (%s), so it is loaded whole.", dataset, _first_line(error))
    try:
        return _load_dataset(dataset, split, config, streaming=False)
    except Exception as error:
        # Its errors come from datasets, huggingface_hub, fsspec and pyarrow; the user needs one sentence.
        raise FileNotFoundError(
            f"'{dataset}' is no file or directory, and `datasets` cannot load it (config {config}, split {split}): "
            f"{_first_line(error)}"
        ) from error


def _load_dataset(dataset: str, split: str, config: str | None, *, streaming: bool) -> Iterable[Mapping[str, Any]]:
    import datasets

    name = config or _DEFAULT_CONFIGS.get(dataset)
    split = "validation" if split in _SPLITS[1] else split
    return datasets.load_dataset(dataset, name, split=split, streaming=streaming)


def _texts(
    rows: Iterable[Mapping[str, Any]], text_field: str, source: str, max_characters: int | None
) -> Iterator[str]:
    seen = 0
    for number, row in enumerate(rows, 1):
        text = row_text(row, text_field, f"row {number} of {source}")
        yield text
        seen += len(text)
        if max_characters is not None and seen >= max_characters:
            return


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
