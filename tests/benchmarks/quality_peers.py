"""Our Wanda and SparseGPT against the peers' own code: same model, same calibration tokens, same evaluation.

    python tests/benchmarks/quality_peers.py --with-peers --wanda_repo DIR

Peers prune in processes of their own (pruning_runs.py) and save their model; this script evaluates all of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_pruning import peer_python, run
from quality import PROTOCOL, ROOT, Bench, Table, arguments
from safetensors.torch import save_file

from sparse_ft.models import load_model

PATTERNS = (("1:4", None), ("unstructured", 0.7), ("2:4", None), ("unstructured", 0.5))


def measure(
    bench: Bench, python: str, runner: str, pattern: str, sparsity: float | None, extra: list[str]
) -> dict[str, Any]:
    """Prune in a process of its own, evaluate what it saved."""
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.safetensors"
        save_file({"calibration": torch.cat(bench.calibration(0))}, tokens)
        shape = ["--pattern", pattern] if sparsity is None else ["--sparsity", str(sparsity)]
        saved = str(Path(directory) / "model")
        run(python, runner, Path(bench.model), tokens, *shape, *extra, "--save", saved)
        return {"perplexity": round(bench.perplexity(load_model(saved, dtype=torch.float32)), 3)}


def main() -> None:
    """Run all cells."""
    parser = arguments("one_shot/peers", __doc__.splitlines()[0])
    parser.add_argument("--with-peers", action="store_true")
    parser.add_argument("--peer_venv", type=Path, default=ROOT / ".venv-peers")
    parser.add_argument("--wanda_repo", help="checkout of the Wanda repository")
    args = parser.parse_args()
    bench = Bench(args.model, args.dataset)
    runners = [("ours", sys.executable, [])]
    if args.with_peers:
        runners.append(("llmcompressor", peer_python(args.peer_venv), []))
    if args.wanda_repo:
        runners.append(("original", sys.executable, ["--wanda_repo", args.wanda_repo]))
    keys = ("method", "tool", "pattern", "sparsity")
    table = Table(args.output, "tests/benchmarks/quality_peers.py", protocol=PROTOCOL, keys=keys, force=args.force)
    for pattern, sparsity in PATTERNS:
        for method in ("wanda", "sparsegpt"):
            for tool, python, extra in runners:
                key = {"method": method, "tool": tool, "pattern": pattern, "sparsity": sparsity, "seed": 0}
                cell = (bench, python, f"{tool}-{method}", pattern, sparsity, extra)
                table.row(key, lambda c=cell: measure(*c))


if __name__ == "__main__":
    main()
