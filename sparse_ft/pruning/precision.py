"""Matrix products in full fp32: no TF32 on GPUs, no bf16 shortcut in oneDNN.

A Hessian summed in TF32 has about 10 bits; its Cholesky factor is then wrong or does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute fp32 products in fp32 inside the `with` block and restore the process's settings afterwards."""
    modules: list[Any] = []
    if _has_precision_per_backend():
        modules = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul")]  # noqa: B009  (untyped in torch)
    saved = [module.fp32_precision for module in modules]
    legacy = None if modules else torch.get_float32_matmul_precision()
    try:
        for module in modules:
            module.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for module, precision in zip(modules, saved, strict=True):
            module.fp32_precision = precision
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


def _has_precision_per_backend() -> bool:
    # Newer torch sets precision per backend and refuses the process-wide getter once a backend was set on its own.
    return hasattr(torch.backends.cuda.matmul, "fp32_precision") and hasattr(torch.backends.mkldnn, "matmul")
