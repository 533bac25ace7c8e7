"""The small files that make a weights directory a usable model: config, tokenizer, chat template, licence."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from pathlib import Path

from sparse_ft.checkpoints.resolve import member

_WANTED = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
# They describe other weights, another training run or another result than the ones in the new directory.
_UNWANTED = (
    "*.index.json", "sparse_ft.json", "merge.json", "adapter_config.json", "trainer_state.json", "*_results.json",
    "report*.json", "requirements*.txt",
)  # fmt: skip


def copy_side_files(source: str | Path, target: str | Path) -> list[str]:
    """Copy config, generation config, tokenizer, chat templates, model code and licence from one model directory to
    another, existing directory. Weights, their index, sidecars and training state stay behind.

    A file the target already has is left as it is.

    Args:
        source: model directory.
        target: existing directory.

    Returns:
        Names of the files copied, sorted.

    Raises:
        ValueError: if one of the files is a link out of `source`.
    """
    source, target = Path(source), Path(target)
    names = [path.relative_to(source).as_posix() for path in (*source.glob("*"), *source.glob("*/*.jinja"))]
    chosen = [name for name in sorted(names) if is_side_file(name) and (source / name).is_file()]
    files = {name: member(source, name) for name in chosen if not (target / name).exists()}
    for name, file in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
    return list(files)


def is_side_file(name: str) -> bool:
    """Whether a file of a model directory is one that `copy_side_files` copies, judged by its name (with `/`)."""
    wanted = any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _WANTED)
    return wanted and not any(fnmatchcase(name, pattern) for pattern in _UNWANTED)
