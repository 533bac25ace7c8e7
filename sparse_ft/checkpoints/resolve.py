"""Find a checkpoint: a local directory or a Hub name becomes a directory that is safe to read.

A checkpoint may come from anyone, so names inside it are not trusted: every file it points to must lie inside the
directory. The only links followed out of it are those of the Hub cache, whose snapshots link to `../../blobs/<hash>`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sparse_ft.checkpoints.directories import recover_directory

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A repository may hold the same weights several times, in other formats or subfolders: these are the ones read here.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]
_HUB_SKIP = ["*/*", "consolidated*", "adapter_model*"]


def resolve_checkpoint(
    name_or_path: str | Path, *, allow_pickle: bool = False, revision: str | None = None, needs_weights: bool = True
) -> Path:
    """Turn a directory or Hub name into a checkpoint directory that holds a config and readable weights.

    Only what the file system tells is checked here; the weights themselves are checked by `CheckpointReader`.

    Args:
        name_or_path: local directory, or `owner/name` on the Hub (downloaded to the usual cache).
        allow_pickle: accept a checkpoint that has no safetensors but `pytorch_model.bin`. It is still opened with
            `weights_only=True`.
        revision: branch, tag or commit, for Hub names.
        needs_weights: False accepts a directory with config only.

    Raises:
        FileNotFoundError: if there is no such directory or repository, no config.json, or no weights.
        ValueError: if the path is a file, an adapter without its model, or pickle-only and `allow_pickle` is False.
    """
    path = Path(name_or_path)
    if not path.exists():
        recover_directory(path)
    if path.is_file():
        raise ValueError(f"'{path}' is a file; give the directory that holds it and its config.json.")
    if not path.is_dir():
        path = _download(name_or_path, allow_pickle=allow_pickle, revision=revision)
    if not (path / CONFIG_FILE).is_file():
        _refuse_without_config(path)
    if needs_weights:
        weights_file(path, allow_pickle=allow_pickle)
    return path


def download_adapter(name: str, *, revision: str | None = None) -> Path:
    """Take an adapter from the Hub.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit.

    Raises:
        FileNotFoundError: if it is no Hub name, or cannot be had.
    """
    return _download(name, allow_pickle=False, revision=revision, skip=["*/*"])


def weights_file(path: Path, *, allow_pickle: bool = False) -> Path:
    """The file that opens the weights of a directory: the single file if there is one, else the index.

    The order is that of transformers, so that both read the same tensors.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if there are only pickled ones and `allow_pickle` is False, or the file is a link out of `path`.
    """
    for name in (WEIGHTS_FILE, INDEX_FILE):
        if (path / name).exists():
            return member(path, name)
    for name in (PICKLE_FILE, PICKLE_INDEX_FILE):
        if (path / name).exists() and allow_pickle:
            return member(path, name)
        if (path / name).exists():
            raise ValueError(
                f"'{path}' holds only pickled weights ({name}), which can run code when opened; convert them to "
                f"safetensors, or pass --allow_pickle if you trust their source."
            )
    found = sorted(item.name for item in path.iterdir() if item.is_file())
    raise FileNotFoundError(
        f"No weights in '{path}': expected {WEIGHTS_FILE} or {INDEX_FILE}, found {_listing(found)}."
    )


def member(directory: Path, name: str) -> Path:
    """The path of file `name` of a checkpoint, after checking that it lies in the directory.

    Raises:
        ValueError: if the name or a link leads out of the directory.
        FileNotFoundError: if there is no such file.
    """
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    if not name or "\0" in name or absolute or ".." in parts:
        raise ValueError(
            f"'{directory}' names the file '{name}', which points outside the directory; "
            f"do not use this checkpoint unless you know why."
        )
    path = directory / name
    if not _lies_inside(path, directory):
        raise ValueError(
            f"'{path}' is a link to '{path.resolve()}', outside the checkpoint; replace it by a copy of the file."
        )
    if not path.exists():
        raise FileNotFoundError(f"'{directory}' lacks the file '{name}' that it names; download or copy it again.")
    if not path.is_file():
        raise ValueError(f"'{path}' is not a regular file; replace it by the weights themselves.")
    return path


def _lies_inside(path: Path, directory: Path) -> bool:
    target, home = path.resolve(), directory.resolve()
    if target.is_relative_to(home):
        return True
    in_hub_cache = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return in_hub_cache and target.parent == home.parent.parent / "blobs"


def _refuse_without_config(path: Path) -> None:
    if (path / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"'{path}' holds an adapter, not a model; merge it first, or give the directory of its base model."
        )
    raise FileNotFoundError(f"No {CONFIG_FILE} in '{path}'; give a directory written by save_pretrained.")


def _download(
    name_or_path: str | Path, *, allow_pickle: bool, revision: str | None, skip: list[str] = _HUB_SKIP
) -> Path:
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"No directory '{name}'; give a checkpoint directory or a Hub name like 'owner/model'.")
    from huggingface_hub import snapshot_download

    patterns = _HUB_FILES + (["*.bin"] if allow_pickle else [])
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=skip))
    except Exception as error:
        # The Hub client has two dozen exception types, from httpx to OSError; the user needs one sentence.
        raise FileNotFoundError(_why_not_downloaded(name, revision, error)) from error


def _why_not_downloaded(name: str, revision: str | None, error: Any) -> str:
    reason = {
        "RepositoryNotFoundError": "the Hub has no such model, or it is private",
        "GatedRepoError": "its owner asks you to accept conditions on its Hub page first",
        "RevisionNotFoundError": f"it has no revision '{revision}'",
        "HFValidationError": "that is no valid Hub name",
        "LocalEntryNotFoundError": "the Hub cannot be reached and the cache does not have it",
        "IncompleteSnapshotError": "the Hub cannot be reached and the cache has only a part of it",
        "OfflineModeIsEnabled": "offline mode is on and the cache does not have it",
    }.get(type(error).__name__, f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}")
    return f"No directory '{name}', and it could not be taken from the Hub as {reason}."


def _listing(names: list[str]) -> str:
    if not names:
        return "no file"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
