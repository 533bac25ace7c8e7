"""Fine-tunes pruned as deltas: accuracy on SST-2 and perplexity on two domains, for every method and density.

    python tests/benchmarks/quality_delta.py                          # both tables, resumes where it stopped
    python tests/benchmarks/quality_delta.py --experiments sst2       # one of them; the two may run side by side
    python tests/benchmarks/quality_delta.py --quick                  # a minute, under runs/quick, not to be published

The base is fine-tuned with AdamW at a small and a large learning rate and with AdamR (decay 0.01) at the same two, then
each delta is pruned at drop rates p = 0.9, 0.95, 0.99, 0.999. Random masks: mean and standard deviation over 4 seeds
that no search has seen; searches use other seeds and, with labels, 500 held-out phrases. "No labels" is the change of
the outputs (last hidden states of the classifier, top-5 logits of a causal model) on 12 windows of 128 tokens of the
training text, 4 mask seeds. "Labels" of a causal model is its loss on the validation text. The head that the base lacks
stays fine-tuned; everything else is pruned. `scale` is q, or its mean over the tensors. "Per layer" searches the eta of
the closed form that minimises the paper's bound; the published scan for the same costs seconds for every eta.

What it costs in CPU seconds on one thread of the 2-core machine:

* SST-2: 4 fine-tunes of 400 steps, 0.5 each: 800. 256 accuracies of the 872 test sentences (25,509 tokens), 3.8 each:
  970 (336 cells; a scale that another method has measured with the same mask is not measured twice). 48 searches of
  some 12 points, 1.2 each: 690. In all about 41 minutes.
* Perplexity: 4 fine-tunes of 150 steps of 8 x 128 tokens, 0.8 each: 480. 200 perplexities of 24 windows of 256 tokens,
  1.2 each: 240. 32 searches of some 12 points, 1.3 each: 500. In all about 20 minutes.

Rows that the files hold are not run again, and fine-tunes are kept under runs/finetunes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetunes import DECAY, SENTENCES, WINDOW, WINDOWS, Batch, Recipe, Task, Workshop, accuracy, by_length
from quality import ROOT, Table
from torch import Tensor
from transformers import PreTrainedModel

from sparse_ft.data import random_windows
from sparse_ft.deltas.darex import search_eta, search_scale
from sparse_ft.deltas.darex_analytic import analytic_scales, collect_statistics
from sparse_ft.deltas.darex_moments import collect_moments
from sparse_ft.deltas.darex_objectives import label_objective, output_objective
from sparse_ft.deltas.magnitude import magnitude_delta
from sparse_ft.deltas.probe import DeltaProbe
from sparse_ft.deltas.wanda import wanda_delta
from sparse_ft.evaluation import perplexity
from sparse_ft.models import load_model, matrix_view, named_weights

SCRIPT = "tests/benchmarks/quality_delta.py"
DROP_RATES = (0.9, 0.95, 0.99, 0.999)
RATES: dict[str, tuple[float, ...]] = {"sst2": (1e-4, 5e-4), "perplexity": (2e-4,)}  # small and large delta
STEPS = {"sst2": 400, "perplexity": 150}
SEARCH_SEEDS, REPORT_SEEDS = (0, 1, 2, 3), (100, 101, 102, 103)
ETA = dict(low=0.02, high=0.62, step=0.2)

Scale = float | Mapping[str, float]


@dataclass
class Study:
    """One fine-tune at one drop rate, and what its methods may look at.

    Attributes:
        probe: sets the weights.
        metric: the reported one, of the model as it is now.
        labelled: what a search with labels makes large.
        text: windows of training text without labels, (12, 128).
        kind: which outputs a search without labels compares.
    """

    probe: DeltaProbe
    metric: Callable[[PreTrainedModel], float]
    labelled: Callable[[PreTrainedModel], float]
    text: Tensor
    kind: Any
    seeds: tuple[int, ...]
    known: dict[Any, float] = field(default_factory=dict)

    def measure(self, scale: Scale, seed: int) -> float:
        """The metric with a mask seed, once per scale."""
        key = (seed, scale if isinstance(scale, float) else tuple(sorted(scale.items())))
        if isinstance(scale, Mapping) and len(set(scale.values())) == 1:
            key = (seed, next(iter(scale.values())))
        if key not in self.known:
            self.probe.prune(scale, seed=seed)
            self.known[key] = self.metric(self.probe.model)
        return self.known[key]

    def with_labels(self) -> Callable[[Scale], float]:
        """Objective with labels, at one mask seed as in the paper."""
        return label_objective(self.probe, self.labelled, seeds=SEARCH_SEEDS[:1])

    def without_labels(self) -> Callable[[Scale], float]:
        """Objective without labels, over four mask seeds."""
        return output_objective(self.probe, [self.text], kind=self.kind, seeds=SEARCH_SEEDS)


# -- methods that choose a scale ---------------------------------------------------------------------------------------


def dare_scale(study: Study) -> Scale:
    """DARE."""
    return study.probe.density


def global_scale(study: Study, objective: Callable[[Study], Callable[[Scale], float]]) -> Scale:
    """DAREx-q: one scale for the model."""
    return search_scale(objective(study), density=study.probe.density).scale


def layer_scales(study: Study, objective: Callable[[Study], Callable[[Scale], float]]) -> Scale:
    """DAREx-q: one scale per layer by the closed eta form, its eta searched."""
    layers = collect_statistics(study.probe, [study.text])
    names, density = study.probe.names, study.probe.density

    def at(eta: float) -> dict[str, float]:
        return analytic_scales(layers, density=density, form="closed_form_eta", eta=eta, names=names)

    found = search_eta(objective(study), at, density=density, **ETA)
    return found.scales


def closed_scales(study: Study, form: Any, eta: float | None) -> Scale:
    """A closed form, without any search."""
    layers = collect_statistics(study.probe, [study.text])
    return analytic_scales(layers, density=study.probe.density, form=form, eta=eta, names=study.probe.names)


SCALES: dict[str, Callable[[Study], Scale]] = {
    "DARE": dare_scale,
    "DAREx-q, global, labels": partial(global_scale, objective=Study.with_labels),
    "DAREx-q, global, no labels": partial(global_scale, objective=Study.without_labels),
    "DAREx-q, per layer, labels": partial(layer_scales, objective=Study.with_labels),
    "DAREx-q, per layer, no labels": partial(layer_scales, objective=Study.without_labels),
    "closed form, MSE": partial(closed_scales, form="closed_form_mse", eta=None),
    "closed form, eta 0.4": partial(closed_scales, form="closed_form_eta", eta=0.4),
}
# label of a row of the AdamR fine-tune -> how its delta is pruned
DAREX_L2 = {
    "DAREx-L2": "DARE",
    "DAREx-L2 + DAREx-q, labels": "DAREx-q, global, labels",
    "DAREx-L2 + DAREx-q, no labels": "DAREx-q, global, no labels",
}


# -- methods that rank -------------------------------------------------------------------------------------------------


def prune_by_magnitude(study: Study) -> None:
    """The largest entries of each tensor, unscaled."""
    study.probe.transform(lambda name, delta: magnitude_delta(delta, density=study.probe.density))


def prune_by_wanda(study: Study) -> None:
    """The largest delta times input norm of each row, unscaled; tensors without inputs by magnitude."""
    study.probe.restore()
    moments = collect_moments(study.probe.model, [study.text])

    def change(name: str, delta: Tensor) -> Tensor:
        if name not in moments:
            return magnitude_delta(delta, density=study.probe.density)
        dim = moments[name].input_dim
        kept = wanda_delta(matrix_view(delta, dim), moments[name].norms(), density=study.probe.density)
        return matrix_view(kept, dim)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows of 384 at a density of 0.001 keep nothing; the row shows what that does
        study.probe.transform(change)


RANKED: dict[str, Callable[[Study], None]] = {
    "MP (magnitude)": prune_by_magnitude,
    "Wanda on the delta": prune_by_wanda,
}


# -- one cell ----------------------------------------------------------------------------------------------------------


def run_cell(study: Study, method: str, column: str) -> dict[str, Any]:
    """Prune by a method, measure over the report's mask seeds."""
    start = time.process_time()
    scale: Scale | None = None
    # weights change between calls: no cast of theirs may be kept
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        if method in RANKED:
            RANKED[method](study)
        else:
            scale = SCALES[DAREX_L2.get(method, method)](study)
    seconds = time.process_time() - start
    if scale is None:
        values = [study.metric(study.probe.model)]
    else:
        values = [study.measure(scale, seed) for seed in study.seeds]
    mean_scale = statistics.fmean(scale.values()) if isinstance(scale, Mapping) else scale
    return {
        column: round(statistics.fmean(values), 4),
        f"{column}_sd": round(statistics.stdev(values), 4) if len(values) > 1 else None,
        "masks": len(values),
        "scale": None if mean_scale is None else round(mean_scale, 5),
        "choosing_cpu_s": round(seconds, 1),
        "values": [round(value, 4) for value in values],
    }


