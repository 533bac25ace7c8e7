"""What a teacher costs in a real `Trainer` step: time, memory with large vocabularies, and one made of the student.

    python tests/benchmarks/bench_distill.py         # writes docs/results/distill/{step,memory,self_teacher}.json
    python tests/benchmarks/bench_distill.py --only step --size tiny --rounds 1 --output /tmp/distill  # a smoke run

Models are Llamas from their config, the teacher as large as its student and without gradients; AdamW, clipping at 1.

step: bf16 autocast. Every visit is a `Trainer` of its own on the same student, timed as in `bench_mask_callback`; the
order rotates from round to round. A ratio is the median over rounds of the visit's median step over that of
cross-entropy alone in the same round. The floor is cross-entropy and a forward pass of the teacher's blocks. Peers:
the textbook formula on `output_hidden_states` and on the logits of both models, and the loss of TRL's GKD, which has
no cross-entropy, at its default (beta 0.5) and as forward KL (beta 0).

memory: a step in a process of its own, the second after a short one that makes the optimizer's state. `held_mb` before
it (libraries, student, optimizer), without `teacher_mb`, the teacher's weights; `rise_mb` from there to the peak, and
`ratio` of it to cross-entropy's. A process that needs more than `allowed_mb` beyond its libraries, what the machine has
free but a few GB, is left without a result. A third step of ours is watched tensor by tensor: `largest_share` is the
largest as a share of tokens x vocabulary, and the script fails unless it is below 1, or all logits fit into one chunk.

self_teacher: a MaskLoRA student. `added_share`: bytes of its teacher beyond the student's, of those of the dense model;
`ratio`: its forward pass over that of the dense model, medians over rounds.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_adapters import forget_preparation, peak_resident
from bench_mask_callback import StartClock, StopClock
from results import REPOSITORY, write_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from sparse_ft.distillation import DistillationConfig, distilling, self_teacher
from sparse_ft.distillation.head import LOGITS_PER_CHUNK
from sparse_ft.distillation.self_teacher import self_teacher_bytes
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256),
    "16m": dict(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=8192, tie_word_embeddings=True,
    ),
    "50m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, vocab_size=8192),
    "shallow": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4),
}  # fmt: skip
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
SAFE_MB = 4000  # of the machine's free memory, left to others
DISTILLING = distilling(Trainer)


def llama(size: str, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaForCausalLM:
    """A Llama from its config."""
    config = LlamaConfig(**SIZES[size], max_position_embeddings=1024, use_cache=False, **options)
    return LlamaForCausalLM(config).to(dtype)


# -- what is compared --------------------------------------------------------------------------------------------------


class WithTeacher(Trainer):
    """A Trainer that holds a teacher; its loss is that of a subclass."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)


class Floor(WithTeacher):
    """Cross-entropy, and a forward pass of the teacher's blocks that is thrown away."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own."""
        with torch.no_grad():
            self.teacher.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class Textbook(WithTeacher):
    """The formulas as they are written: all states, and all logits where there is KL."""

    kl, squarehead = True, True

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """CE + KL + the sum of SquareHead over layers."""
        common = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student = model(**inputs, output_hidden_states=self.squarehead)
        with torch.no_grad():
            teacher = self.teacher(**common, output_hidden_states=self.squarehead)
        loss = student.loss
        if self.squarehead:
            keep = inputs["attention_mask"].bool()
            for ours, its in zip(student.hidden_states[1:], teacher.hidden_states[1:], strict=True):
                s, t = ours[keep].float(), its[keep].float()
                loss = loss + (s - t).pow(2).mean() / (t.pow(2).mean() + 2**-7)
        if self.kl:
            keep = inputs["labels"][:, 1:] != -100
            q, p = (F.log_softmax(x.logits[:, :-1][keep].float(), dim=-1) for x in (student, teacher))
            loss = loss + F.kl_div(q, p, log_target=True, reduction="sum") / keep.sum()
        return loss


class TextbookStates(Textbook):
    """Cross-entropy and SquareHead."""

    kl = False


