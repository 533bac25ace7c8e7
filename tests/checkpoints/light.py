"""The module under test without its package, whose import takes seconds: for programs that are started to be killed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_directories() -> ModuleType:
    """`sparse_ft.checkpoints.directories`, loaded from its file."""
    file = Path(__file__).resolve().parent.parent.parent / "sparse_ft" / "checkpoints" / "directories.py"
    spec = importlib.util.spec_from_file_location("directories", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["directories"] = module
    spec.loader.exec_module(module)
    assert "torch" not in sys.modules
    return module
