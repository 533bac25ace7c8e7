"""`sparse_masks.safetensors`: packed masks with a header that says what they are.

Every tensor is uint8, one bit per weight (see `packing`). The safetensors metadata has one entry, `sparse_ft_masks`, a
JSON object with the format version, the digest, and pattern, shape and input axis of each tensor. One entry, because
safetensors does not promise an order of several, and equal masks must give equal bytes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MASKS_FILE = "sparse_masks.safetensors"
FORMAT_VERSION = 1
_KEY = "sparse_ft_masks"


@dataclass(frozen=True)
class Layout:
    """What the metadata says of each tensor, and the digest of all."""

    patterns: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    input_dims: dict[str, int]
    digest: str


def write(path: str | Path, packed: Mapping[str, Tensor], layout: Layout) -> Path:
    """Write beside the target and rename; returns the file written."""
    file = Path(path)
    if file.suffix != ".safetensors":
        file.mkdir(parents=True, exist_ok=True)
        file = file / MASKS_FILE
    tensors = {
        name: {"pattern": layout.patterns[name], "shape": layout.shapes[name], "input_dim": layout.input_dims[name]}
        for name in sorted(packed)
    }
    header = json.dumps({"format_version": FORMAT_VERSION, "digest": layout.digest, "tensors": tensors})
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        save_file(dict(packed), temporary, metadata={_KEY: header})
        os.chmod(temporary, 0o644)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return file


def find(path: str | Path) -> Path:
    """The mask file of a directory, a file, or a Hub repository.

    Raises:
        FileNotFoundError: if there is none.
    """
    local = Path(path)
    if local.is_dir():
        local = local / MASKS_FILE
    if local.is_file():
        return local
    if local.suffix == ".safetensors" or (local.parent.is_dir() and len(local.parts) != 2):
        raise FileNotFoundError(f"No masks at '{local}'; save them with MaskSet.save, or prune with `sparse-ft prune`.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(str(path), MASKS_FILE))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"No masks at '{path}': neither a local {MASKS_FILE} nor a Hub repository with one."
        ) from error


def read(path: str | Path) -> tuple[Path, dict[str, Tensor], Layout]:
    """Read packed masks and their layout.

    Raises:
        FileNotFoundError: if there is no mask file.
        ValueError: if it is damaged, of a newer format, or its header does not list its tensors.
    """
    file = find(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            packed = {name: opened.get_tensor(name) for name in opened.keys()}
        header = json.loads(metadata[_KEY])
        version, tensors = header["format_version"], header["tensors"]
        layout = Layout(
            {n: t["pattern"] for n, t in tensors.items()},
            {n: tuple(t["shape"]) for n, t in tensors.items()},
            {n: int(t["input_dim"]) for n, t in tensors.items()},
            header["digest"],
        )
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is no mask file, or is damaged ({error}); restore it or prune again.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"'{file}' has format {version}, this version reads {FORMAT_VERSION}; upgrade sparse-ft.")
    if set(packed) != set(layout.shapes):
        odd = sorted(set(packed) ^ set(layout.shapes))[0]
        raise ValueError(f"'{file}' is damaged: '{odd}' is in its header or its tensors but not in both.")
    return file, packed, layout


def push(save: Callable[[str], Path], repo_id: str, *, token: str | None, commit_message: str) -> str:
    """Upload what `save` writes as the repository's mask file; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        file = save(directory)
        commit = api.upload_file(
            path_or_fileobj=file, path_in_repo=MASKS_FILE, repo_id=repo_id, commit_message=commit_message
        )
    return str(commit.commit_url)
