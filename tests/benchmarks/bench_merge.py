"""How fast and how small a streamed merge is, against reading all inputs and writing one, and against mergekit.

    python tests/benchmarks/bench_merge.py                              # 0.35 B, floor and ours
    python tests/benchmarks/bench_merge.py --sizes 0.1 0.35 1.1         # that memory does not grow
    python tests/benchmarks/bench_merge.py --with-peers PYTHON          # also mergekit, of that interpreter's venv

Base and three variants are random bf16 Llamas in files of 200 MB; a variant is the base plus noise, rounded to bf16 as
a fine-tune is. Every run is a process of its own; runners alternate, medians and ratios of one invocation are shown.
The floor reads every tensor of all models and writes one model, through safetensors. Ratios to it are of CPU seconds
after the imports; of mergekit the CPU seconds of the whole process are known, and compared with those of ours. Rows of
sizes that are not asked for stay in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from results import write_result

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from merge_runs import SETTINGS  # noqa: E402

from sparse_ft.checkpoints import CheckpointWriter  # noqa: E402

# size in B -> hidden, intermediate, blocks, vocabulary
SHAPES = {
    "0.02": (256, 704, 8, 32000),
    "0.1": (768, 2048, 9, 32000),
    "0.35": (1024, 2816, 22, 32000),
    "1.1": (2048, 5632, 19, 32000),
}
SHARD_BYTES = 200_000_000
DELTA = 5e-4


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama."""
    hidden, wide, blocks, vocabulary = SHAPES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for block in range(blocks):
        at = f"model.layers.{block}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}.mlp.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (hidden, wide)
        shapes |= {f"{at}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def build_models(directory: Path, size: str, variants: int) -> int:
    """Write base and variants; returns the number of parameters."""
    shapes = tensor_shapes(size)
    files: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        bytes_ = 2 * torch.Size(shape).numel()
        if used and used + bytes_ > SHARD_BYTES:
            files.append({})
            used = 0
        files[-1][name] = (torch.bfloat16, shape)
        used += bytes_
    plan = [(f"model-{i + 1:05d}-of-{len(files):05d}.safetensors", part) for i, part in enumerate(files)]
    hidden, wide, blocks, vocabulary = SHAPES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": blocks, "vocab_size": vocabulary,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    labels = ["base", *(f"variant{k}" for k in range(variants))]
    for label in labels:
        (directory / label).mkdir(parents=True)
        (directory / label / "config.json").write_text(json.dumps(config))
    writers = [CheckpointWriter(directory / label, plan) for label in labels]
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        base = torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
        writers[0].write(name, base)
        for writer in writers[1:]:
            noise = torch.randn(shape, generator=generator).mul_(DELTA)
            writer.write(name, noise.add_(base).bfloat16())
    for writer in writers:
        writer.close()
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def run(command: list[str]) -> dict[str, Any]:
    """One run in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_mergekit(python: str, directory: Path, method: str, variants: int) -> dict[str, Any]:
    """mergekit's own command on the same merge; CPU time and memory of the whole process."""
    used = 1 if method == "slerp" else variants
    models = [{"model": str(directory / f"variant{k}"), "parameters": SETTINGS[method]} for k in range(used)]
    config: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        config["base_model"] = str(directory / "base")
    if method == "slerp":
        config["models"] = [{"model": str(directory / "base")}, {"model": str(directory / "variant0")}]
        config["parameters"] = {"t": 0.5}
    file, output = directory / "peer.yaml", directory / "out_peer"
    file.write_text(json.dumps(config))
    command = [str(Path(python).with_name("mergekit-yaml")), str(file), str(output), "--no-copy-tokenizer"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(output)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.perf_counter() - wall, "process_cpu_s": cpu, "peak_mb": after.ru_maxrss * 1024 / 1e6}


def mergekit_version(python: str) -> str:
    """Of an interpreter's venv."""
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def measure(directory: Path, size: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runners on one size, alternating."""
    script = [sys.executable, str(HERE / "merge_runs.py")]
    common = [str(directory), "--variants", str(args.variants), "--threads", str(args.threads)]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.repeats):
        runs.setdefault(("copy", ""), []).append(run([*script, "copy", *common]))
        for method in args.methods:
            runs.setdefault(("sparse_ft", method), []).append(run([*script, "ours", *common, "--method", method]))
            if args.with_peers and size in args.peer_sizes:
                peer = run_mergekit(args.with_peers, directory, method, args.variants)
                runs.setdefault(("mergekit", method), []).append(peer)
    floor = statistics.median(row["cpu_s"] for row in runs["copy", ""])
    rows = []
    for (runner, method), results in runs.items():
        row: dict[str, Any] = {"size_b": float(size), "runner": runner, "method": method}
        row |= {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}
        if "cpu_s" in row:
            row["cpu_ratio"] = round(row["cpu_s"] / floor, 3)
        peer = runs.get(("mergekit", method))
        if runner == "sparse_ft" and peer:
            theirs = statistics.median(r["process_cpu_s"] for r in peer)
            row["faster_than_mergekit"] = round(theirs / row["process_cpu_s"], 2)
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    columns = {
        "cpu_s": "CPU s", "cpu_ratio": "of floor", "process_cpu_s": "whole CPU s", "faster_than_mergekit": "x mergekit",
        "wall_s": "wall s", "peak_mb": "peak MB", "beyond_imports_mb": "beyond imports MB",
    }  # fmt: skip
    print(f"{'B':>5} {'runner':<10} {'method':<16} " + " ".join(f"{title:>12}" for title in columns.values()))
    for row in rows:
        cells = " ".join(f"{row.get(column, ''):>12}" for column in columns)
        print(f"{row['size_b']:>5} {row['runner']:<10} {row['method']:<16} {cells}")


def main() -> None:
    """Build the models, measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["0.35"], choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["task_arithmetic", "dare_linear", "dare_ties", "ties"])
    parser.add_argument("--variants", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--with-peers", metavar="PYTHON", help="interpreter of a venv that has mergekit")
    parser.add_argument("--peer_sizes", nargs="+", default=["0.35"], help="sizes at which mergekit runs too")
    parser.add_argument("--directory", type=Path, help="where models are made and kept; temporary by default")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/merging/speed.json", help="JSON file")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            directory = (args.directory or Path(temporary)) / f"llama_{size}"
            if not (directory / "base").exists():
                build_models(directory, size, args.variants)
            rows += measure(directory, size, args)
            if args.directory is None:
                shutil.rmtree(directory)
    show(rows)
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    known = before.get("rows", [])
    rows += [row for row in known if row["size_b"] not in {float(size) for size in args.sizes}]
    rows.sort(key=lambda row: row["size_b"])
    protocol: dict[str, Any] = {
        "variants": args.variants,
        "repeats": args.repeats,
        "threads": args.threads,
        "delta": DELTA,
    }
    if args.with_peers:
        protocol["mergekit"] = mergekit_version(args.with_peers)
    elif known:
        protocol["mergekit"] = before["protocol"].get("mergekit")
    write_result(args.output, script=__file__, protocol=protocol, seeds=[0], rows=rows)


if __name__ == "__main__":
    main()
