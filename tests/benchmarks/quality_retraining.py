"""Recovery by retraining: masked full fine-tuning, MaskLoRA and ordinary LoRA after magnitude pruning.

    python tests/benchmarks/quality_retraining.py          # about an hour on one core; resumes where it stopped

Every cell prunes a fresh copy by magnitude, trains the stated number of steps of 12 x 256 tokens with AdamW (no weight
decay, 10% warm-up, linear decay, bf16 autocast), merges adapters, verifies the zeros and evaluates the merged model.
`gap_closed` is the share of the log-perplexity between pruned and dense that retraining recovered.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from quality import PROTOCOL, SEQUENCE_LENGTH, Bench, Table, arguments
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator

from sparse_ft import MaskCallback, MaskLoraConfig, MaskSet, prune
from sparse_ft.data import windows

# method, pattern, sparsity, steps, seed; seeds, learning rates and the other ways back are in quality_perp.py
CELLS: list[tuple[str, str, float | None, int, int]] = [
    ("full", "unstructured", 0.8, 150, 0),
    ("mask_lora", "unstructured", 0.8, 150, 0),
    ("lora", "unstructured", 0.8, 150, 0),
    ("full", "1:4", None, 150, 0),
    ("mask_lora", "1:4", None, 150, 0),
    ("lora", "1:4", None, 150, 0),
    ("full", "unstructured", 0.8, 500, 0),
    ("mask_lora", "unstructured", 0.8, 500, 0),
]
# Of full and mask_lora the best of the grids in quality_perp.py, chosen on the validation split.
LEARNING_RATE = {"full": 5e-4, "mask_lora": 4e-3, "lora": 2e-3}
RANK, ALPHA, BATCH = 16, 32, 12


def train(
    model: PreTrainedModel, ids: torch.Tensor, masks: MaskSet, method: str, steps: int, seed: int, learning_rate: float
) -> None:
    """Train `model` (a PeftModel for adapters) in place with the plain Trainer."""
    blocks = windows(ids, SEQUENCE_LENGTH)
    dataset = Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")
    with tempfile.TemporaryDirectory() as directory:
        options = TrainingArguments(
            output_dir=directory,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=steps // 10,
            weight_decay=0.0,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            seed=seed,
            disable_tqdm=True,
        )
        callbacks = [MaskCallback(masks)] if method == "full" else []
        Trainer(
            model=model,
            args=options,
            train_dataset=dataset,
            data_collator=default_data_collator,
            callbacks=callbacks,
        ).train()


def adapted(model: PreTrainedModel, masks: MaskSet, method: str) -> Any:
    """The model with the method's adapter, or the model itself."""
    torch.manual_seed(0)
    if method == "mask_lora":
        return get_peft_model(model, MaskLoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="pruned", masks=masks))
    if method == "lora":
        modules = [name.removesuffix(".weight") for name in masks]
        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules))
    return model


def measured_sparsity(model: PreTrainedModel, masks: MaskSet) -> float:
    """Share of exact zeros in the pruned tensors, counted in the weights."""
    tensors = [weight for _, weight in masks.weights_in(model)]
    return sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors)


def measure(bench: Bench, method: str, pattern: dict[str, Any], steps: int, seed: int, dense: float) -> dict[str, Any]:
    """Prune, train, merge, evaluate."""
    model = bench.load()
    masks = prune(model, method="magnitude", **pattern, progress=False)
    pruned = bench.perplexity(model)
    wrapped = adapted(model, masks, method)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    train(wrapped, bench.train, masks, method, steps, seed, LEARNING_RATE[method])
    if method != "full":
        model = wrapped.merge_and_unload()
    if method != "lora":
        masks.verify(model)
    after = bench.perplexity(model.eval())
    return {
        "learning_rate": LEARNING_RATE[method],
        "trainable_parameters": trainable,
        "pruned_perplexity": round(pruned, 3),
        "perplexity": round(after, 3),
        "gap_closed": round(math.log(pruned / after) / math.log(pruned / dense), 4),
        "merged_sparsity": round(measured_sparsity(model, masks), 6),
    }


def main() -> None:
    """Run all cells."""
    args = arguments("retraining/llama_wt2", __doc__.splitlines()[0]).parse_args()
    bench = Bench(args.model, args.dataset)
    protocol = {**PROTOCOL, "training": f"AdamW, {BATCH} x {SEQUENCE_LENGTH} tokens a step, r={RANK}, alpha={ALPHA}"}
    keys = ("method", "pattern", "sparsity", "steps", "seed")
    table = Table(args.output, "tests/benchmarks/quality_retraining.py", protocol=protocol, keys=keys, force=args.force)
    dense_key = {"method": "dense", "pattern": "dense", "sparsity": 0.0, "steps": 0, "seed": 0}
    dense = table.row(dense_key, lambda: {"perplexity": round(bench.perplexity(bench.load()), 3)})["perplexity"]
    for method, pattern, sparsity, steps, seed in CELLS:
        if args.only and method not in args.only:
            continue
        key = {"method": method, "pattern": pattern, "sparsity": sparsity, "steps": steps, "seed": seed}
        shape = {"pattern": pattern, "sparsity": sparsity}
        table.row(key, lambda m=method, p=shape, n=steps, s=seed: measure(bench, m, p, n, s, dense))


if __name__ == "__main__":
    main()
