"""One pruning run in a process of its own, for bench_pruning.py: prints one line of JSON.

    python pruning_runs.py ours-sparsegpt --model DIR --tokens FILE [--pattern 2:4 | --sparsity 0.5] [--save DIR]

Runners: `pass` and the two floors; `ours-*`; `stream-*` (prune_checkpoint from and to a directory);
`llmcompressor-*` (in a virtual environment with llmcompressor, without sparse_ft) and `original-*` (classes of
the published scripts, from a checkout given by --wanda_repo, in the plain loop below: their own drivers no longer run).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

BATCH = 8


def batches(args: argparse.Namespace) -> list[Tensor]:
    """The calibration token ids, (8, length) each."""
    return list(load_file(args.tokens)["calibration"].split(BATCH))


def distinct_inputs(model: nn.Module) -> list[nn.Linear]:
    """One linear for each distinct input of a Llama block: q (k, v share it), o, gate (up shares it), down."""
    names = ("q_proj", "o_proj", "gate_proj", "down_proj")
    return [m for n, m in model.named_modules() if n.endswith(names)]  # type: ignore[misc]


@contextmanager
def hooks(modules: list[nn.Linear], watch: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Call `watch(module, tokens (T, d))` at every forward of the modules."""
    handles = [m.register_forward_pre_hook(lambda m, x: watch(m, x[0].reshape(-1, x[0].shape[-1]))) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def floor(model: nn.Module, args: argparse.Namespace, kind: str) -> None:
    """Two passes over the blocks without the head; the first one computes the statistics a method cannot do without."""
    sums: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, x: Tensor) -> None:
        x, d = x.float(), x.shape[-1]
        if kind == "floor-sparsegpt":
            total = sums.setdefault(module, torch.zeros(d, d))
            total.addmm_(x.T, x)
        elif kind == "floor-wanda":
            sums.setdefault(module, torch.zeros(d)).add_(x.square().sum(0))

    for step in range(1 if kind == "pass" else 2):
        with hooks(distinct_inputs(model) if step == 0 else [], watch):
            for ids in batches(args):
                model.model(input_ids=ids, use_cache=False)  # type: ignore[operator]


def ours(model: nn.Module, args: argparse.Namespace, method: str) -> None:
    """sparse_ft.prune."""
    from sparse_ft import prune

    calibration = batches(args) if method in ("wanda", "sparsegpt") else None
    pattern = args.pattern or "unstructured"
    prune(model, method=method, pattern=pattern, sparsity=args.sparsity, calibration=calibration, progress=False)