def mean_delta(probe: DeltaProbe) -> float:
    """Mean |delta| over all pruned entries."""
    total = sum(float(probe.deltas[name].abs().sum(dtype=torch.float64)) for name in probe.names)
    return total / sum(probe.deltas[name].numel() for name in probe.names)


# -- experiments -------------------------------------------------------------------------------------------------------


@dataclass
class Experiment:
    """One task's fine-tunes, metric and table."""

    shop: Workshop
    task: Task
    name: str
    args: argparse.Namespace
    table: Table
    column: str
    metric: Callable[[PreTrainedModel], float]
    labelled: Callable[[PreTrainedModel], float]
    kind: str
    methods: list[str]

    def run(self) -> None:
        """All rows of the task that are not there yet."""
        base = named_weights({name: p.detach() for name, p in load_model(self.shop.base).named_parameters()})
        text = random_windows(self.shop.text(self._text, "train"), count=12, length=WINDOW, seed=0)
        for optimizer in ("AdamW", "AdamR"):
            for rate in self.args.learning_rates or RATES[self.name]:
                recipe = Recipe(self.task, optimizer, rate, self.args.steps or STEPS[self.name])
                methods = list(DAREX_L2) if optimizer == "AdamR" else self.methods
                self._run_recipe(recipe, base, text, methods)

    @property
    def _text(self) -> Task:
        return "sentences" if self.task == "sst2" else self.task

    def _key(self, recipe: Recipe, method: str, drop_rate: float | None) -> dict[str, Any]:
        return {"task": self.task, "training": recipe.label, "method": method, "drop_rate": drop_rate}

    def _run_recipe(self, recipe: Recipe, base: Mapping[str, Tensor], text: Tensor, methods: list[str]) -> None:
        wanted = [m for m in methods if not self.args.only or m in self.args.only]
        keys = [self._key(recipe, m, p) for p in self.args.drop_rates for m in wanted]
        references = [self._key(recipe, m, None) for m in ("base", "fine-tuned")]
        if all(self.table.find(key) for key in [*references, *keys]):
            return
        model = self.shop.finetuned(recipe)
        with DeltaProbe(model, base, density=1.0) as probe:
            size = {"mean_abs_delta": round(mean_delta(probe), 6)}
            self.table.row(references[1], lambda: {self.column: round(self.metric(model), 4), **size})
            probe.transform(lambda name, delta: torch.zeros_like(delta))
            self.table.row(references[0], lambda: {self.column: round(self.metric(model), 4)})
        for drop_rate in self.args.drop_rates:
            with DeltaProbe(model, base, density=round(1 - drop_rate, 6)) as probe:
                study = Study(probe, self.metric, self.labelled, text, self.kind, self.args.seeds)
                for method in wanted:
                    self.table.row(
                        self._key(recipe, method, drop_rate),
                        lambda method=method, study=study: run_cell(study, method, self.column),
                    )


