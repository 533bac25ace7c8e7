"""Shared fixtures: offline hub, few threads, the optional folder of real data, and no GPU tests without a GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read by huggingface_hub, datasets, transformers and matplotlib when they are imported, hence before anything else.
_CACHE = tempfile.mkdtemp(prefix="sparse_ft_tests_")
os.environ["HF_HOME"] = _CACHE
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """One thread, here and in the processes that tests start: sharing out tiny tensors costs more than it saves."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the throw-away Hugging Face cache."""
    shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `gpu` tests on a machine without CUDA."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _find_shared() -> Path | None:
    named = os.environ.get("SPARSE_FT_SHARED_DIR")
    places = [Path(named)] if named else [parent / "shared" for parent in (REPOSITORY, *REPOSITORY.parents)]
    return next((place for place in places if (place / "data").is_dir() and (place / "models").is_dir()), None)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with `data/wikitext-2` and `models/llama-wt2`; tests that ask for it are skipped where it is absent.

    `SPARSE_FT_SHARED_DIR` names it; otherwise it is looked for as `shared/` beside the checkout and its parents.
    """
    found = _find_shared()
    if found is None:
        pytest.skip("the folder of real data is not here: set SPARSE_FT_SHARED_DIR to one with data/ and models/")
    return found


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user cache (`XDG_CACHE_HOME`), so that a test neither reads nor leaves files in the real one."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    yield cache