def llmcompressor(model: nn.Module, args: argparse.Namespace, method: str) -> None:
    """The same through llmcompressor's sequential pipeline."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    examples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches(args)]
    # Asked for although the examples are tokenised already.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    removed_first = "0:0"
    if args.pattern:
        n, m = map(int, args.pattern.split(":"))
        removed_first = f"{m - n}:{m}"
    classes = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    options = {"mask_structure": removed_first, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    modifier = classes[method](sparsity=share(args), **options)
    oneshot(
        model=model,
        dataset=DataLoader(examples, batch_size=None),  # type: ignore[arg-type]
        recipe=[modifier],
        processor=tokenizer,
        pipeline="sequential",
    )


@torch.no_grad()
def original(model: nn.Module, args: argparse.Namespace, method: str) -> None:
    """The published layer classes, one block after the other: statistics pass, prune, pass with the pruned block."""
    sys.path.insert(0, str(Path(args.wanda_repo).resolve()))
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]  # the script synchronises without a GPU too
    from lib.layerwrapper import WrappedGPT
    from lib.sparsegpt import SparseGPT

    hidden, kwargs = captured(model, batches(args))
    removed, group = (0, 0)
    if args.pattern:
        n, group = map(int, args.pattern.split(":"))
        removed = group - n
    for block in model.model.layers:  # type: ignore[union-attr]
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        wrappers = {m: (SparseGPT if method == "sparsegpt" else WrappedGPT)(m) for m in linears}
        with hooks(linears, lambda m, x, w=wrappers: w[m].add_batch(x, None)):  # type: ignore[misc]
            for states, arguments in zip(hidden, kwargs, strict=True):
                block(states, **arguments)
        for linear, wrapper in wrappers.items():
            if method == "sparsegpt":
                wrapper.fasterprune(share(args), prune_n=removed, prune_m=group, blocksize=128, percdamp=0.01)
            else:
                wanda_from_script(linear, wrapper, share(args), removed, group)
        hidden = [first(block(states, **arguments)) for states, arguments in zip(hidden, kwargs, strict=True)]


def wanda_from_script(linear: nn.Linear, wrapper: Any, sparsity: float, removed: int, group: int) -> None:
    """The scoring formula of the paper on the script's own statistics."""
    metric = linear.weight.data.abs() * wrapper.scaler_row.sqrt()
    if group:
        order = torch.sort(metric.view(metric.shape[0], -1, group), dim=-1, stable=True).indices[..., :removed]
        drop = torch.zeros(metric.shape[0], metric.shape[1] // group, group, dtype=torch.bool).scatter_(-1, order, True)
        linear.weight.data[drop.view_as(metric)] = 0
    else:
        order = torch.sort(metric, dim=-1, stable=True).indices[:, : int(metric.shape[1] * sparsity)]
        linear.weight.data.scatter_(1, order, 0)


def captured(model: nn.Module, ids: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Inputs and keyword arguments of the first block, for each batch."""
    hidden, kwargs = [], []

    class Stop(Exception):
        pass

    def catch(_: nn.Module, args: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        hidden.append(args[0] if args else arguments.pop("hidden_states"))
        kwargs.append(arguments)
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)  # type: ignore[union-attr,index]
    for batch in ids:
        try:
            model.model(input_ids=batch, use_cache=False)  # type: ignore[operator]
        except Stop:
            continue
    handle.remove()
    return hidden, kwargs


def first(output: Any) -> Tensor:
    """Hidden states of a block that returns a tensor or a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def share(args: argparse.Namespace) -> float:
    """Sparsity of the pattern."""
    if args.pattern:
        n, m = map(int, args.pattern.split(":"))
        return 1 - n / m
    return float(args.sparsity)


@torch.no_grad()
def relative_error(model: nn.Module, args: argparse.Namespace) -> float | None:
    """||h_pruned - h_dense||^2 / ||h_dense||^2 of the last hidden states on tokens that were not calibrated on."""
    tensors = load_file(args.tokens)
    if "hidden" not in tensors:
        return None
    dense = tensors["hidden"].float()
    states = model.model(input_ids=tensors["held_out"], use_cache=False).last_hidden_state.float()  # type: ignore[operator]
    return float((states - dense).square().sum() / dense.square().sum())


RUNNERS: dict[str, Callable[[nn.Module, argparse.Namespace, str], None]] = {
    "ours": ours,
    "llmcompressor": llmcompressor,
    "original": original,
}


def main() -> None:
    """Run one runner and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runner")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--pattern")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--wanda_repo")
    parser.add_argument("--save")
    args = parser.parse_args()
    kind, _, method = args.runner.partition("-")
    result: dict[str, Any] = {}
    if kind == "stream":
        result = timed(lambda: stream(args, method))
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        if kind in RUNNERS:
            result = timed(lambda: RUNNERS[kind](model, args, method))
            result["relative_error"] = relative_error(model, args)
        else:
            result = timed(lambda: floor(model, args, args.runner))
        if args.save:
            model.save_pretrained(args.save)
    print(json.dumps(result))


def stream(args: argparse.Namespace, method: str) -> None:
    """sparse_ft.prune_checkpoint, directory to directory."""
    from sparse_ft import prune_checkpoint

    calibration = batches(args) if method in ("wanda", "sparsegpt") else None
    with tempfile.TemporaryDirectory(dir=Path(args.model).parent) as directory:
        prune_checkpoint(
            args.model,
            Path(directory) / "out",
            method=method,
            pattern=args.pattern or "unstructured",
            sparsity=args.sparsity,
            calibration=calibration,
            progress=False,
        )


def timed(work: Callable[[], None]) -> dict[str, Any]:
    """CPU and wall seconds of `work`, and the process's peak memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """Highest resident memory of this process; unlike ru_maxrss it does not start at that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
