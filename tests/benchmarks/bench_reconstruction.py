"""What reconstruction costs beside the pruning before it: Wanda, SparseGPT, and reconstruction in fp32 and bf16.

    python tests/benchmarks/bench_reconstruction.py              # writes docs/results/reconstruction/speed.json
    python tests/benchmarks/bench_reconstruction.py --quick --output /tmp/speed.json     # fewer blocks, one round

One process with one thread; the runs alternate, their order rotating from round to round. Reconstruction starts from
the model that SparseGPT pruned: windows `attn_mlp`, all kept weights, 100 steps of 2 sequences per window. `cpu_s` is
the median of the rounds' CPU seconds; `training_s` the part of it inside the training loop, and `evaluation_s` the
rest: targets, errors, and running the blocks for the next ones. A ratio is the median over rounds of the ratio in one
round. `error_left` is the sum of the windows' errors after over that before. Tokens are random.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import REPOSITORY, write_result
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from sparse_ft import prune
from sparse_ft.masks import MaskSet
from sparse_ft.reconstruction import blocks, reconstruct

SPARSITY = 0.6
BATCH = 8  # sequences per pass of the pruning methods


def load(args: argparse.Namespace) -> PreTrainedModel:
    """The model in fp32, or a random one of its size where it is absent; its first blocks only if so asked."""
    if Path(args.model).is_dir():
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
                num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
            )
        )  # fmt: skip
    if args.blocks is not None:
        model.model.layers = model.model.layers[: args.blocks]
        model.config.num_hidden_layers = args.blocks
    return model.eval()


class Bench:
    """The dense model, its calibration tokens, and the model that SparseGPT pruned."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dense = load(args)
        ids = torch.randint(0, self.dense.config.vocab_size, (args.samples, args.length))
        self.batches = list(ids.split(BATCH))
        self.pruned: tuple[PreTrainedModel, MaskSet] = self._prune("sparsegpt")

    def _prune(self, method: str) -> tuple[PreTrainedModel, MaskSet]:
        model = deepcopy(self.dense)
        return model, prune(model, method=method, sparsity=SPARSITY, calibration=self.batches, progress=False)

    def pruning(self, method: str) -> dict[str, float]:
        """CPU seconds of one pruning."""
        start = time.process_time()
        self._prune(method)
        return {"cpu_s": time.process_time() - start}

    def reconstruction(self, autocast: bool) -> dict[str, float]:
        """CPU seconds of one reconstruction, those in training, and the error that is left."""
        model, train, training = deepcopy(self.pruned[0]), blocks.train_window, 0.0

        def timed(*args: Any, **options: Any) -> int:
            nonlocal training
            start = time.process_time()
            steps = train(*args, **options)
            training += time.process_time() - start
            return steps

        with patch.object(blocks, "train_window", timed):
            start = time.process_time()
            rows = reconstruct(
                model, self.pruned[1], self.dense, calibration=self.batches, iterations=self.args.iterations,
                autocast=autocast, progress=False,
            ).windows  # fmt: skip
            seconds = time.process_time() - start
        left = sum(row.loss_after for row in rows) / sum(row.loss_before for row in rows)
        return {"cpu_s": seconds, "training_s": training, "evaluation_s": seconds - training, "error_left": left}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over the rounds."""
    bench = Bench(args)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        "wanda": lambda: bench.pruning("wanda"),
        "sparsegpt": lambda: bench.pruning("sparsegpt"),
        "reconstruction fp32": lambda: bench.reconstruction(False),
        "reconstruction bf16": lambda: bench.reconstruction(True),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        names = list(runs)
        turn = number % len(names)
        rounds.append({})
        for name in names[turn:] + names[:turn]:
            rounds[-1][name] = runs[name]()
            print(f"{name:20}", {key: round(value, 3) for key, value in rounds[-1][name].items()}, flush=True)
    rows = []
    for name in runs:
        row: dict[str, Any] = {"run": name}
        for key in rounds[0][name]:
            row[key] = round(statistics.median(one[name][key] for one in rounds), 3)
        for other in ("sparsegpt", "wanda"):
            ratios = [one[name]["cpu_s"] / one[other]["cpu_s"] for one in rounds]
            row[f"ratio_to_{other}"] = round(statistics.median(ratios), 2)
        rows.append(row)
    return rows


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = next((p / "shared" for p in REPOSITORY.parents if (p / "shared").is_dir()), REPOSITORY.parent / "shared")
    parser.add_argument("--model", default=str(shared / "models/llama-wt2"), help="directory of a Llama")
    parser.add_argument("--blocks", type=int, help="the first blocks only")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two blocks, one round")
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/reconstruction/speed.json"))
    args = parser.parse_args()
    if args.quick:
        args.blocks, args.rounds = args.blocks or 2, 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    rows = measure(args)
    for row in rows:
        print(row)
    model = "llama-wt2" if Path(args.model).is_dir() else "random weights"
    size = f"{args.blocks or 8} blocks, {args.samples} x {args.length} tokens, {args.iterations} steps per window"
    protocol = {"model": model, "size": size, "sparsity": SPARSITY, "rounds": args.rounds, "threads": 1}
    write_result(args.output, __file__, rows, protocol, seeds=[0])


if __name__ == "__main__":
    main()
