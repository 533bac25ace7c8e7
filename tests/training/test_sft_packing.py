"""TRL's `SFTTrainer` with packed sequences of text: it learns, and every zero stays."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import VOCABULARY
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from training.steps import AtEachStep, pruned_are_positive_zero
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.masks import MaskSet
from sparse_ft.training import MaskCallback

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]
LENGTH = 24


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    fast = Tokenizer(WordLevel(words, unk_token="<pad>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def texts() -> Dataset:
    """Counting by one from a random number: easy to learn. Of many lengths, so that packing has something to do."""
    draw = random.Random(0)
    rows = []
    for _ in range(96):
        start = draw.randrange(3, VOCABULARY - 16)
        rows.append(" ".join(f"w{start + i}" for i in range(draw.randrange(3, 14))))
    return Dataset.from_dict({"text": rows})


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.parametrize("method", ["full", "mask_lora"])
def test_packed_text_is_learned_and_every_zero_stays(
    method: str,
    strategy: str,
    sparse_model: SparseModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Dataset,
    tmp_path: Path,
) -> None:
    model, masks = sparse_model()
    exact: list[bool] = []
    extra: dict[str, Any] = {}
    if method == "mask_lora":
        extra["peft_config"] = MaskLoraConfig(r=8, masks=masks, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            packing=True,
            packing_strategy=strategy,
            max_length=LENGTH,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
        callbacks=[
            MaskCallback(masks),
            AtEachStep(lambda model: exact.append(pruned_are_positive_zero(model, masks))),
        ],
        **extra,
    )
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert len(lengths) < len(texts) and max(lengths) == LENGTH, "nothing was packed"
    trainer.train()
    assert exact == [True] * 30
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) / 5 < 0.7 * sum(losses[:2]) / 2
    trained = trainer.model.merge_and_unload() if isinstance(trainer.model, PeftModel) else trainer.model
    masks.verify(trained)
    assert pruned_are_positive_zero(trained, masks)
    with torch.no_grad():
        ids = torch.tensor([list(range(20, 30))])
        assert float(trained.eval()(input_ids=ids, labels=ids).loss) < losses[0], "the merged model has learned it too"