class TextbookLogits(Textbook):
    """Cross-entropy and KL."""

    squarehead = False


class Gkd(WithTeacher):
    """The loss of TRL's GKD without generation."""

    beta = 0.5

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The divergence alone."""
        from trl.experimental.gkd import GKDTrainer

        common = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        student = model(**common).logits
        with torch.no_grad():
            teacher = self.teacher(**common).logits
        return GKDTrainer.generalized_jsd_loss(
            student[:, :-1], teacher[:, :-1], inputs["labels"][:, 1:], beta=self.beta,
            num_items_in_batch=num_items_in_batch,
        )  # fmt: skip


class GkdForward(Gkd):
    """Forward KL."""

    beta = 0.0


def ours(kl: float, squarehead: float) -> Callable[..., Trainer]:
    """The Trainer with a teacher and these weights."""
    config = DistillationConfig(kl_weight=kl, squarehead_weight=squarehead)
    return lambda *args, **kwargs: DISTILLING(*args, distillation=config, **kwargs)


def alone(*args: Any, teacher: nn.Module, **kwargs: Any) -> Trainer:
    """A Trainer without a teacher."""
    return Trainer(*args, **kwargs)


VARIANTS: dict[str, Callable[..., Trainer]] = {
    "CE": alone,
    "floor: CE, teacher's blocks": Floor,
    "SquareHead": ours(0.0, 1.0),
    "KL": ours(1.0, 0.0),
    "KL + SquareHead": ours(1.0, 1.0),
    "textbook SquareHead": TextbookStates,
    "textbook KL": TextbookLogits,
    "textbook KL + SquareHead": Textbook,
    "TRL GKD": Gkd,
    "TRL GKD, forward KL": GkdForward,
}
OURS = ("KL", "KL + SquareHead")  # those that make no tensor of tokens x vocabulary


def arguments(directory: str, **options: Any) -> TrainingArguments:
    """Nothing but training."""
    return TrainingArguments(
        output_dir=directory,
        use_cpu=True,
        learning_rate=1e-4,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


# -- time --------------------------------------------------------------------------------------------------------------


def visit(name: str, args: argparse.Namespace, student: nn.Module, teacher: nn.Module) -> tuple[float, float]:
    """Median wall and CPU seconds of a step; the first is not counted."""
    ids = torch.randint(0, student.config.vocab_size, ((args.steps + 1) * args.batch, args.tokens))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    clock = StopClock()
    with tempfile.TemporaryDirectory() as directory:
        settings = arguments(directory, bf16=True, max_steps=args.steps + 1, per_device_train_batch_size=args.batch)
        callbacks: list[TrainerCallback] = [clock, StartClock(clock)]
        trainer = VARIANTS[name](student, settings, train_dataset=data, callbacks=callbacks, teacher=teacher)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    student.zero_grad(set_to_none=True)
    return statistics.median(clock.wall[1:]), statistics.median(clock.cpu[1:])


def measure_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant."""
    student = llama(args.size)
    teacher = copy.deepcopy(student).to(getattr(torch, args.teacher_dtype))
    names = [name for name in VARIANTS if name in args.variants]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(visit(name, args, student, teacher))
            wall, cpu = seconds[name][-1]
            print(f"round {turn + 1}/{args.rounds} {name}: {wall * 1e3:.0f} ms, CPU {cpu * 1e3:.0f} ms", flush=True)
    rows = []
    for name in names:
        row: dict[str, Any] = {"variant": name}
        for index, column in enumerate(("wall", "cpu")):
            mine, base = ([pair[index] for pair in seconds[which]] for which in (name, "CE"))
            row[f"{column}_ms"] = round(statistics.median(mine) * 1e3, 1)
            row[f"{column}_ratio"] = round(statistics.median(m / b for m, b in zip(mine, base, strict=True)), 3)
            row[f"fastest_{column}_ratio"] = round(min(mine) / min(base), 3)
        rows.append(row)
    return rows


# -- memory ------------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest number of elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what comes out."""
        result = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


