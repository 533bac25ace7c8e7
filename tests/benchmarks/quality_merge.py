"""Two fine-tunes of the small Llama merged by every method: perplexity on the domain of each.

    python tests/benchmarks/quality_merge.py              # trains the two fine-tunes, unless quality_delta.py has
    python tests/benchmarks/quality_merge.py --quick      # tiny sizes, under runs/quick, not to be published

The fine-tunes are `sentences` (SST-2's text) and `docstrings` (Python's standard library) of `finetunes.py`, trained
with AdamW. A cell writes the YAML, runs `sparse-ft merge` in this process, opens the directory it made and measures
three texts: the two domains and WikiText-2, which the base was trained on. `excess` is the mean over the two domains of
the log-perplexity above that of the domain's own fine-tune: 0 would be a model as good as both. Methods with random
masks run with 3 seeds. All merges are at weight 1 per model (a sum of deltas) but for `linear` and `slerp`, which
average.

About 40 merges of 0.5 s and 120 perplexities of 1.2 CPU seconds: 3 minutes, and 4 more if the fine-tunes are not kept.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from finetunes import Recipe, Task, Workshop
from quality import ROOT, Table
from transformers import PreTrainedModel

from sparse_ft.cli.main import main as sparse_ft
from sparse_ft.data import load_text, tokenize
from sparse_ft.evaluation import perplexity
from sparse_ft.models import load_model

SCRIPT = "tests/benchmarks/quality_merge.py"
DOMAINS: tuple[Task, ...] = ("sentences", "docstrings")
LEARNING_RATE, STEPS, SEEDS = 2e-4, 150, (0, 1, 2)
Measures = Mapping[str, Callable[[PreTrainedModel], float]]


@dataclass(frozen=True)
class Merge:
    """One line of the table.

    Attributes:
        method: mergekit's name.
        models: parameters of each model.
        whole: parameters of the merge.
        random: whether masks are drawn, so that several seeds are run.
        based: whether the YAML names the base.
        more: further keys of the YAML.
    """

    method: str
    models: dict[str, Any] = field(default_factory=lambda: {"weight": 1.0})
    whole: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    based: bool = True
    more: dict[str, Any] = field(default_factory=dict)


def _at(density: float, **more: Any) -> dict[str, Any]:
    return {"weight": 1.0, "density": density, **more}


MERGES: dict[str, Merge] = {
    "linear (average)": Merge("linear", based=False),
    "slerp, t 0.5": Merge("slerp", {}, {"t": 0.5}),
    "task_arithmetic": Merge("task_arithmetic"),
    "task_arithmetic, lambda 0.7": Merge("task_arithmetic", whole={"lambda": 0.7}),
    "ties, density 0.2": Merge("ties", _at(0.2)),
    "ties, density 0.5": Merge("ties", _at(0.5)),
    "dare_linear, density 0.5": Merge("dare_linear", _at(0.5), random=True),
    "dare_linear, density 0.1": Merge("dare_linear", _at(0.1), random=True),
    "dare_ties, density 0.5": Merge("dare_ties", _at(0.5), random=True),
    "dare_ties, density 0.1": Merge("dare_ties", _at(0.1), random=True),
    "della, density 0.5": Merge("della", _at(0.5, epsilon=0.15), random=True),
    "della_linear, density 0.5": Merge("della_linear", _at(0.5, epsilon=0.15), random=True),
    "breadcrumbs, density 0.9": Merge("breadcrumbs", _at(0.9, gamma=0.01)),
    "breadcrumbs_ties, density 0.9": Merge("breadcrumbs_ties", _at(0.9, gamma=0.01)),
    "darex_q, density 0.1, q 0.15": Merge("darex_q", _at(0.1, q=0.15), random=True),
    "dare_linear, density 0.1, compat mergekit": Merge(
        "dare_linear", _at(0.1), random=True, more={"compat": "mergekit"}
    ),
    "dare_ties, density 0.1, compat mergekit": Merge("dare_ties", _at(0.1), random=True, more={"compat": "mergekit"}),
    "ties, density 0.2, compat mergekit": Merge("ties", _at(0.2), more={"compat": "mergekit"}),
}


def configuration(merge: Merge, base: str, finetunes: Mapping[str, Path], seed: int) -> dict[str, Any]:
    """The YAML's content. Slerp takes one of the two as its base."""
    paths = [str(path) for path in finetunes.values()]
    named = base
    if merge.method == "slerp":
        named, *paths = paths
    content: dict[str, Any] = {
        "merge_method": merge.method,
        "models": [{"model": path, **({"parameters": merge.models} if merge.models else {})} for path in paths],
        "dtype": "float32",
        **({"parameters": merge.whole} if merge.whole else {}),
        **({"base_model": named} if merge.based else {}),
        **({"seed": seed} if merge.random else {}),
        **merge.more,
    }
    return content


