"""`sparse-ft demo`: the whole story on one small model, offline, in a few minutes on two CPU cores.

    dense → magnitude, Wanda and SparseGPT at 2:4, 60% and 80% → MaskLoRA → merge → verified files, table and report

The text is the docstrings of Python's standard library and the model a small Llama trained on them, once; both are kept
in the user's cache. `--model_name_or_path` and `--dataset` tell the same story about your own. Beside MaskLoRA an
ordinary LoRA is trained for as long, to show what merging it does to the zeros.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.checkpoints import atomic_directory, check_output_dir, copy_side_files, resolve_checkpoint, versions
from sparse_ft.cli.arguments import DemoArguments, parse
from sparse_ft.cli.demo_model import bf16_is_faster, demo_corpus, demo_model
from sparse_ft.cli.demo_training import train
from sparse_ft.cli.measuring import EvalText, choose_device, choose_length, find_split, load_checked
from sparse_ft.cli.publishing import Outcome, command_line, plain_arguments, print_comparison, publish
from sparse_ft.data import calibration_batches, tokenize, training_dataset
from sparse_ft.evaluation import (
    REPORT_HTML,
    ComparisonRow,
    EvaluationProtocol,
    ReportData,
    mask_sample,
    perplexity,
    sparsity_table,
    sparsity_totals,
    write_comparison,
)
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_config, load_tokenizer
from sparse_ft.pruning import prune
from sparse_ft.training import MaskCallback

__all__ = ["PATTERNS", "run"]

GROUPS = (DemoArguments,)
# What is pruned to: its name, and the arguments of `prune`.
PATTERNS: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "60%": {"pattern": "unstructured", "sparsity": 0.6},
    "80%": {"pattern": "unstructured", "sparsity": 0.8},
}
LAST = list(PATTERNS)[-1]  # here the ordinary LoRA is trained too, and this is what the report's details are about
LABELS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
START = "magnitude"  # what is retrained: the plainest way to prune
MARKER = "demo.txt"  # its presence says that a directory was made by the demo and may be replaced by the next
ABOUT = "Made by `sparse-ft demo`; the next demo in the same place replaces this directory.\n"


@dataclass
class Stage:
    """Everything the demo works with, and what it has found so far.

    Attributes:
        how: the options.
        source: directory of the dense model.
        eval_text: test text.
        calibration: batches for Wanda and SparseGPT.
        train_data: blocks for retraining.
        length: tokens per sequence.
        device: where models run.
        autocast: dtype to compute in; None is the weights' own, fp32.
        started: clock at the start.
        rows: results.
        entries: perplexities with their protocols, by (group, label).
        histories: training logs by name of the run.
    """

    how: DemoArguments
    source: Path
    eval_text: EvalText
    calibration: list[dict[str, torch.Tensor]]
    train_data: Any
    length: int
    device: torch.device
    autocast: torch.dtype | None
    started: float
    rows: list[ComparisonRow] = field(default_factory=list)
    entries: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """A line of progress with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def fresh(self) -> PreTrainedModel:
        """The dense model in fp32, loaded again."""
        return load_checked(self.source, dtype=torch.float32, device=self.device)

    def add(
        self,
        model: nn.Module,
        label: str,
        group: str,
        kind: str,
        masks: MaskSet | None,
        seconds: float,
        start: str = "",
    ) -> ComparisonRow:
        """Measure a model and add it to the results."""
        result = perplexity(
            model,
            self.eval_text.ids,
            sequence_length=self.length,
            max_windows=self.how.eval_windows,
            batch_size=16,
            dtype=self.autocast,
            dataset=self.eval_text.dataset,
            split=self.eval_text.split,
            progress=False,
        )
        total = sparsity_totals(sparsity_table(masks, model))["all"] if masks is not None else None
        row = ComparisonRow(
            label=label,
            group=group,
            kind=kind,
            sparsity=total.sparsity if total else 0.0,
            perplexity=result.perplexity,
            revived=total.revived if total else None,
            start=start,
            seconds=seconds,
        )
        self.rows.append(row)
        self.entries[group, label] = result.to_dict(label=label.split(",")[0], kind=kind)
        self.say(f"{f'{group} ' if group else ''}{label}: perplexity {result.perplexity:.1f}, {row.sparsity:.2%} zeros")
        return row


