"""Every way back after pruning, each at its own learning rate: full, PERP's adapters and groups, reconstruction.

    python tests/benchmarks/quality_perp.py                # about two hours on two cores; resumes where it stopped
    python tests/benchmarks/quality_perp.py --only full mask_lora     # a share of it; two shares may run side by side

A cell prunes a fresh copy of the model, trains 150 steps of 12 x 256 tokens with AdamW (no weight decay, 10% warm-up,
linear decay, bf16 autocast) or reconstructs from 128 sequences, merges, verifies the zeros and evaluates the merged
model. The head is untied from the input embedding where it alone is trained. Every method runs at the learning rates of
its grid after magnitude pruning to 80%; the one with the best perplexity on the VALIDATION split is `chosen`, and it is
used for the other seeds and prunings. `gap_closed` is the share of the log-perplexity between pruned and dense that was
won back on the test split. What a method costs is measured by perp_cost.py, each in a process of its own.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from quality import PROTOCOL, SEQUENCE_LENGTH, Bench, Table, arguments
from quality_retraining import BATCH, measured_sparsity, train
from transformers import PreTrainedModel

from sparse_ft import prune, reconstruct
from sparse_ft.adapters.perp import merge_perp, prepare_perp, trainable_share
from sparse_ft.masks import MaskSet
from sparse_ft.reconstruction import ReconstructionResult

STEPS, RANK = 150, 16
PRUNINGS: dict[str, dict[str, Any]] = {
    "magnitude 80%": {"method": "magnitude", "sparsity": 0.8},
    "magnitude 1:4": {"method": "magnitude", "pattern": "1:4"},
    "SparseGPT 80%": {"method": "sparsegpt", "sparsity": 0.8},
}
FIRST = "magnitude 80%"


@dataclass(frozen=True)
class Way:
    """A way back.

    Attributes:
        learning_rates: the grid.
        method: what `prepare_perp` takes, or "full"; None trains nothing after the reconstruction.
        options: for `prepare_perp`.
        reconstruction: options of `reconstruct` when that comes first; its learning rate is the grid's unless given.
        everywhere: whether it runs after the other prunings too.
        seeds: number of seeds after the first pruning.
    """

    learning_rates: tuple[float, ...]
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    reconstruction: dict[str, Any] | None = None
    everywhere: bool = False
    seeds: int = 1


WAYS: dict[str, Way] = {
    "full": Way((2.5e-4, 5e-4, 1e-3), "full", everywhere=True, seeds=3),
    "mask_lora": Way((2e-3, 4e-3, 8e-3, 1.6e-2), "mask_lora", everywhere=True, seeds=3),
    "mask_lora+norms": Way((4e-3, 8e-3, 1.6e-2), "mask_lora+norms", everywhere=True),
    "biases+norms": Way((1e-2, 3e-2, 6e-2, 0.12), "biases+norms"),
    "scale_lora": Way((1e-3, 3e-3, 1e-2, 2e-2), "scale_lora"),
    "scale_lora, symmetry broken": Way((1e-3, 3e-3, 1e-2, 2e-2, 4e-2), "scale_lora", {"break_symmetry": True}),
    "lora_prune": Way((5e-4, 2e-3, 4e-3), "lora_prune"),
    "head": Way((5e-4, 2e-3, 4e-3), "head"),
    "reconstruct, linear": Way((1e-3, 3e-3, 6e-3, 1.2e-2), reconstruction={"granularity": "linear"}),
    "reconstruct, attn_mlp": Way(
        (3e-4, 1e-3, 3e-3, 6e-3, 1.2e-2), reconstruction={"granularity": "attn_mlp"}, everywhere=True
    ),
    "reconstruct, block": Way((1e-3, 3e-3, 6e-3, 1.2e-2), reconstruction={"granularity": "block"}),
    "reconstruct, attn_mlp, 4 epochs": Way((1e-3, 3e-3, 6e-3, 1.2e-2), reconstruction={"iterations": 256}),
    "reconstruct, then mask_lora": Way(
        (1e-3, 2e-3, 4e-3), "mask_lora", reconstruction={"iterations": 256, "learning_rate": 6e-3}
    ),
}


def pruned(bench: Bench, pruning: str) -> tuple[PreTrainedModel, MaskSet]:
    """A fresh copy of the model, pruned."""
    model, options = bench.load(), PRUNINGS[pruning]
    calibration = None if options["method"] == "magnitude" else bench.calibration(0)
    return model, prune(model, **options, calibration=calibration, progress=False)


def calibrated(
    bench: Bench, way: Way, model: PreTrainedModel, masks: MaskSet, rate: float, seed: int
) -> ReconstructionResult:
    """Reconstruct the model in place from 128 sequences."""
    options = {"learning_rate": rate, "autocast": True, **(way.reconstruction or {})}
    calibration = bench.calibration(seed)
    return reconstruct(model, masks, bench.load(), calibration=calibration, seed=seed, progress=False, **options)


def prepared(model: PreTrainedModel, way: Way, masks: MaskSet) -> Any:
    """The model with what the way trains: its adapter, its groups, or all of it."""
    if way.method == "full":
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*biases.*")  # Llama has none; the row says what was trained
        return prepare_perp(model, str(way.method), masks, r=RANK, **way.options)


def measure(bench: Bench, way: Way, pruning: str, rate: float, seed: int, dense: float, base: float) -> dict[str, Any]:
    """Prune, win back, merge, evaluate."""
    model, masks = pruned(bench, pruning)
    if way.method == "head":
        untie(model)
    torch.manual_seed(seed)
    share = 1.0
    if way.reconstruction is not None:
        calibrated(bench, way, model, masks, rate, seed)
        share = sum(kept for kept, _ in masks.counts().values()) / model.num_parameters()
    if way.method is not None:
        wrapped = prepared(model, way, masks)
        if way.method != "full":
            share = trainable_share(wrapped).share
        train(wrapped, bench.train, masks, way.method, STEPS, seed, learning_rate=rate)
        model = wrapped if way.method == "full" else merge_perp(wrapped)
    masks.verify(model)
    after = bench.perplexity(model.eval())
    return {
        "learning_rate": rate,
        "trainable_share": round(share, 6),
        "pruned_perplexity": round(base, 3),
        "validation_perplexity": round(bench.perplexity(model, "validation"), 3),
        "perplexity": round(after, 3),
        "gap_closed": round(math.log(base / after) / math.log(base / dense), 4),
        "merged_sparsity": round(measured_sparsity(model, masks), 6),
    }


def untie(model: PreTrainedModel) -> None:
    """Give the head a matrix of its own: a head adapter cannot be merged into one that is also the input embedding."""
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def chosen_rate(table: Table, label: str, way: Way) -> float | None:
    """The grid's learning rate with the best validation perplexity; None while one is missing."""
    rows = [table.find(_key(label, FIRST, rate, 0)) for rate in way.learning_rates]
    if None in rows:
        return None
    best = min((row for row in rows if row is not None), key=lambda row: row["validation_perplexity"])
    rate = float(best["learning_rate"])
    if rate in (way.learning_rates[0], way.learning_rates[-1]):
        print(f"{label}: the best learning rate, {rate:g}, is at the edge of the grid; widen it", flush=True)
    return rate


