"""One timed merge, or a floor to compare it with, in a process of its own: prints one JSON line.

    python merge_runs.py copy DIR --variants 3
    python merge_runs.py ours DIR --method dare_linear --threads 1

`DIR` holds `base` and `variant0` ..., as `bench_merge.py` makes them. `cpu_s` is counted after the imports, to which
the loading of compiled loops belongs: a merge of one small tensor precedes ours. `process_cpu_s` has all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS: dict[str, dict[str, float]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.3},
    "dare_ties": {"weight": 0.5, "density": 0.3},
    "ties": {"weight": 0.5, "density": 0.3},
    "breadcrumbs": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.15},
    "slerp": {},
}


def resident() -> float:
    """MB of memory in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak() -> float:
    """MB, the most memory in use so far; getrusage would count what the parent used before exec."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def copy(directory: Path, output: Path, variants: int) -> None:
    """Read all models and write one, through safetensors."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    output.mkdir()
    for file in sorted((directory / "base").glob("*.safetensors")):
        kept = {}
        for model in ["base", *(f"variant{k}" for k in range(variants))]:
            with safe_open(directory / model / file.name, framework="pt") as handle:
                for name in handle.keys():
                    tensor = handle.get_tensor(name).clone()
                    if model == "base":
                        kept[name] = tensor
        save_file(kept, output / file.name, metadata={"format": "pt"})


def make_plan(directory: Path, method: str, variants: int) -> Any:
    """The plan of a merge of all variants, written in the base's files."""
    from sparse_ft.checkpoints import CheckpointReader
    from sparse_ft.merging import MergeInput, MergePlan, Source, TensorPlan

    reader = CheckpointReader(directory / "base")
    used = 1 if method == "slerp" else variants
    labels = ["base", *(f"variant{k}" for k in range(used))]
    parameters = SETTINGS[method]
    tensors = [
        TensorPlan(
            name, reader.shape(name), reader.dtype(name), None if method == "linear" else Source(0, name),
            tuple(Source(k + 1, name, parameters) for k in range(used)), {"t": 0.5} if method == "slerp" else {},
        )
        for name in reader.names()
    ]  # fmt: skip
    models = tuple(MergeInput(label, directory / label) for label in labels)
    return MergePlan(method, models, tuple(tensors), tuple((f, tuple(n)) for f, n in reader.shards))


def load_loops(method: str) -> None:
    """Merge one small tensor."""
    import torch
    from safetensors.torch import save_file

    from sparse_ft.merging.engine import execute

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for label in ("base", "variant0", "variant1"):
            (place / label).mkdir()
            save_file({"weight": torch.randn(8, 8).bfloat16()}, place / label / "model.safetensors")
        execute(make_plan(place, method, 2), place / "out", threads=1, progress=False)


def main() -> None:
    """Run one and print what it took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("runner", choices=["copy", "ours"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--method", default="dare_linear", choices=list(SETTINGS))
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    output = args.directory / f"out_{os.getpid()}"
    if args.runner == "ours":
        sys.path.insert(0, str(HERE.parents[1]))
        from sparse_ft.merging.engine import execute

        load_loops(args.method)
        plan = make_plan(args.directory, args.method, args.variants)
    else:
        import safetensors.torch  # noqa: F401
    before, wall, cpu = resident(), time.perf_counter(), time.process_time()
    if args.runner == "ours":
        execute(plan, output, threads=args.threads, progress=False)
    else:
        copy(args.directory, output, args.variants)
    row = {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "process_cpu_s": time.process_time(),
        "peak_mb": peak(),
        "beyond_imports_mb": max(peak() - before, 0.0),
    }
    shutil.rmtree(output)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