class MemoryClock(TrainerCallback):
    """Resident memory before the second step and its peak there; the third step is watched."""

    def __init__(self) -> None:
        self.held, self.peak = 0.0, 0.0
        self.watch, self.watching = Watch(), ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the high-water mark anew."""
        if state.global_step == 1:
            forget_preparation()
            self.held = peak_resident()
        if state.global_step == 2:
            self.watching.enter_context(self.watch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read it."""
        self.watching.close()
        if state.global_step == 2:
            self.peak = peak_resident()


class Lengths(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """A batch of short rows, then batches of long ones."""

    def __init__(self, args: argparse.Namespace, vocabulary: int) -> None:
        self.args, self.vocabulary = args, vocabulary

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for length in (4, self.args.memory_tokens, self.args.memory_tokens):
            for _ in range(self.args.batch):
                row = torch.randint(0, self.vocabulary, (length,))
                yield {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}


def memory_of(name: str, vocabulary: int, autocast: bool, args: argparse.Namespace, pipe: Any) -> None:
    """In a process of its own: send a row, without a rise if memory did not suffice."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    allowed = limit_memory()
    student = llama("shallow", vocab_size=vocabulary)
    teacher = copy.deepcopy(student).to(getattr(torch, args.teacher_dtype))
    weights = 0.0 if name == "CE" else sum(p.nbytes for p in teacher.parameters()) / 2**20
    if name == "CE":
        teacher = nn.Identity()
    clock, row = MemoryClock(), {"allowed_mb": allowed, "teacher_mb": round(weights, 1)}
    with tempfile.TemporaryDirectory() as directory:
        settings = arguments(
            directory,
            bf16=autocast,
            max_steps=3 if name in OURS else 2,
            per_device_train_batch_size=args.batch,
        )
        trainer = VARIANTS[name](
            student, settings, train_dataset=Lengths(args, vocabulary), callbacks=[clock], teacher=teacher
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            pipe.send({**row, "held_mb": None, "rise_mb": None, "largest_share": None})
            return
    values = args.batch * args.memory_tokens * vocabulary
    share = round(clock.watch.largest / values, 4) if name in OURS else None
    held, rise = round(clock.held - weights, 1), round(clock.peak - clock.held, 1)
    pipe.send({**row, "held_mb": held, "rise_mb": rise, "largest_share": share})


def limit_memory() -> int | None:
    """Let an allocation fail before the machine runs out of memory; if it does, end this process, not another.

    Returns:
        MB this process may still take; None where that cannot be told.
    """
    status, free = Path("/proc/self/status"), Path("/proc/meminfo")
    if not (status.is_file() and free.is_file()):
        return None
    available = int(free.read_text().split("MemAvailable:")[1].split()[0]) // 1024
    held = int(status.read_text().split("VmData:")[1].split()[0]) // 1024
    allowed = max(available - SAFE_MB, 0)
    resource.setrlimit(resource.RLIMIT_DATA, ((held + allowed) * 2**20,) * 2)
    Path("/proc/self/oom_score_adj").write_text("1000")
    return allowed


def measure_memory(args: argparse.Namespace, save: Callable[[list[dict[str, Any]]], Any]) -> list[dict[str, Any]]:
    """One row per precision, vocabulary and variant; saved after each."""
    context = multiprocessing.get_context("spawn")
    # What is freed goes back to the system at once: else the heap's own habits are 50 MB of noise.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    rows: list[dict[str, Any]] = []
    for precision in args.precisions:
        for vocabulary in args.vocabularies:
            reference = None
            for name in (n for n in VARIANTS if n in args.variants and not n.startswith("floor")):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=memory_of, args=(name, vocabulary, precision == "bf16", args, sender))
                process.start()
                sender.close()
                row = {"precision": precision, "vocabulary": vocabulary, "variant": name, **receiver.recv()}
                process.join()
                reference = row["rise_mb"] if name == "CE" else reference
                row["ratio"] = round(row["rise_mb"] / reference, 3) if row["rise_mb"] and reference else None
                chunks = args.batch * args.memory_tokens * vocabulary / LOGITS_PER_CHUNK
                if row["largest_share"] is not None and row["largest_share"] >= 1 and chunks > 1:
                    raise SystemExit(f"{name} made a tensor of tokens x vocabulary: {row}")
                rows.append(row)
                print(row, flush=True)
                save(rows)
    return rows


# -- a teacher made of the student -------------------------------------------------------------------------------------


def measure_self_teacher(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per pattern and precision."""
    return [
        {"pattern": pattern, "precision": precision, **self_teacher_row(pattern, precision, args)}
        for pattern in ("unstructured", "2:4")
        for precision in ("bf16", "fp32, bf16 autocast")
    ]


def self_teacher_row(pattern: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes and forward time of one teacher."""
    from peft import get_peft_model

    from sparse_ft import MaskLoraConfig

    dense = llama(args.size, torch.bfloat16 if precision == "bf16" else torch.float32).eval().requires_grad_(False)
    weights = named_weights(dense)
    scores = {target.name: weights[target.name].abs() for target in find_targets(dense)}
    masks = MaskSet.from_scores(scores, pattern=pattern, sparsity=0.5 if pattern == "unstructured" else None)
    student = copy.deepcopy(dense)
    masks.apply_(student)
    student = get_peft_model(student, MaskLoraConfig(r=16, masks=masks))
    teacher = self_teacher(student, masks, dense)
    size = self_teacher_bytes(teacher, student)
    batch = {"input_ids": torch.randint(0, dense.config.vocab_size, (args.batch, args.tokens))}
    times: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
        if not torch.equal(dense(**batch).logits, teacher(**batch).logits):
            raise SystemExit("The teacher made of the student does not compute what the dense model does.")
        for turn in range(2 * args.rounds * args.steps):
            model = (dense, teacher)[turn % 2]
            wall, cpu = time.perf_counter(), time.process_time()
            model.model(**batch)
            times[turn % 2].append((time.perf_counter() - wall, time.process_time() - cpu))
    row: dict[str, Any] = {
        "dense_mb": round(size.dense / 2**20, 2),
        "pruned_values_mb": round(size.pruned_values / 2**20, 2),
        "copied_mb": round(size.copied / 2**20, 2),
        "added_share": round(size.share, 4),
    }
    for index, column in enumerate(("wall", "cpu")):
        plain, shared = ([pair[index] for pair in times[which]] for which in (0, 1))
        row[f"dense_{column}_ms"] = round(statistics.median(plain) * 1e3, 1)
        row[f"{column}_ratio"] = round(statistics.median(s / p for s, p in zip(shared, plain, strict=True)), 3)
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """The rows as text."""
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for cells in [columns, *([str(row[column]) for column in columns] for row in rows)]:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def main() -> None:
    """Parse the arguments; measure, print and write each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("step", "memory", "self_teacher"))
    parser.add_argument("--size", choices=[size for size in SIZES if size != "shallow"], default="50m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a row, in step and self_teacher")
    parser.add_argument("--memory-tokens", type=int, default=1024, help="of a row, in memory")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["bf16", "fp32"])
    parser.add_argument("--teacher-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each with one visit of every variant")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a visit")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output", default=str(REPOSITORY / "docs/results/distill"), help="directory")
    args = parser.parse_args()
    if "CE" not in args.variants:
        parser.error("the variants must include CE, the reference")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    logging.set_verbosity_error()
    protocol = {k: v for k, v in vars(args).items() if k not in ("output", "seed", "only")}
    for part in args.only or ("step", "memory", "self_teacher"):

        def save(rows: list[dict[str, Any]], part: str = part) -> None:
            write_result(Path(args.output) / f"{part}.json", __file__, rows, protocol, [args.seed])

        if part == "memory":
            rows = measure_memory(args, save)
        else:
            rows = {"step": measure_step, "self_teacher": measure_self_teacher}[part](args)
        save(rows)
        print(f"\n{part}")
        print_table(rows)


if __name__ == "__main__":
    main()