def _key(label: str, pruning: str, rate: float | None, seed: int) -> dict[str, Any]:
    return {"method": label, "pruning": pruning, "learning_rate": rate, "seed": seed}


def main() -> None:
    """Run all cells."""
    args = arguments("perp/llama_wt2", __doc__.splitlines()[0]).parse_args()
    bench = Bench(args.model, args.dataset)
    protocol = {
        **PROTOCOL,
        "training": f"AdamW, {STEPS} steps of {BATCH} x {SEQUENCE_LENGTH} tokens, r={RANK}, bf16 autocast",
        "learning rates": "best validation perplexity of each method's grid after magnitude 80%, seed 0",
    }
    keys = ("method", "pruning", "learning_rate", "seed")
    table = Table(args.output, "tests/benchmarks/quality_perp.py", protocol=protocol, keys=keys, force=args.force)

    def base(pruning: str) -> float:
        row = table.row(
            _key("pruned", pruning, None, 0), lambda: {"perplexity": bench.perplexity(pruned(bench, pruning)[0])}
        )
        return float(row["perplexity"])

    def cell(label: str, pruning: str, rate: float, seed: int) -> None:
        before = base(pruning)
        table.row(
            _key(label, pruning, rate, seed),
            lambda: measure(bench, WAYS[label], pruning, rate, seed, dense, before),
        )

    row = table.row(_key("dense", "none", None, 0), lambda: {"perplexity": bench.perplexity(bench.load())})
    dense = float(row["perplexity"])
    labels = [label for label in WAYS if not args.only or label in args.only]
    for label in labels:
        for rate in WAYS[label].learning_rates:
            cell(label, FIRST, rate, 0)
    for label in labels:
        rate = chosen_rate(table, label, WAYS[label])
        assert rate is not None
        for seed in range(1, WAYS[label].seeds):
            cell(label, FIRST, rate, seed)
        for pruning in list(PRUNINGS)[1:] if WAYS[label].everywhere else []:
            cell(label, pruning, rate, 0)


if __name__ == "__main__":
    main()
