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

LENGTH, BATCH, STEPS, TEST_WINDOWS, SAMPLES = 128, 32, 1500, 400, 128
GRANULARITIES = ("linear", "attn_mlp", "block")


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
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as run:
        options = TrainingArguments(
            output_dir=run,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=STEPS // 10,
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
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.model)
    train, test = (tokenize(load_text(args.dataset, split=split), tokenizer) for split in ("train", "test"))
    if not (args.cache / "config.json").is_file():
        train_encoder(tokenizer, train, args.cache)
    batches = masked_batches(tokenizer, test)
    calibration = list(random_windows(train, count=SAMPLES, length=LENGTH, seed=0).split(16))
    protocol = {
        "model": "BERT, 6 layers of 256, trained here",
        "training": f"{STEPS} steps of {BATCH} x {LENGTH} tokens",
        "evaluation": f"15% of the tokens of {TEST_WINDOWS} windows of {LENGTH} test tokens, fp32",
        "reconstruction": f"{SAMPLES} x {LENGTH} training tokens, one epoch, learning rate {args.learning_rate:g}",
    }
    table = Table(
        args.output, "tests/benchmarks/quality_encoder.py", protocol=protocol, keys=("model", "seed"), force=args.force
    )

    def load() -> tuple[BertForMaskedLM, MaskSet]:
        model = BertForMaskedLM.from_pretrained(args.cache).eval()
        return model, prune(model, method="magnitude", pattern="2:4", progress=False)

    def rebuilt(granularity: str) -> dict[str, Any]:
        model, masks = load()
        dense_model = BertForMaskedLM.from_pretrained(args.cache).eval()
        start = time.process_time()
        reconstruct(
            model,
            masks,
            dense_model,
            calibration=calibration,
            granularity=granularity,
            learning_rate=args.learning_rate,
            progress=False,
        )
        seconds = time.process_time() - start
        masks.verify(model)
        loss = masked_token_loss(model, batches)
        closed = (pruned["masked_token_loss"] - loss) / (pruned["masked_token_loss"] - dense["masked_token_loss"])
        return {
            "masked_token_loss": round(loss, 4),
            "sparsity": masks.sparsity(),
            "gap_closed": round(closed, 4),
            "cpu_seconds": round(seconds, 1),
        }

    dense = table.row(
        {"model": "dense", "seed": 0},
        lambda: {
            "masked_token_loss": round(
                masked_token_loss(BertForMaskedLM.from_pretrained(args.cache).eval(), batches), 4
            ),
            "sparsity": 0.0,
        },
    )
    pruned = table.row(
        {"model": "pruned 2:4 by magnitude", "seed": 0},
        lambda: {"masked_token_loss": round(masked_token_loss(load()[0], batches), 4), "sparsity": 0.5},
    )
    for granularity in GRANULARITIES:
        table.row(
            {"model": f"reconstructed, {granularity}", "seed": 0}, lambda granularity=granularity: rebuilt(granularity)
        )


if __name__ == "__main__":
    main()
