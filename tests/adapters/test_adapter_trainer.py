"""Masked adapters under Trainer: checkpoints carry the masks, and resuming continues the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters.saved_adapter import Saved, files
from adapters.sparse_models import train
from peft import get_peft_model
from tiny_models import tiny_batch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sparse_ft.masks import MASKS_FILE, MaskSet


class Examples(torch.utils.data.Dataset):
    """Eight fixed sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        batch = tiny_batch(model, batch=8)
        self.rows = [{key: value[i] for key, value in batch.items()} for i in range(8)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def trainer(
    saved: Saved,
    output_dir: Path,
    *,
    masks: MaskSet | None = None,
    base: PreTrainedModel | None = None,
    **options: object,
) -> Trainer:
    model = base if base is not None else saved.load_base()
    torch.manual_seed(7)
    peft_model = get_peft_model(model, saved.config(masks=masks or saved.masks, task_type="CAUSAL_LM", **options))
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model=peft_model, args=arguments, train_dataset=Examples(model))


@pytest.mark.parametrize(
    ("method", "name", "options"),
    [
        ("mask_lora", "llama", {}),
        ("mask_lora", "mixtral", {"dense_modules": ["lm_head"]}),
        ("scale_lora", "gpt2", {"break_symmetry": True}),
        ("lora_prune", "opt", {"lora_dropout": 0.1}),
    ],
)
def test_checkpoints_carry_the_masks_and_resume_exactly(
    tmp_path: Path, method: str, name: str, options: dict[str, object]
) -> None:
    saved = Saved(tmp_path / "saved", name, method)
    straight = trainer(saved, tmp_path / "run", **options)
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert MASKS_FILE in files(checkpoint)
    resumed = trainer(saved, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, found = straight.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    saved.masks.verify(resumed.model.merge_and_unload())


def test_trainer_does_not_resume_with_other_masks_or_another_base(tmp_path: Path) -> None:
    saved = Saved(tmp_path / "saved")
    trainer(saved, tmp_path / "run").train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    fewer = MaskSet({name: saved.masks[name] & (torch.rand(saved.masks.shape(name)) > 0.1) for name in saved.masks})
    pruned_again = saved.load_base()
    fewer.apply_(pruned_again)
    changed = saved.load_base()
    train(changed, steps=1)
    saved.masks.apply_(changed)
    for masks, base in ((fewer, pruned_again), (saved.masks, changed)):
        resumed = trainer(saved, tmp_path / "resumed", masks=masks, base=base)
        with pytest.raises(RuntimeError, match="saved with another mask or another base model"):
            resumed.train(resume_from_checkpoint=checkpoint)
