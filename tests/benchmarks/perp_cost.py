"""What each way back of quality_perp.py costs: CPU seconds per step and in all, and peak memory; a process per method.

    OMP_NUM_THREADS=1 python tests/benchmarks/perp_cost.py        # about a quarter of an hour on an idle machine

Each method runs in a process of its own after magnitude pruning to 80%, so that a peak is the method's and not what an
earlier one left behind. A step is timed as the difference between a run of 3 and one of 3 + 8 steps of 12 x 256 tokens,
so what happens once cancels; `cpu_seconds` is that times the 150 steps of the quality table. Reconstruction is run
whole, and its steps are those of its windows. `peak_mb` is the most memory the process had resident from then on,
libraries and model included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch
from bench_adapters import forget_preparation, peak_resident
from quality import Bench, Table, arguments
from quality_perp import FIRST, RANK, STEPS, WAYS, calibrated, prepared, pruned, untie
from quality_retraining import train

FEW, MORE = 3, 8


def cost(bench: Bench, label: str) -> dict[str, Any]:
    """The row of one method, measured in this process."""
    way = WAYS[label]
    model, masks = pruned(bench, FIRST)
    seconds, per_step, steps = 0.0, 0.0, 0
    forget_preparation()
    if way.reconstruction is not None:
        start = time.process_time()
        result = calibrated(bench, way, model, masks, way.learning_rates[0], 0)
        seconds = time.process_time() - start
        steps = sum(window.iterations for window in result.windows)
        per_step = seconds / steps
    if way.method is not None:
        if way.method == "head":
            untie(model)
        wrapped = prepared(model, way, masks)
        taken = []
        for count in (FEW, FEW + MORE):
            start = time.process_time()
            train(wrapped, bench.train, masks, way.method, count, 0, learning_rate=1e-4)
            taken.append(time.process_time() - start)
        per_step = (taken[1] - taken[0]) / MORE
        seconds += STEPS * per_step
    return {"seconds_per_step": round(per_step, 4), "cpu_seconds": round(seconds, 1), "peak_mb": round(peak_resident())}


def main() -> None:
    """Run every method in its own process, or the one that `--measure` names in this one."""
    parser = arguments("perp/cost", __doc__.splitlines()[0])
    parser.add_argument("--measure", help="print the row of this method as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(cost(Bench(args.model, args.dataset), args.measure)))
        return
    protocol = {"pruning": FIRST, "threads": torch.get_num_threads(), "r": RANK, "steps timed": MORE}
    table = Table(args.output, "tests/benchmarks/perp_cost.py", protocol=protocol, keys=("method",), force=args.force)

    def in_process(label: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--model", args.model, "--dataset", args.dataset, "--measure", label]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    for label in WAYS:
        if not args.only or label in args.only:
            table.row({"method": label}, lambda label=label: in_process(label))


if __name__ == "__main__":
    main()
