"""What is lost when a bf16 fine-tune's delta is stored in bf16, on normal weights and normal changes.

    python tests/benchmarks/delta_dtype.py                    # writes docs/results/delta/stored_dtype.json
    python tests/benchmarks/delta_dtype.py --entries 10000 --output /tmp/dtype.json      # a smoke run

Base and fine-tune are rounded to bf16, as checkpoints are; the difference in fp32 is exact. `unchanged` are the entries
where it is zero, `inexact` those whose bf16 is another number, `rms_error` the root mean square of the error as a share
of that of the difference, `largest_error` the largest error as a share of its own difference, and `weights_differ` the
weights that base + stored delta, rounded, would not give back.
"""

from __future__ import annotations

import argparse
import math

import torch
from results import REPOSITORY, write_result

from sparse_ft.deltas.entries import add_kept


def row(mean: float, deviation: float, entries: int) -> dict[str, float]:
    """One line: weights of this standard deviation, changed by normal numbers of this mean size."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(entries, generator=generator) * deviation).bfloat16()
    change = torch.randn(entries, generator=generator) * mean * math.sqrt(math.pi / 2)
    tuned = (base.float() + change).bfloat16()
    delta = tuned.float() - base.float()
    stored = delta.bfloat16()
    error = (stored.float() - delta).double()
    changed = delta != 0
    return {
        "mean_abs_delta": mean,
        "unchanged": round(1 - float(changed.double().mean()), 4),
        "inexact": round(float((error != 0).double().mean()), 4),
        "rms_error": round(float(error.pow(2).mean().sqrt() / delta.double().pow(2).mean().sqrt()), 6),
        "largest_error": round(float((error[changed] / delta[changed]).abs().max()), 6),
        "weights_differ": round(float((add_kept(base, stored, 1.0, torch.bfloat16) != tuned).double().mean()), 4),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--means", type=float, nargs="+", default=[1e-4, 4e-4, 1e-3, 1e-2])
    parser.add_argument("--deviation", type=float, default=0.02, help="standard deviation of the weights")
    parser.add_argument("--entries", type=int, default=1 << 23)
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "results" / "delta" / "stored_dtype.json"))
    args = parser.parse_args()
    rows = [row(mean, args.deviation, args.entries) for mean in args.means]
    for line in rows:
        print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    protocol = f"{args.entries} weights of standard deviation {args.deviation:g} and mean 0, rounded to bf16"
    print(write_result(args.output, __file__, rows, protocol, [0]))


if __name__ == "__main__":
    main()
