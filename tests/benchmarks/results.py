"""Write one benchmark's or experiment's numbers as JSON: what was run, on what, with which versions, and the rows.

    from results import write_result
    write_result("docs/results/adapters/step.json", script=__file__, rows=rows, protocol="...", seeds=[0])

Tables and plots in the documentation are generated from these files.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("sparse-ft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "numpy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of these packages, and Python's; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU model, the cores this process may use, and the GPU's name or None."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = None
    if "torch" in sys.modules:
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model or platform.processor() or platform.machine(), "cores": cores, "gpu": gpu}


def commit() -> str | None:
    """The commit of this checkout, with `-dirty` when tracked files differ from it; None outside git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command() -> str:
    """The command line of this process, relative to the checkout."""
    arguments = [os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]]
    return shlex.join(["python", *arguments])


def write_result(
    path: str | Path,
    script: str,
    rows: Sequence[Mapping[str, Any]],
    protocol: str | Mapping[str, Any],
    seeds: Sequence[int],
) -> Path:
    """Write {script, command, commit, versions, machine, protocol, seeds, rows}; the old file stays until the end.

    Args:
        path: the JSON file; missing directories are made.
        script: `__file__` of the caller.
        rows: one mapping per row, columns named with their units.
        protocol: how it was measured, in words or as settings.
        seeds: every seed used; empty if nothing was random.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "script": os.path.relpath(script, REPOSITORY),
        "command": command(),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "protocol": protocol,
        "seeds": list(seeds),
        "rows": [dict(row) for row in rows],
    }
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(target)
    return target


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a result file, or none if it is not there: for scripts that skip what they already have."""
    target = Path(path)
    return json.loads(target.read_text(encoding="utf-8"))["rows"] if target.is_file() else []
