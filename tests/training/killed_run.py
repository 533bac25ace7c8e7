"""A short masked fine-tune that can kill its own process at a named moment: `python killed_run.py DIRECTORY MOMENT`.

MOMENT is one of `MOMENTS`; every one of them strikes at the save of step 4 or in the step after it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights
from sparse_ft.training import MaskCallback

MOMENTS = (
    "training",
    "half the weights",
    "weights only",
    "half the optimizer",
    "half the state",
    "before older checkpoints go",
    "before the masks",
)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """24 rows of random token ids."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 64, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


class Killer(TrainerCallback):
    """Comes before MaskCallback, so its `on_save` strikes when the Trainer has written all and MaskCallback nothing."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moment == "training" and state.global_step == 4:
            die()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.moment == "before the masks" and state.global_step == 4:
            die()


class DyingTrainer(Trainer):
    """A Trainer that dies between or inside the files of checkpoint-4."""

    moment = ""

    def _strikes(self, moment: str) -> bool:
        return self.moment == moment and self.state.global_step == 4

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._strikes("half the weights"):
            halve(Path(str(output_dir)) / "model.safetensors")
            die()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._strikes("weights only"):
            die()
        super()._save_optimizer_and_scheduler(output_dir)
        if self._strikes("half the optimizer"):
            halve(Path(output_dir) / "optimizer.pt")
            die()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._strikes("half the state") or self._strikes("before older checkpoints go"):
            self.args.save_total_limit = None  # the older checkpoint is still there when the state is being written
            super()._save_checkpoint(model, trial)
            if self.moment == "half the state":
                halve(Path(str(self.args.output_dir)) / "checkpoint-4" / "trainer_state.json")
            die()
        super()._save_checkpoint(model, trial)


def sparse_model() -> tuple[LlamaForCausalLM, MaskSet]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        attention_dropout=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weights = named_weights(model)
    scores = {target.name: weights[target.name].detach().abs() for target in find_targets(model)}
    return model, MaskSet.from_scores(scores, sparsity=0.6).apply_(model)


def run(directory: str | Path, *, moment: str = "", resume: str | None = None) -> LlamaForCausalLM:
    """Train 8 steps (over an epoch's end), saving at 2, 4, 6, 8 and keeping one checkpoint; returns the model."""
    torch.set_num_threads(1)
    model, masks = sparse_model()
    trainer = DyingTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(directory),
            use_cpu=True,
            max_steps=8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.1,
            warmup_steps=2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Rows(),
        callbacks=[Killer(moment), MaskCallback(masks)],
    )
    trainer.moment = moment
    trainer.train(resume_from_checkpoint=resume)
    return model


if __name__ == "__main__":
    run(sys.argv[1], moment=sys.argv[2])