def protocol(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """How the numbers of an experiment were made."""
    shared = {
        "fine-tuning": f"{args.steps or STEPS[name]} steps, AdamW without decay or AdamR with decay {DECAY:g}, 10% "
        "warm-up, linear decay, bf16 autocast",
        "masks": f"report seeds {list(args.seeds)}, search seeds {list(SEARCH_SEEDS)}; mean and standard deviation",
        "weights": "fp32",
    }
    if name == "sst2":
        return {
            **shared,
            "batch": f"{SENTENCES} sentences or phrases",
            "evaluation": "accuracy on SST-2's 872 test sentences, bf16 autocast; labels: 500 phrases of dev",
        }
    return {
        **shared,
        "batch": f"{WINDOWS} windows of {WINDOW} tokens",
        "evaluation": f"perplexity on the first {args.windows} windows of 256 test tokens, bf16 autocast; labels: "
        "loss on the validation text",
    }


def make_table(name: str, args: argparse.Namespace) -> Table:
    """The experiment's result file."""
    keys = ("task", "training", "method", "drop_rate")
    return Table(args.output / f"{name}.json", SCRIPT, protocol=protocol(name, args), keys=keys, force=args.force)


def run_sst2(shop: Workshop, args: argparse.Namespace) -> None:
    """The classifier."""
    pad = shop.tokenizer.pad_token_id
    test: list[Batch] = by_length(shop.examples("test")[: args.examples], pad)
    held_out = by_length(shop.examples("dev")[: min(500, args.examples or 500)], pad)
    Experiment(
        shop, "sst2", "sst2", args, make_table("sst2", args), "accuracy",
        metric=partial(accuracy, batches=test), labelled=partial(accuracy, batches=held_out), kind="hidden",
        methods=[*SCALES, *RANKED],
    ).run()  # fmt: skip


def run_perplexity(shop: Workshop, args: argparse.Namespace) -> None:
    """The two causal models."""
    table = make_table("perplexity", args)
    per_layer = {name for name in SCALES if "per layer" in name or "eta" in name}  # the authors advise one for decoders
    for task in ("sentences", "docstrings"):

        def on(split: str, task: Task = task) -> Callable[[PreTrainedModel], float]:
            ids = shop.text(task, split)  # type: ignore[arg-type]
            options = dict(sequence_length=256, max_windows=args.windows, dtype=torch.bfloat16, progress=False)
            return lambda model: perplexity(model, ids, **options).perplexity  # type: ignore[arg-type]

        test, validation = on("test"), on("validation")
        Experiment(
            shop, task, "perplexity", args, table, "perplexity",
            metric=test, labelled=lambda model, validation=validation: -math.log(validation(model)), kind="logits",
            methods=[*(name for name in SCALES if name not in per_layer), *RANKED],
        ).run()  # fmt: skip


EXPERIMENTS = {"sst2": run_sst2, "perplexity": run_perplexity}


def arguments() -> argparse.Namespace:
    """Options; `--quick` makes all of them small."""
    shared = ROOT.parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(shared / "models/llama-wt2"), help="directory of the base")
    parser.add_argument("--sst2", type=Path, default=shared / "data/sst2", help="directory of SST-2's three files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/delta", help="directory of the results")
    parser.add_argument("--experiments", nargs="*", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--only", nargs="*", default=[], help="run only these methods")
    parser.add_argument("--force", action="store_true", help="run rows again that the result file already holds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it run; nothing to be published")
    args = parser.parse_args()
    args.steps, args.examples, args.windows = None, None, 24
    args.seeds, args.drop_rates, args.learning_rates = REPORT_SEEDS, DROP_RATES, None
    if args.quick:
        args.steps, args.examples, args.windows = 4, 64, 2
        args.seeds, args.drop_rates, args.learning_rates = REPORT_SEEDS[:2], (0.99,), (2e-4,)
        args.output = ROOT / "runs/quick/delta"
    return args


def main() -> None:
    """Run the experiments."""
    args = arguments()
    torch.set_num_threads(1)
    shop = Workshop(args.model, args.sst2)
    for name in args.experiments:
        EXPERIMENTS[name](shop, args)


if __name__ == "__main__":
    main()
