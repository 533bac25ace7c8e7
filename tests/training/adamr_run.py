"""AdamR in two processes, `torchrun --nproc_per_node 2 adamr_run.py DIRECTORY`: the same data in shares.

"ddp" is a Trainer run with a whole model in each process. "held" splits the parameters among the processes, as sharding
does, and adds up s by `reduce`. Each leaves `DIRECTORY/<case>-<process>.safetensors` and the scales of its steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sparse_ft.models import named_weights
from sparse_ft.training import AdamR, adamr_groups


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of random token ids, the same in every process."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 64, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Scales(TrainerCallback):
    """Notes s after each step."""

    def __init__(self, optimizer: AdamR) -> None:
        self.optimizer, self.seen = optimizer, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.optimizer.scale)


def run_ddp(directory: Path, together: int) -> tuple[dict[str, Tensor], list[float]]:
    """Four steps of two micro-batches, taken by two processes or, with `together=2`, by one: weights and scales."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = AdamR(adamr_groups(model, model), lr=1e-2, decay=0.5)
    scales = Scales(optimizer)
    arguments = TrainingArguments(
        output_dir=str(directory), use_cpu=True, max_steps=4, per_device_train_batch_size=2, save_strategy="no",
        gradient_accumulation_steps=together, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=[scales]).train()
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}, scales.seen


def run_held(process: int, processes: int) -> tuple[dict[str, Tensor], list[float]]:
    """Three steps on the tensors that belong to this process: weights and scales."""
    generator = torch.Generator().manual_seed(0)
    every = {f"w{i}": torch.randn(4 + i, 3, generator=generator) for i in range(5)}
    mine = {name: nn.Parameter(w) for i, (name, w) in enumerate(every.items()) if i % processes == process}

    def add_up(values: Tensor) -> Tensor:
        if processes > 1:
            torch.distributed.all_reduce(values)
        return values

    optimizer, scales = AdamR(mine.values(), lr=0.05, decay=0.7, reduce=add_up), []
    for _ in range(3):
        gradients = {name: torch.randn(w.shape, generator=generator) for name, w in every.items()}
        for name, weight in mine.items():
            weight.grad = gradients[name]
        optimizer.step()
        scales.append(optimizer.scale)
    return {name: weight.detach() for name, weight in mine.items()}, scales


def main(directory: Path) -> None:
    """Both cases."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    weights, scales = run_ddp(directory / "run", together=1)
    save_file(weights, directory / f"ddp-{rank}.safetensors")
    held, held_scales = run_held(rank, 2)
    save_file(held, directory / f"held-{rank}.safetensors")
    (directory / f"{rank}.json").write_text(json.dumps({"ddp": scales, "held": held_scales}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
