"""Tiny sparse models and short real `Trainer` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights

SparseModel = Callable[..., tuple[PreTrainedModel, MaskSet]]


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`count` rows of random token ids, labels equal to the ids."""

    def __init__(self, model: PreTrainedModel, count: int, length: int = 12) -> None:
        self.batch = tiny_batch(model, batch=count, length=length, seed=1)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.batch.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors of this size, and one gives the same rounding on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sparse_model() -> SparseModel:
    """`sparse_model("llama", 0.6)`: a tiny model pruned by magnitude, and its masks."""

    def make(name: str = "llama", sparsity: float = 0.6, seed: int = 0) -> tuple[PreTrainedModel, MaskSet]:
        model = TINY[name](seed)
        weights, targets = named_weights(model), find_targets(model)
        masks = MaskSet.from_scores(
            {t.name: weights[t.name].detach().abs() for t in targets},
            sparsity=sparsity,
            input_dims={t.name: t.input_dim for t in targets},
        )
        masks.apply_(model)
        return model, masks

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A `Trainer` on the CPU over random rows: 6 steps of 2 rows at a high learning rate unless told otherwise."""

    def make(
        model: PreTrainedModel,
        callbacks: Sequence[Any] = (),
        *,
        rows: int = 32,
        optimizers: Any = (None, None),
        **more: Any,
    ) -> Trainer:
        arguments = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **more,
        }
        data = Rows(model, rows)
        return Trainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=data,
            eval_dataset=Rows(model, 4),
            callbacks=list(callbacks),
            optimizers=optimizers,
        )

    return make
