"""Compiled loops where nothing can be kept on disk."""

from __future__ import annotations

import subprocess
import sys

# What Numba finds where neither the package nor the user's cache can be written.
NOWHERE = """
import numba.core.caching as caching
(getattr(caching, "CacheImpl", None) or caching._CacheImpl)._locator_classes = []
"""
DRAW = """
from sparse_ft.deltas.random_mask import random_keep
print(random_keep(64, 0.5, seed=0, name="w").astype(int))
"""


DROP = """
import numpy as np
from sparse_ft.merging import kernels
values = np.arange(4, dtype=np.float32)
kernels.drop(values, np.array([1, 0, 1, 0], np.uint8))
print(values)
"""


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_place_for_them_loops_are_compiled_all_the_same() -> None:
    kind = "import sparse_ft.deltas.splitmix as loops; print(type(loops.keep_words._cache).__name__)"
    assert (printed(kind), printed(NOWHERE + kind)) == ("FunctionCache\n", "NullCache\n")
    assert printed(NOWHERE + DRAW) == printed(DRAW)
    assert printed(NOWHERE + DROP) == printed(DROP) == "[0. 0. 2. 0.]\n"
