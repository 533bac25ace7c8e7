"""One-shot perplexity of every pruning method at every pattern, on a small Llama and WikiText-2.

    python tests/benchmarks/quality_one_shot.py            # about 40 minutes on two cores; resumes where it stopped

Methods that draw random numbers or calibration windows run with three seeds.
"""

from __future__ import annotations

import time
from typing import Any

from quality import PROTOCOL, Bench, Table, arguments

from sparse_ft import prune

UNSTRUCTURED = (0.5, 0.6, 0.7, 0.8, 0.9)
N_OF_M = ("2:4", "1:4", "4:8")
SEEDS = (0, 1, 2)

# label -> (arguments of prune, needs calibration, seeds, works for n:m)
METHODS: dict[str, tuple[dict[str, Any], bool, tuple[int, ...], bool]] = {
    "magnitude": ({"method": "magnitude"}, False, (0,), True),
    "magnitude, global": ({"method": "magnitude", "allocation": "global"}, False, (0,), False),
    "random": ({"method": "random"}, False, SEEDS, True),
    "random, ERK": ({"method": "random", "allocation": "erk"}, False, SEEDS, False),
    "wanda": ({"method": "wanda"}, True, SEEDS, True),
    "sparsegpt": ({"method": "sparsegpt"}, True, SEEDS, True),
    "sparsegpt, mask only": ({"method": "sparsegpt", "update_weights": False}, True, SEEDS, True),
}


def measure(
    bench: Bench, options: dict[str, Any], pattern: dict[str, Any], calibrated: bool, seed: int
) -> dict[str, Any]:
    """Prune a fresh model and evaluate it."""
    model = bench.load()
    calibration = bench.calibration(seed) if calibrated else None
    start = time.process_time()
    masks = prune(model, **options, **pattern, calibration=calibration, seed=seed, progress=False)
    seconds = time.process_time() - start
    masks.verify(model)
    return {
        "perplexity": round(bench.perplexity(model), 3),
        "measured_sparsity": round(masks.sparsity(), 6),
        "prune_cpu_seconds": round(seconds, 2),
    }


def main() -> None:
    """Run all cells."""
    args = arguments("one_shot/llama_wt2", __doc__.splitlines()[0]).parse_args()
    bench = Bench(args.model, args.dataset)
    keys = ("method", "pattern", "sparsity", "seed")
    table = Table(args.output, "tests/benchmarks/quality_one_shot.py", protocol=PROTOCOL, keys=keys, force=args.force)
    dense = {"method": "dense", "pattern": "dense", "sparsity": 0.0, "seed": 0}
    table.row(dense, lambda: {"perplexity": round(bench.perplexity(bench.load()), 3), "measured_sparsity": 0.0})
    patterns = [{"pattern": "unstructured", "sparsity": s} for s in UNSTRUCTURED] + [{"pattern": p} for p in N_OF_M]
    for seed in SEEDS:
        for label, (options, calibrated, seeds, structured) in METHODS.items():
            if seed not in seeds or (args.only and label not in args.only):
                continue
            for pattern in patterns:
                if structured or pattern["pattern"] == "unstructured":
                    key = {"method": label, "sparsity": None, **pattern, "seed": seed}
                    table.row(key, lambda o=options, p=pattern, c=calibrated, s=seed: measure(bench, o, p, c, s))


if __name__ == "__main__":
    main()