def measure(merge: Merge, base: str, finetunes: Mapping[str, Path], seed: int, own: Measures, scores: Any) -> Any:
    """Merge in a temporary directory and measure the result."""
    with tempfile.TemporaryDirectory() as name:
        file, output = Path(name) / "merge.yaml", Path(name) / "merged"
        file.write_text(yaml.safe_dump(configuration(merge, base, finetunes, seed), sort_keys=False))
        start = time.process_time()
        code = sparse_ft(["merge", str(file), str(output)])
        seconds = time.process_time() - start
        if code:
            raise RuntimeError(f"sparse-ft merge ended with code {code} on:\n{file.read_text()}")
        model = load_model(output, dtype=torch.float32)
    found = {column: score(model) for column, score in own.items()}
    excess = [math.log(found[domain] / scores[domain]) for domain in DOMAINS]
    return {
        **{column: round(value, 3) for column, value in found.items()},
        "excess": round(sum(excess) / len(excess), 4),
        "merge_cpu_s": round(seconds, 2),
    }


def arguments() -> argparse.Namespace:
    """Options; `--quick` makes all of them small."""
    shared = ROOT.parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(shared / "models/llama-wt2"), help="directory of the base")
    parser.add_argument("--dataset", default=str(shared / "data/wikitext-2"), help="directory of the base's text")
    parser.add_argument("--sst2", type=Path, default=shared / "data/sst2", help="directory of SST-2's three files")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/merging/quality.json", help="result file")
    parser.add_argument("--only", nargs="*", default=[], help="run only these merges, by mergekit's names")
    parser.add_argument("--force", action="store_true", help="run rows again that the result file already holds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it run; nothing to be published")
    args = parser.parse_args()
    args.steps, args.windows, args.seeds = STEPS, 24, SEEDS
    if args.quick:
        args.steps, args.windows, args.seeds = 4, 2, SEEDS[:1]
        args.output = ROOT / "runs/quick/merging.json"
    return args


def main() -> None:
    """Fine-tunes and base first, then every merge."""
    args = arguments()
    torch.set_num_threads(1)
    shop = Workshop(args.model, args.sst2)
    recipes = {task: Recipe(task, "AdamW", LEARNING_RATE, args.steps) for task in DOMAINS}

    def on(ids: torch.Tensor) -> Callable[[PreTrainedModel], float]:
        options: dict[str, Any] = dict(
            sequence_length=256, max_windows=args.windows, dtype=torch.bfloat16, progress=False
        )
        return lambda model: perplexity(model, ids, **options).perplexity

    texts: dict[str, Any] = {task: shop.text(task, "test") for task in DOMAINS}
    texts["wikitext"] = tokenize(load_text(args.dataset, split="test"), shop.tokenizer)
    own: Measures = {name: on(ids) for name, ids in texts.items()}
    protocol = {
        "fine-tunes": f"AdamW, learning rate {LEARNING_RATE:g}, {args.steps} steps of 8 x 128 tokens",
        "evaluation": f"first {args.windows} windows of 256 test tokens of each text, fp32 weights, bf16 autocast",
        "merge": "fp32, weight 1 per model, by `sparse-ft merge`",
    }
    table = Table(args.output, SCRIPT, protocol=protocol, keys=("method", "seed"), force=args.force)

    def reference(method: str, load: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        def scores() -> dict[str, Any]:
            model = load()
            return {column: round(score(model), 3) for column, score in own.items()}

        return table.row({"method": method, "seed": None}, scores)

    reference("base", lambda: load_model(args.model, dtype=torch.float32))
    scores = {task: reference(task, lambda r=recipe: shop.finetuned(r))[task] for task, recipe in recipes.items()}
    finetunes = {task: recipe.directory for task, recipe in recipes.items()}
    for recipe in recipes.values():
        shop.finetuned(recipe)  # the rows may be there and the directories not
    for label, merge in MERGES.items():
        if args.only and merge.method not in args.only:
            continue
        for seed in args.seeds if merge.random else (None,):
            table.row(
                {"method": label, "seed": seed},
                lambda merge=merge, seed=seed: measure(merge, args.model, finetunes, seed or 0, own, scores),
            )


if __name__ == "__main__":
    main()
