"""An encoder pruned to 2:4 and reconstructed from unlabeled text: masked-token loss dense, pruned, reconstructed.

    python tests/benchmarks/quality_encoder.py             # about a quarter of an hour, most of it training the encoder

A small BERT is trained from its config by masked-language modelling on WikiText-2 (15% of the tokens chosen; of them
80% masked, 10% random, 10% kept) and kept in `--cache`. It is pruned 2:4 by magnitude and reconstructed window by
window from 128 sequences of plain training text, without labels. The loss is the mean over the chosen tokens of the
test split, chosen by one seed for all rows; `gap_closed` is the share of the loss between pruned and dense won back.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from quality import ROOT, Table, arguments
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from sparse_ft import prune, reconstruct
from sparse_ft.data import load_text, random_windows, tokenize, windows
from sparse_ft.masks import MaskSet
from sparse_ft.models import load_tokenizer

LENGTH, BATCH, STEPS, TEST_WINDOWS, SAMPLES = 128, 16, 1500, 400, 128
GRANULARITIES = ("linear", "attn_mlp", "block")
FIRST, LEARNING_RATES = "attn_mlp", (1e-3, 3e-3, 6e-3, 1.2e-2)  # the rates are compared at this granularity
SPLITS = ("train", "validation", "test")


def make_tokenizer(directory: str) -> PreTrainedTokenizerBase:
    """The causal model's byte-level BPE with a mask token."""
    tokenizer = load_tokenizer(directory)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": tokenizer.pad_token or "<pad>"})
    return tokenizer


def train_encoder(tokenizer: PreTrainedTokenizerBase, ids: Tensor, directory: Path) -> None:
    """Masked-language modelling from scratch."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,  # about one epoch: there is nothing to regularise
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as run:
        options = TrainingArguments(
            output_dir=run,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=STEPS // 20,
            adam_beta2=0.98,
            weight_decay=0.01,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=100,
            report_to="none",
            seed=0,
            disable_tqdm=True,
        )
        model = BertForMaskedLM(config)
        data = Dataset.from_dict({"input_ids": windows(ids, LENGTH)})
        Trainer(
            model=model,
            args=options,
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        ).train()
    model.save_pretrained(directory)


def masked_batches(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[dict[str, Tensor]]:
    """The test windows with their tokens chosen once, 40 to a batch."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    rows = [{"input_ids": row} for row in windows(ids, LENGTH)[:TEST_WINDOWS]]
    return [collator(rows[start : start + 40]) for start in range(0, len(rows), 40)]


@torch.no_grad()
def masked_token_loss(model: BertForMaskedLM, batches: list[dict[str, Tensor]]) -> float:
    """Mean cross-entropy in nats over the chosen tokens, fp32."""
    total, count = 0.0, 0
    for batch in batches:
        chosen = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * chosen
        count += chosen
    return total / count


def main() -> None:
    """Train once, then one row per state of the model."""
    parser = arguments("perp/encoder", __doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "encoder", help="where the encoder is kept")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.model)
    ids = {split: tokenize(load_text(args.dataset, split=split), tokenizer) for split in SPLITS}
    if not (args.cache / "config.json").is_file():
        train_encoder(tokenizer, ids["train"], args.cache)
    batches = {split: masked_batches(tokenizer, ids[split]) for split in SPLITS[1:]}
    calibration = list(random_windows(ids["train"], count=SAMPLES, length=LENGTH, seed=0).split(16))
    protocol = {
        "model": "BERT, 6 layers of 256, trained here",
        "training": f"{STEPS} steps of {BATCH} x {LENGTH} tokens",
        "evaluation": f"15% of the tokens of at most {TEST_WINDOWS} windows of {LENGTH} tokens, fp32",
        "reconstruction": f"{SAMPLES} x {LENGTH} training tokens, one epoch",
        "learning rates": "best validation loss of the grid at granularity attn_mlp",
    }
    keys = ("model", "learning_rate", "seed")
    table = Table(args.output, "tests/benchmarks/quality_encoder.py", protocol=protocol, keys=keys, force=args.force)

    def load() -> BertForMaskedLM:
        return BertForMaskedLM.from_pretrained(args.cache).eval()

    def losses(model: BertForMaskedLM) -> dict[str, float]:
        validation, test = (masked_token_loss(model, batches[split]) for split in SPLITS[1:])
        return {"validation_loss": round(validation, 4), "masked_token_loss": round(test, 4)}

    def halved() -> tuple[BertForMaskedLM, MaskSet]:
        model = load()
        return model, prune(model, method="magnitude", pattern="2:4", progress=False)

    def rebuilt(granularity: str, rate: float) -> dict[str, Any]:
        model, masks = halved()
        options = {"granularity": granularity, "learning_rate": rate, "progress": False}
        start = time.process_time()
        reconstruct(model, masks, load(), calibration=calibration, **options)
        seconds = time.process_time() - start
        masks.verify(model)
        found = losses(model)
        lost, won = (pruned["masked_token_loss"] - loss["masked_token_loss"] for loss in (dense, found))
        return {
            **found,
            "sparsity": masks.sparsity(),
            "gap_closed": round(won / lost, 4),
            "cpu_seconds": round(seconds, 1),
        }

    def row(model: str, rate: float | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return table.row({"model": model, "learning_rate": rate, "seed": 0}, measure)

    dense = row("dense", None, lambda: {**losses(load()), "sparsity": 0.0})
    pruned = row("pruned 2:4 by magnitude", None, lambda: {**losses(halved()[0]), "sparsity": 0.5})
    grid = [row(f"reconstructed, {FIRST}", rate, lambda rate=rate: rebuilt(FIRST, rate)) for rate in LEARNING_RATES]
    rate = min(grid, key=lambda found: float(found["validation_loss"]))["learning_rate"]
    for granularity in GRANULARITIES:
        row(f"reconstructed, {granularity}", rate, lambda granularity=granularity: rebuilt(granularity, rate))


if __name__ == "__main__":
    main()