def run(argv: Sequence[str]) -> int:
    """Run the demo; the exit code."""
    (how,) = parse(argv, GROUPS, verb="demo", description="Prune a small model, recover it, and look at the result.")
    output_dir = Path(how.output_dir)
    inputs = [place for place in (how.model_name_or_path, how.dataset) if place]
    overwrite = (output_dir / MARKER).is_file()
    check_output_dir(output_dir, inputs=inputs, overwrite=overwrite)
    disable_progress_bar()
    stage = _set_up(how)
    with atomic_directory(output_dir, overwrite=overwrite) as directory:
        masks = {}
        for group in PATTERNS:
            masks[group] = _prune(stage, group)
            _recover(stage, group, masks[group], directory, argv)
        _show_ordinary_lora(stage, LAST, masks[LAST])
        _write_report(stage, directory, masks, argv)
        (directory / MARKER).write_text(ABOUT, encoding="utf-8")
    print_comparison(stage.rows)
    for group in PATTERNS:
        print(f"\n{output_dir / _folder(group)}  verified: every pruned weight is zero in the files", end="")
    print(f"\n{output_dir / REPORT_HTML}  ({time.monotonic() - stage.started:.0f} s in all)")
    return 0


def _set_up(how: DemoArguments) -> Stage:
    """Text, tokenizer and dense model; made on first use when they are the demo's own."""
    started = time.monotonic()
    device = choose_device(None)
    autocast = torch.bfloat16 if bf16_is_faster() else None
    if how.dataset is None:
        print("Text: docstrings of Python's standard library (kept in the cache).", flush=True)
    dataset = str(demo_corpus()) if how.dataset is None else how.dataset
    if how.model_name_or_path is None:
        print("Model: a small Llama, trained on first use (about two minutes) and kept in the cache.", flush=True)
    source = resolve_checkpoint(how.model_name_or_path) if how.model_name_or_path else demo_model(Path(dataset))
    tokenizer = load_tokenizer(source)
    length = min(how.sequence_length, choose_length(None, load_config(source), tokenizer))
    texts: dict[str, Any] = {"config": how.dataset_config, "text_field": how.text_field}
    found, split = find_split(dataset, None, **texts)
    name = "docstrings" if how.dataset is None else dataset
    stage = Stage(
        how=how,
        source=source,
        eval_text=EvalText(tokenize(found, tokenizer), name, split),
        calibration=calibration_batches(
            dataset, tokenizer, samples=how.samples, sequence_length=length, seed=how.seed, **texts
        ),
        train_data=training_dataset(dataset, tokenizer, sequence_length=length, **texts),
        length=length,
        device=device,
        autocast=autocast,
        started=started,
    )
    model = stage.fresh()
    stage.say(f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    stage.add(model, "dense", "", "dense", None, 0.0)
    return stage


def _prune(stage: Stage, group: str) -> MaskSet:
    """Every method at one pattern; the masks of the one that is retrained."""
    masks: dict[str, MaskSet] = {}
    for method, label in LABELS.items():
        model = stage.fresh()
        start = time.monotonic()
        masks[method] = prune(
            model,
            method=method,
            calibration=stage.calibration,
            indivisible="dense_tail",
            seed=stage.how.seed,
            **PATTERNS[group],
        )
        stage.add(model, label, group, "pruned", masks[method], time.monotonic() - start)
    return masks[START]


def _recover(stage: Stage, group: str, masks: MaskSet, directory: Path, argv: Sequence[str]) -> None:
    """Train MaskLoRA on the pruned model, merge it, and write a sparse checkpoint that was verified in its files."""
    config = MaskLoraConfig(r=stage.how.r, masks=masks, task_type="CAUSAL_LM")
    model, seconds = _train_adapter(stage, f"MaskLoRA {group}", masks, config, [MaskCallback(masks)])
    stage.add(model, f"{LABELS[START]} + MaskLoRA, merged", group, "merged", masks, seconds, LABELS[START])
    place = directory / _folder(group)
    stored = load_checked(stage.source).dtype
    model.to(stored).save_pretrained(place)
    for name in ("config.json", "generation_config.json"):
        (place / name).unlink(missing_ok=True)
    copy_side_files(stage.source, place)
    keys = [("", "dense"), (group, LABELS[START]), (group, stage.rows[-1].label)]
    outcome = Outcome(
        verb="demo",
        argv=argv,
        model=_model_name(stage),
        method=f"{LABELS[START]} + MaskLoRA",
        arguments=plain_arguments(stage.how),
        evaluations=[stage.entries[key] for key in keys],
        histories={"MaskLoRA": stage.histories[f"MaskLoRA {group}"]},
    )
    publish(place, masks, outcome)


def _show_ordinary_lora(stage: Stage, group: str, masks: MaskSet) -> None:
    """The same training with an ordinary LoRA: merged, every zero is gone."""
    modules = [name.removesuffix(".weight") for name in masks if name.endswith(".weight")]
    config = LoraConfig(r=stage.how.r, lora_alpha=2 * stage.how.r, target_modules=modules, task_type="CAUSAL_LM")
    model, seconds = _train_adapter(stage, f"LoRA {group}", masks, config, [])
    stage.add(model, f"{LABELS[START]} + ordinary LoRA, merged", group, "broken", masks, seconds, LABELS[START])


def _train_adapter(
    stage: Stage, name: str, masks: MaskSet, config: LoraConfig, callbacks: list[TrainerCallback]
) -> tuple[PreTrainedModel, float]:
    """The merged model and the seconds its training took. The start is what `START` pruned: dense weights, masked."""
    stage.say(f"training {name} for {stage.how.retrain_steps} steps")
    start = time.monotonic()
    pruned = stage.fresh()
    masks.apply_(pruned)
    set_seed(stage.how.seed)
    model = get_peft_model(pruned, config)
    stage.histories[name] = train(
        model,
        stage.train_data,
        name,
        steps=stage.how.retrain_steps,
        bf16=stage.autocast is not None,
        device=stage.device,
        callbacks=callbacks,
        per_device_train_batch_size=8,
        learning_rate=stage.how.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        seed=stage.how.seed,
    )
    return model.merge_and_unload(), time.monotonic() - start


def _write_report(stage: Stage, directory: Path, masks: dict[str, MaskSet], argv: Sequence[str]) -> None:
    """The page that puts all models side by side."""
    data = ReportData(
        title="Demo",
        model=_model_name(stage),
        command=command_line("demo", argv),
        rows=sparsity_table(masks[LAST], load_checked(directory / _folder(LAST))),
        method=f"{LABELS[START]} at {LAST}, recovered by MaskLoRA",
        evaluations=[],
        histories={name: log for name, log in stage.histories.items() if name.startswith("MaskLoRA")},
        mask_sample=mask_sample(masks[LAST]),
        arguments=plain_arguments(stage.how)
        | {"protocol": str(EvaluationProtocol(stage.entries["", "dense"]["protocol"]))},
        versions=versions(),
        verdict=_verdict(stage),
    )
    write_comparison(directory, stage.rows, data)


def _verdict(stage: Stage) -> str:
    """What happened, in one sentence."""
    dense = stage.rows[0].perplexity or float("nan")
    of_group = {row.label.split(",")[0]: row for row in stage.rows if row.group == LAST}
    pruned, merged = of_group[LABELS[START]], of_group[f"{LABELS[START]} + MaskLoRA"]
    broken = of_group[f"{LABELS[START]} + ordinary LoRA"]
    return (
        f"Pruning {LAST} by {LABELS[START]} took the perplexity from {dense:.1f} to {pruned.perplexity:.1f}; "
        f"{stage.how.retrain_steps} steps of MaskLoRA brought it to {merged.perplexity:.1f} with {merged.sparsity:.1%} "
        f"zeros in the merged weights, where an ordinary LoRA leaves {broken.sparsity:.1%}."
    )


def _model_name(stage: Stage) -> str:
    return stage.how.model_name_or_path or "demo Llama"


def _folder(group: str) -> str:
    return "recovered-" + group.replace(":", "of").replace("%", "")
