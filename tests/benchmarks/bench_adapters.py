"""Time and memory of one training step of every adapter against plain LoRA, its floor and full fine-tuning.

    python tests/benchmarks/bench_adapters.py                      # writes docs/results/adapters/step.json
    python tests/benchmarks/bench_adapters.py --size tiny --pairs 1 --no-memory --output /tmp/step.json    # a smoke run

A step is forward, backward, AdamW and zero_grad of a Llama built from its config, in three precisions: `autocast` (fp32
weights under bf16 autocast), `bf16` (bf16 weights, adapters in fp32 where PEFT keeps them so) and `fp32`. The floor is
plain LoRA that also computes one weight gradient per adapted layer and throws it away: what a masked update cannot do
without. HiRA and DoRA are PEFT's. Variants of one precision run in one process, in turn, and a result is the median
over rounds of the ratio to plain LoRA in the same round. Memory is that of two steps in a process of its own, with
activation checkpointing and without: `held_mb` before them (libraries, model, adapters, and of a masked adapter one bit
per weight), `peak_mb` in them, and `over_lora_weights` by how much the rise from one to the other exceeds plain LoRA's,
in copies of the largest weight.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import REPOSITORY, write_result
from torch import Tensor, nn

SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256),
    "50m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192),
    "1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, vocab_size=32000
    ),
}
DTYPES = {"autocast": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(args: argparse.Namespace) -> nn.Module:
    """A Llama from its config, half of its weights pruned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(**SIZES[args.size], max_position_embeddings=max(args.tokens, 64), use_cache=False)
    model = LlamaForCausalLM(config).to(args.device, DTYPES[args.precision]).train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(f"{linear}." in name for linear in LINEARS):
                weight.mul_(torch.rand_like(weight) > args.sparsity)
    return model


def full(args: argparse.Namespace) -> nn.Module:
    """Every parameter trained, dense."""
    return base_model(args)


def lora(args: argparse.Namespace) -> nn.Module:
    """PEFT's LoRA on every linear of the blocks."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(base_model(args), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=LINEARS))


def floor(args: argparse.Namespace) -> nn.Module:
    """LoRA, and for each adapted layer the product dYᵀ X in the dtype autocast uses."""
    from peft.tuners.lora import LoraLayer

    model = lora(args)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.register_forward_hook(also_weight_gradient)
    return model


def also_weight_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    rows = inputs[0].detach().to(output.dtype).flatten(0, -2)
    output.register_hook(lambda grad: torch.mm(grad.flatten(0, -2).t(), rows) is None or None)


def peft_only(config: str) -> Callable[[argparse.Namespace], nn.Module]:
    """Another PEFT method on the same layers."""

    def make(args: argparse.Namespace) -> nn.Module:
        import peft

        options: dict[str, Any] = {"r": args.rank, "target_modules": LINEARS}
        if config == "DoRA":
            return peft.get_peft_model(base_model(args), peft.LoraConfig(use_dora=True, **options))
        return peft.get_peft_model(base_model(args), peft.HiraConfig(**options))

    return make


def masked(config: str) -> Callable[[argparse.Namespace], nn.Module]:
    """One of ours on the same layers."""

    def make(args: argparse.Namespace) -> nn.Module:
        from peft import get_peft_model

        import sparse_ft

        model = base_model(args)
        masks = sparse_ft.MaskSet.from_zeros(model)
        return get_peft_model(model, getattr(sparse_ft, config)(r=args.rank, masks=masks))

    return make


VARIANTS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "lora": lora,
    "mask_lora": masked("MaskLoraConfig"),
    "scale_lora": masked("ScaleLoraConfig"),
    "lora_prune": masked("LoraPruneConfig"),
    "HiRA": peft_only("HiRA"),
    "DoRA": peft_only("DoRA"),
    "floor": floor,
    "full": full,
}


class Run:
    """One variant with its optimizer, ready to step."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.args, self.model = args, VARIANTS[name](args)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        ids = torch.randint(0, SIZES[args.size]["vocab_size"], (args.batch, args.tokens), device=args.device)
        self.batch = {"input_ids": ids, "labels": ids}

    def step(self) -> None:
        with torch.autocast(self.args.device, dtype=torch.bfloat16, enabled=self.args.precision == "autocast"):
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> tuple[float, float]:
        """Wall and CPU seconds of one step, averaged over `steps`."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.args.steps):
            self.step()
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - wall) / self.args.steps, (time.process_time() - cpu) / self.args.steps


def measure_times(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rounds of one measurement of each variant; every other round backwards, so that none is always first."""
    runs = {name: Run(name, args) for name in args.variants}
    for run in runs.values():
        run.timed()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(args.pairs):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            times[name].append(runs[name].timed())
    rows = {}
    for name, measured in times.items():
        row: dict[str, Any] = {"precision": args.precision, "variant": name, "trainable": runs[name].trainable}
        for column, index in (("wall", 0), ("cpu", 1)):
            row[f"{column}_s"] = round(statistics.median(pair[index] for pair in measured), 5)
            ratios = [pair[index] / reference[index] for pair, reference in zip(measured, times["lora"], strict=True)]
            row[f"{column}_over_lora"] = round(statistics.median(ratios), 4)
        rows[name] = row
    return rows


