"""What keeping zeros costs in one real `Trainer` step of full fine-tuning, against ways to do it by hand.

    python tests/benchmarks/bench_mask_callback.py                    # writes docs/results/mask_callback/step.json
    python tests/benchmarks/bench_mask_callback.py --size tiny --rounds 1 --output /tmp/step.json     # a smoke run

A Llama from its config, fp32 parameters, bf16 autocast, AdamW, clipping at 1. Every visit is a `Trainer` of its own on
the same model; a step is timed from `on_step_begin` to `on_step_end`: forward, backward, clip, optimizer, zero_grad.
Variants run in turn, the order rotating from round to round; the first step of a visit is not counted. A ratio is the
median over rounds of the visit's median step over that of dense training in the same round; `fastest_ratio` compares
the fastest visits. `masking_share` is the part of a step's wall time spent in the masking itself, both read in the same
step, so that it does not depend on how steady the machine is; it is read where the variant masks in one place.
`exact`: every pruned weight was zero after the last step. `mask_bytes`: held per masked weight.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from results import REPOSITORY, write_result
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights
from sparse_ft.training import MaskCallback, mask_callback

SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256),
    "50m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192),
}


class StopClock(TrainerCallback):
    """Wall and CPU seconds of each step; first of the callbacks, so that their `on_step_end` is not counted."""

    def __init__(self) -> None:
        self.started = (0.0, 0.0)
        self.in_masking = 0.0
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.masking: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Read the clocks."""
        self.wall.append(time.perf_counter() - self.started[0])
        self.cpu.append(time.process_time() - self.started[1])
        self.masking.append(self.in_masking)
        self.in_masking = 0.0

    def timed(self, mask: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
        """`mask`, its seconds added up."""

        def run(tensor: Tensor, bits: Tensor) -> Any:
            start = time.perf_counter()
            result = mask(tensor, bits)
            self.in_masking += time.perf_counter() - start
            return result

        return run


class StartClock(TrainerCallback):
    """Starts a `StopClock`; last of the callbacks."""

    def __init__(self, clock: StopClock) -> None:
        self.clock = clock

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Set the clocks."""
        self.clock.started = (time.perf_counter(), time.process_time())


class AfterStep(TrainerCallback):
    """Masks every weight in `on_optimizer_step` in a way given."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], apply: Callable[[Tensor, Tensor], Any]) -> None:
        self.pairs, self.apply = pairs, apply

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Mask all weights."""
        for weight, mask in self.pairs:
            self.apply(weight, mask)


class GradientHook(TrainerCallback):
    """A tensor hook per weight that returns gradient times mask."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        self.pairs = [(weight, mask.to(dtype)) for weight, mask in pairs]
        self.handles: list[Any] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Place the hooks."""
        for weight, mask in self.pairs:
            self.handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove them."""
        while self.handles:
            self.handles.pop().remove()


class TorchPrune(TrainerCallback):
    """`torch.nn.utils.prune`: a second parameter, and weight = original * mask before every forward."""

    def __init__(self, modules: list[tuple[nn.Module, Tensor]]) -> None:
        self.modules = modules

    def remove(self) -> None:
        """Make the pruning permanent and the parameters plain again."""
        for module, _ in self.modules:
            prune.remove(module, "weight")


class MixingAdamW(torch.optim.AdamW):
    """AdamW by another name: MaskCallback does not know it, so it masks the gradient and the weight."""


def after_step(store: torch.dtype, apply: Callable[[Tensor, Tensor], Any]) -> Callable[[Any], list[TrainerCallback]]:
    """A variant that masks weights after the step with masks stored in a dtype."""
    return lambda bench: [AfterStep([(w.detach(), m.to(store)) for w, m in bench.pairs()], apply)]


# name -> (bytes per weight, callbacks of a visit)
VARIANTS: dict[str, tuple[float, Callable[[Any], list[TrainerCallback]]]] = {
    "dense": (0, lambda bench: []),
    "MaskCallback": (4, lambda bench: [MaskCallback(bench.masks)]),
    "MaskCallback, unknown optimizer": (4, lambda bench: [MaskCallback(bench.masks)]),
    "gradient hook, weight's dtype": (4, lambda bench: [GradientHook(bench.pairs(), torch.float32)]),
    "gradient hook, bool": (1, lambda bench: [GradientHook(bench.pairs(), torch.bool)]),
    "after the step, weight's dtype": (4, after_step(torch.float32, torch.Tensor.mul_)),
    "after the step, uint8": (1, after_step(torch.uint8, torch.Tensor.mul_)),
    "after the step, bool": (1, after_step(torch.bool, torch.Tensor.mul_)),
    "after the step, masked_fill": (1, after_step(torch.bool, lambda w, m: w.masked_fill_(~m, 0))),
    "torch.nn.utils.prune": (8, lambda bench: [bench.torch_prune()]),
}


class Bench:
    """The model, its masks, and one visit of a variant."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        config = LlamaConfig(**SIZES[args.size], max_position_embeddings=max(args.tokens, 64), use_cache=False)
        self.model = LlamaForCausalLM(config)
        targets, weights = find_targets(self.model), named_weights(self.model)
        scores = {target.name: weights[target.name].detach().abs() for target in targets}
        self.masks = MaskSet.from_scores(scores, sparsity=args.sparsity)
        self.modules = {target.name: self.model.get_submodule(target.module) for target in targets}
        ids = torch.randint(0, config.vocab_size, ((args.steps + 1) * args.batch, args.tokens))
        self.data = [{"input_ids": row, "labels": row} for row in ids]

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, bool mask) of every masked weight."""
        weights = named_weights(self.model)
        return [(weights[name], mask) for name, mask in self.masks.items()]

    def torch_prune(self) -> TorchPrune:
        """Put torch's pruning on the model."""
        modules = [(self.modules[name], mask) for name, mask in self.masks.items()]
        for module, mask in modules:
            prune.custom_from_mask(module, "weight", mask)
        return TorchPrune(modules)

    def visit(self, name: str) -> tuple[StopClock, bool]:
        """The times of every step, and whether the zeros are exact at the end."""
        self.masks.apply_(self.model)
        callbacks = VARIANTS[name][1](self)
        clock = StopClock()
        for callback in callbacks:
            if isinstance(callback, AfterStep):
                callback.apply = clock.timed(callback.apply)
        timed = patch.object(mask_callback, "mask_", clock.timed(mask_callback.mask_))
        with tempfile.TemporaryDirectory() as directory, timed:
            arguments = TrainingArguments(
                output_dir=directory,
                use_cpu=True,
                bf16=True,
                max_steps=self.args.steps + 1,
                per_device_train_batch_size=self.args.batch,
                learning_rate=1e-4,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            optimizer = MixingAdamW(self.model.parameters(), lr=1e-4) if "unknown" in name else None
            trainer = Trainer(
                self.model,
                arguments,
                train_dataset=self.data,
                callbacks=[clock, *callbacks, StartClock(clock)],
                optimizers=(optimizer, None),
            )
            trainer.train()
        self.model.zero_grad(set_to_none=True)
        for callback in callbacks:
            if isinstance(callback, TorchPrune):
                callback.remove()
        return clock, not self.masks.revived(self.model)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    bench = Bench(args)
    names = args.variants
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    shares: dict[str, list[float]] = {name: [] for name in names}
    exact = dict.fromkeys(names, True)
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            clock, zeros = bench.visit(name)
            seconds[name].append((statistics.median(clock.wall[1:]), statistics.median(clock.cpu[1:])))
            shares[name] += [m / w for m, w in zip(clock.masking[1:], clock.wall[1:], strict=True)]
            exact[name] &= zeros
            print(f"round {turn + 1}/{args.rounds} {name}: {seconds[name][-1][0] * 1e3:.0f} ms", flush=True)
    rows = []
    for name in names:
        pairs = list(zip(seconds[name], seconds["dense"], strict=True))
        rows.append(
            {
                "variant": name,
                "wall_ms": round(statistics.median(own[0] for own in seconds[name]) * 1e3, 1),
                "cpu_ms": round(statistics.median(own[1] for own in seconds[name]) * 1e3, 1),
                "wall_ratio": round(statistics.median(own[0] / dense[0] for own, dense in pairs), 4),
                "cpu_ratio": round(statistics.median(own[1] / dense[1] for own, dense in pairs), 4),
                "fastest_ratio": round(min(o[0] for o, _ in pairs) / min(d[0] for _, d in pairs), 4),
                "masking_share": round(statistics.median(shares[name]), 4) if any(shares[name]) else None,
                "mask_bytes": VARIANTS[name][0],
                "exact": exact[name],
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as text."""
    print(f"\n{'variant':34}" + "".join(f"{column:>15}" for column in list(rows[0])[1:]))
    for row in rows:
        print(f"{row['variant']:34}" + "".join(f"{row[column]!s:>15}" for column in list(row)[1:]))


def main() -> None:
    """Parse the arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=9, help="rounds, each with one visit of every variant")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a visit")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", default=str(REPOSITORY / "docs" / "results" / "mask_callback" / "step.json"))
    args = parser.parse_args()
    if "dense" not in args.variants:
        parser.error("the variants must include dense, the reference")
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    rows = measure(args)
    print_table(rows)
    protocol = {k: v for k, v in vars(args).items() if k not in ("output", "seed")} | {"dtype": "fp32, bf16 autocast"}
    print(write_result(args.output, __file__, rows, protocol, [args.seed]))


if __name__ == "__main__":
    main()
