"""One JSON file per experiment or benchmark: what ran, where, how, and the rows."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_ft.checkpoints import atomic_write, versions

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """CPU model, cores and GPU of this machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def commit() -> str:
    """The checked-out commit, with `+` when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", "sparse_ft"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def write_result(
    path: str | Path, script: str, rows: Sequence[dict[str, Any]], protocol: dict[str, Any], seeds: Sequence[int]
) -> Path:
    """Write the result file of a script; the old one stays until the new one is whole."""
    result = {
        "script": script,
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "protocol": protocol,
        "seeds": list(seeds),
        "rows": list(rows),
    }
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(result, indent=1) + "\n")
    return file
