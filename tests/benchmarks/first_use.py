"""What the compiled loops cost when they are first used, and when they are there: CPU seconds by what needs them.

    python tests/benchmarks/first_use.py                            # writes docs/results/merging/first_use.json
    python tests/benchmarks/first_use.py --output /tmp/first.json   # somewhere else

Each task runs on a few thousand weights in processes of its own: the first finds an empty cache and compiles, the
second finds the loops on disk. Imports are not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import REPOSITORY, write_result

_TENSORS = "import time, torch\nbase = torch.zeros(5000).bfloat16()\ntuned = torch.randn(5000).bfloat16()\n"
#: What is timed stands behind the line.
TASKS = {
    "random masks": ("from sparse_ft.deltas import random_keep", 'random_keep(5000, 0.5, seed=0, name="w")'),
    "a delta on a loaded bf16 model": (
        "from sparse_ft.deltas.entries import add_entries, put_entries\nindex = torch.arange(9, dtype=torch.int32)",
        "put_entries(base, index, add_entries(base, index, tuned[:9], 0.5))",
    ),
    "a merge (ties)": (
        "from sparse_ft.merging.ties import ties",
        "ties(base, [tuned, tuned], [1, 1], [0.2, 0.2])",
    ),
}


def cpu_seconds(setup: str, call: str, cache: Path) -> float:
    """Of a call in a process of its own that keeps compiled loops in `cache`."""
    code = f"{_TENSORS}{setup}\nstart = time.process_time()\n{call}\nprint(time.process_time() - start)"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/results/merging/first_use.json")
    rows = []
    for task, (setup, call) in TASKS.items():
        with tempfile.TemporaryDirectory() as cache:
            first, second = (cpu_seconds(setup, call, Path(cache)) for _ in range(2))
            size = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
        rows.append(
            {
                "task": task,
                "first use, CPU s": round(first, 1),
                "later, CPU s": round(second, 2),
                "kept on disk, kB": size // 1000,
            }
        )
        print(rows[-1])
    protocol = "one run each, loops compiled into an empty NUMBA_CACHE_DIR, then loaded from it"
    write_result(parser.parse_args().output, __file__, rows, protocol, [])


if __name__ == "__main__":
    main()