def peak_memory(name: str, args: argparse.Namespace, queue: Any) -> None:
    """MB of this process before two steps, and their peak: resident memory, or what CUDA allocated."""
    torch.set_num_threads(args.threads)
    run = Run(name, args)
    forget_preparation()
    measure = peak_resident if args.device != "cuda" else lambda: torch.cuda.max_memory_allocated() / 2**20
    held = measure()
    run.step()
    run.step()
    queue.put((round(held, 1), round(measure(), 1)))


def forget_preparation() -> None:
    """Give freed memory back to the system and start the high-water mark anew, where the system can: the peak is that
    of training, not of what making the model and its masks left in the heap."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return


def peak_resident() -> float:
    """Peak resident memory in MB; getrusage would count the parent's before exec."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure_memory(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    context = multiprocessing.get_context("spawn")
    # What is freed goes back to the system at once: else the heap's own habits are 50 MB of noise.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    peaks = {}
    for name in args.variants:
        queue = context.Queue()
        process = context.Process(target=peak_memory, args=(name, args, queue))
        process.start()
        peaks[name] = queue.get()
        process.join()
    return peaks


def add_memory(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Peaks with and without activation checkpointing, and their distance from LoRA's in largest weights."""
    size = SIZES[args.size]
    largest = size["hidden_size"] * size["intermediate_size"] * DTYPES[args.precision].itemsize / 2**20
    for suffix, checkpointing in (("", False), ("_checkpointing", True)):
        peaks = measure_memory(argparse.Namespace(**vars(args) | {"checkpointing": checkpointing}))
        rise = {name: peak - held for name, (held, peak) in peaks.items()}
        for name, (held, peak) in peaks.items():
            rows[name][f"held_mb{suffix}"], rows[name][f"peak_mb{suffix}"] = held, peak
            rows[name][f"over_lora_weights{suffix}"] = round((rise[name] - rise["lora"]) / largest, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pairs", type=int, default=7, help="rounds, each with one measurement of every variant")
    parser.add_argument("--steps", type=int, default=2, help="steps per measurement")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory_only", action="store_true", help="measure memory for rows whose times are there")
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/adapters/step.json"))
    args = parser.parse_args()
    if "lora" not in args.variants:
        parser.error("the variants must include lora, the reference")
    torch.set_num_threads(args.threads)
    hidden = ("output", "seed", "memory_only", "no_memory")
    protocol = {k: v for k, v in vars(args).items() if k not in hidden}
    rows: list[dict[str, Any]] = []
    for precision in args.precisions:
        args.precision, args.checkpointing = precision, False
        if args.memory_only:
            known = json.loads(Path(args.output).read_text(encoding="utf-8"))["rows"]
            measured = {row["variant"]: row for row in known if row["precision"] == precision}
        else:
            measured = measure_times(args)
        if not args.no_memory:
            add_memory(measured, args)
        rows += measured.values()
        print_table(list(measured.values()))
        if not args.memory_only:
            write_result(args.output, __file__, rows, protocol, [args.seed])
    write_result(args.output, __file__, rows, protocol, [args.seed])


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for cells in [columns, *([str(row[column]) for column in columns] for row in rows)]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


if __name__ == "__main__":
    main()
