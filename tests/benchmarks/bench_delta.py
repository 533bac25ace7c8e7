"""Time to apply, subtract and swap a delta on a resident model, against copying the model's bytes and loading a model.

    python tests/benchmarks/bench_delta.py                       # writes docs/results/delta/apply.json
    python tests/benchmarks/bench_delta.py --size tiny --output /tmp/apply.json    # a smoke run

A Llama in bf16 and two fine-tunes of it, weights drawn at random, are written to a temporary directory, and their
deltas extracted. `copy` copies all of the model's weights into other tensors that are there already; `load` reads a
fine-tune's safetensors, in the page cache, into the resident weights. `first apply` draws the masks, then they are
held. Everything of one density is done in turn. `seconds` is the least over the rounds, which is what the work costs
where other programs take their share of the memory's bandwidth, and `median_seconds` is beside it. `over_copy` compares
least times, `median_over_copy` is the median over rounds of the ratio to the copy of the same round, and
`of_copy_bandwidth` is the inverse of `over_copy`: the model's bytes per second as a share of those a copy reaches.
`held_mb` is what the delta holds while it is applied: values, positions and the weights set aside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import REPOSITORY, write_result
from safetensors.torch import save_file
from torch import nn

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.resident import Delta, swap

SIZES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024),
    "50m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192),
    "350m": dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16, vocab_size=32000
    ),
}
TASKS = ("copy", "load", "first apply", "subtract", "apply", "swap")


def write_models(size: str, place: Path) -> nn.Module:
    """`base`, `tuned0` and `tuned1` below a directory, written a tensor at a time; the base model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size])).to(torch.bfloat16).eval()
    model.save_pretrained(place / "base")
    reader = CheckpointReader(place / "base")
    for number in range(2):
        target = place / f"tuned{number}"
        target.mkdir()
        (target / "config.json").write_bytes((place / "base" / "config.json").read_bytes())
        tuned = {n: (t.float() + torch.randn(t.shape) * 1e-3).to(t.dtype) for n, t in reader.items()}
        save_file(tuned, target / "model.safetensors", metadata={"format": "pt"})
    return model


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def one_round(model: nn.Module, place: Path, other: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of every task; the model holds the base before and after."""
    weights = dict(model.named_parameters())
    first, second = Delta.load(place / "delta0"), Delta.load(place / "delta1")
    second.prepare()

    def copy() -> None:
        for name, weight in weights.items():
            other[name].copy_(weight)

    def load(directory: str) -> None:
        reader = CheckpointReader(place / directory)
        for name in reader.names():
            weights[name].copy_(reader.get(name))

    found = {"copy": seconds(copy), "load": seconds(lambda: load("tuned0"))}
    load("base")
    found["first apply"] = seconds(lambda: first.apply(model))
    found["subtract"] = seconds(lambda: first.subtract(model))
    found["apply"] = seconds(lambda: first.apply(model))
    found["swap"] = seconds(lambda: swap(model, first, second))
    second.subtract(model)
    assert all(torch.equal(weights[name], base) for name, base in other.items()), "the base did not come back"
    return found


def held_bytes(model: nn.Module, place: Path) -> int:
    """What one delta holds while it is applied."""
    delta = Delta.load(place / "delta0")
    delta.apply(model)
    held = delta.nbytes
    delta.subtract(model)
    return held


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per density and task."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        place = Path(scratch)
        model = write_models(args.size, place)
        other = {name: torch.empty_like(weight) for name, weight in model.named_parameters()}
        total = sum(weight.nbytes for weight in other.values())
        for density in args.densities:
            for number in range(2):
                settings = Settings(density=density, seed=number)
                extract_delta(
                    place / "base", place / f"tuned{number}", place / f"delta{number}", settings, overwrite=True
                )
            one_round(model, place, other)
            rounds = [one_round(model, place, other) for _ in range(args.rounds)]
            held = held_bytes(model, place)
            least = {task: min(found[task] for found in rounds) for task in TASKS}
            for task in TASKS:
                ratio = statistics.median(found[task] / found["copy"] for found in rounds)
                rows.append(
                    {
                        "size": args.size,
                        "density": density,
                        "task": task,
                        "model_mb": round(total / 1e6, 1),
                        "seconds": round(least[task], 5),
                        "median_seconds": round(statistics.median(found[task] for found in rounds), 5),
                        "over_copy": round(least[task] / least["copy"], 3),
                        "median_over_copy": round(ratio, 3),
                        "of_copy_bandwidth": round(least["copy"] / least[task], 3),
                        "held_mb": round(held / 1e6, 1) if task in ("apply", "swap") else None,
                    }
                )
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="350m")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.01, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", help="where the models are written")
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "results" / "delta" / "apply.json"))
    args = parser.parse_args()
    rows = measure(args)
    protocol = (
        f"bf16 Llama of size {args.size}, {torch.get_num_threads()} threads; {args.rounds} rounds after one to "
        f"warm up; files in the page cache; load average {os.getloadavg()[0]:.1f} at the end"
    )
    print(write_result(args.output, __file__, rows, protocol, [0, 1]))


if __name__ == "__main__":
    main()
