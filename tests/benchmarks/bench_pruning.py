"""How fast one-shot pruning is against its floor and its peers, and that streaming memory does not grow with depth.

    python tests/benchmarks/bench_pruning.py                          # floors and ours
    python tests/benchmarks/bench_pruning.py --with-peers             # also llmcompressor, in a venv made for it
    python tests/benchmarks/bench_pruning.py --wanda_repo DIR         # also the published scripts' layer classes

Every run is a process of its own; runners alternate, medians and ratios in one invocation are reported. The floor is
two forward passes over the blocks without the head, plus the column sums (Wanda) or the products X^T X (SparseGPT) of
each distinct input.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from results import write_result
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PEER_PACKAGES = ["torch==2.13.0", "llmcompressor==0.14.0.1"]


def build_model(directory: Path, blocks: int, args: argparse.Namespace) -> Path:
    """Save a random Llama, calibration tokens, and the dense model's hidden states on held-out tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        max_position_embeddings=args.length,
    )
    path = directory / f"llama{blocks}"
    if not path.exists():
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(path, max_shard_size="100MB")
        held_out = torch.randint(0, 8192, (2, args.length))
        with torch.no_grad():
            hidden = model.model(input_ids=held_out).last_hidden_state
        calibration = torch.randint(0, 8192, (args.samples, args.length))
        tensors = {"calibration": calibration, "held_out": held_out, "hidden": hidden}
        save_file(tensors, directory / f"tokens{blocks}.safetensors")
    return path


def run(python: str, runner: str, model: Path, tokens: Path, *extra: str) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [python, str(HERE / "pruning_runs.py"), runner, "--model", str(model), "--tokens", str(tokens), *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{runner} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer_python(directory: Path) -> str:
    """The interpreter of the peers' virtual environment, made on first use."""
    python = directory / "bin/python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        for package in PEER_PACKAGES:
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return str(python)


def cases(args: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """(group, runner, extra arguments) in the order they alternate."""
    half, structured = ["--sparsity", "0.5"], ["--pattern", "2:4"]
    found = [("pass", "pass", []), ("magnitude 50%", "ours-magnitude", half)]
    for method, floor in (("wanda", "floor-wanda"), ("sparsegpt", "floor-sparsegpt")):
        for label, extra in (("50%", half), ("2:4", structured)):
            group = f"{method} {label}"
            found += [(group, floor, []), (group, f"ours-{method}", extra)]
            if args.with_peers:
                found.append((group, f"llmcompressor-{method}", extra))
            if args.wanda_repo:
                found.append((group, f"original-{method}", [*extra, "--wanda_repo", args.wanda_repo]))
    return found


def speed_rows(directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the repetitions, with ratios to the floor of the same group."""
    model = build_model(directory, args.blocks, args)
    tokens = directory / f"tokens{args.blocks}.safetensors"
    peers = peer_python(args.peer_venv) if args.with_peers else sys.executable
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        for group, runner, extra in cases(args):
            python = peers if runner.startswith("llmcompressor") else sys.executable
            figures = run(python, runner, model, tokens, "--dtype", args.dtype, *extra)
            runs.setdefault((group, runner), []).append(figures)
            print(f"{group:16} {runner:24} cpu {figures['cpu_s']:7.1f} s", flush=True)
    rows = []
    for (group, runner), results in runs.items():
        floors = next((r for (g, name), r in runs.items() if g == group and name.startswith("floor")), None)
        ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(results, floors or [], strict=False)]
        rows.append(
            {
                "case": group,
                "runner": runner,
                "cpu_s": round(statistics.median(r["cpu_s"] for r in results), 2),
                "wall_s": round(statistics.median(r["wall_s"] for r in results), 2),
                "cpu_ratio_to_floor": round(statistics.median(ratios), 3) if ratios else None,
                "relative_error": results[0].get("relative_error"),
            }
        )
    return rows


def memory_rows(directory: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of streaming against pruning in memory, for more and more blocks."""
    rows = []
    for blocks in (4, 12, 24):
        model = build_model(directory, blocks, args)
        tokens = directory / f"tokens{blocks}.safetensors"
        size = sum(f.stat().st_size for f in model.glob("*.safetensors")) / 2**20
        for runner in ("stream-sparsegpt", "stream-magnitude", "ours-sparsegpt"):
            figures = run(sys.executable, runner, model, tokens, "--pattern", "2:4", "--dtype", args.dtype)
            rows.append(
                {
                    "case": f"{blocks} blocks",
                    "runner": runner,
                    "model_mb": round(size),
                    "peak_mb": round(figures["peak_mb"]),
                    "cpu_s": round(figures["cpu_s"], 2),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--with-peers", action="store_true")
    parser.add_argument("--peer_venv", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--wanda_repo", help="checkout of the Wanda repository, whose layer classes are then timed too")
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/pruning_speed/llama.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = speed_rows(Path(directory), args)
        if not args.skip_memory:
            rows += memory_rows(Path(directory), args)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    protocol = {
        "model": f"random Llama, {args.blocks} blocks, hidden {args.hidden}, {args.dtype}",
        "calibration": f"{args.samples} x {args.length} tokens",
        "repeats": args.repeats,
        "ratios": "CPU seconds, paired within a repetition",
    }
    write_result(args.output, "tests/benchmarks/bench_pruning.py", rows, protocol, [0])


if __name__ == "__main__":
    main()
