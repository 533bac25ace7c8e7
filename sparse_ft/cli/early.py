"""What a command line can be refused for before torch is imported, which takes many seconds: a text that is not there.

Only the standard library is used. What cannot be told cheaply passes; the verb itself finds it out later.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["check_texts"]

_TEXTS = ("dataset", "eval_dataset")
_FILES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")  # as `data.text` reads them
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_texts(words: Sequence[str]) -> None:
    """Refuse `--dataset` and `--eval_dataset` that name no file, no directory and nothing that can be loaded.

    Args:
        words: of the command line, behind the verb. Recipes are not looked into.

    Raises:
        FileNotFoundError: if the name is a path where nothing is, or a name on the Hub, which cannot be reached while
            no dataset of such a name is in the cache.

    Example:
        >>> check_texts(["--dataset", "no/such/text.txt"])
        Traceback (most recent call last):
        FileNotFoundError: No file or directory 'no/such/text.txt'; check --dataset.
    """
    for option in _TEXTS:
        for name in _values_of(option, words):
            if not name or Path(name).expanduser().exists():
                continue
            if name[0] in "./~" or name.count("/") > 1 or "\\" in name or name.endswith(_FILES):
                raise FileNotFoundError(f"No file or directory '{name}'; check --{option}.")
            if _plain(name) not in _cached() and _is_hub_out_of_reach():
                raise FileNotFoundError(
                    f"'{name}' is no file or directory, and as a dataset it is not in the cache while the Hub is out "
                    f"of reach; check --{option}."
                )


def _values_of(option: str, words: Sequence[str]) -> Iterator[str]:
    """What is given for an option, in both spellings, by a word of its own or behind an equals sign."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if (
            name.startswith("--")
            and name[2:].replace("-", "_") == option
            and (equals or not following.startswith("--"))
        ):
            yield value if equals else following


def _plain(name: str) -> str:
    """The last part of a name, by which caches of different layouts can be compared."""
    return re.sub(r"[^a-z0-9]", "", re.split(r"/|___|--", name)[-1].lower())


def _cached() -> set[str]:
    """Datasets that were downloaded before, by `_plain` name."""
    environment = os.environ
    general = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(environment.get("HF_HOME") or general)
    tables = Path(environment.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    hub = Path(environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or home / "hub").expanduser()
    found = [*(tables.iterdir() if tables.is_dir() else ()), *hub.glob("datasets--*")]
    return {_plain(path.name) for path in found}


def _is_hub_out_of_reach() -> bool:
    """Whether it was switched off, or its name has no address here."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        return True
    from urllib.request import getproxies

    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname, 443)
    except OSError:
        return True
    return False
