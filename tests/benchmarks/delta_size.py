"""Size of a delta file by method and density, beside what other encodings would take, as a share of the bf16 model.

    python tests/benchmarks/delta_size.py                     # writes docs/results/delta/size.json
    python tests/benchmarks/delta_size.py --size tiny --output /tmp/size.json      # a smoke run

The files are real: base and fine-tune of a Llama with random weights, every tensor a delta, embeddings and norms too.
`dare` (and `darex_q`, which differs in a number) and `structural` regenerate their masks, `magnitude` and `wanda` store
them in the smaller of bits and gaps; inputs of `wanda` have random norms. The columns beside are computed from the
number of kept entries: 16-bit values with a 32-bit index each, or with one bit per entry.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_delta import SIZES, write_models
from results import REPOSITORY, write_result

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.deltas.darex_moments import InputMoments
from sparse_ft.deltas.extract import Settings, extract_delta

METHODS = ("dare", "structural", "magnitude", "wanda")
DENSITIES = (0.1, 0.01, 0.001)


def random_moments(base: Path) -> dict[str, InputMoments]:
    """Inputs of every matrix, their features of different size."""
    reader = CheckpointReader(base)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in reader.names():
        if len(shape := reader.shape(name)) == 2:
            squares = torch.rand(shape[1], generator=generator, dtype=torch.float64)
            found[name] = InputMoments(1, squares, squares, float("nan"), 1)
    return found


def measure(size: str, directory: str | None) -> list[dict[str, Any]]:
    """One row per method and density, and one of the dense model."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        place = Path(scratch)
        write_models(size, place)
        dense = (place / "base" / "model.safetensors").stat().st_size
        rows.append({"method": "dense", "density": 1.0, "bytes": dense, "of_model": 1.0, "times_smaller": 1.0})
        moments = random_moments(place / "base")
        for method in METHODS:
            for density in DENSITIES:
                settings = Settings(method, density, moments=moments if method == "wanda" else None)
                target = place / "delta"
                delta = extract_delta(place / "base", place / "tuned0", target, settings, overwrite=True)
                pruned = {name: part for name, part in delta.header.tensors.items() if part.mask != "none"}
                kept, total = sum(map(delta.kept, pruned)), sum(part.numel for part in pruned.values())
                row = {
                    "method": method,
                    "density": density,
                    "bytes": delta.nbytes,
                    "of_model": round(delta.nbytes / dense, 6),
                    "times_smaller": round(dense / delta.nbytes, 1),
                    "kept": kept,
                    "with_int32_index_of_model": round(6 * kept / dense, 6),
                    "with_bitmask_of_model": round((2 * kept + total / 8) / dense, 6),
                }
                rows.append(row)
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="350m")
    parser.add_argument("--directory", help="where the models are written")
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "results" / "delta" / "size.json"))
    args = parser.parse_args()
    rows = measure(args.size, args.directory)
    protocol = f"bf16 Llama of size {args.size}, random weights, every tensor a delta; bytes of delta.safetensors"
    print(write_result(args.output, __file__, rows, protocol, [0]))


if __name__ == "__main__":
    main()
