"""Two processes learn from a teacher, `torchrun --nproc_per_node 2 two_learn.py DIRECTORY`, and the same in one.

Every case leaves `DIRECTORY/<case>/<process>.safetensors`, final weights and the gradients of the first step, and
`<process>.json`, the logs. `run_case` is also called by the tests, in one process that takes the micro-batches in turn.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapters.sparse_models import pruned, snapshot
from distillation.runs import Rows, Run, lively, train, without_dropout
from safetensors.torch import save_file

from sparse_ft.adapters import prepare_perp
from sparse_ft.distillation import DistillationConfig
from sparse_ft.masks import MaskSet
from sparse_ft.training import MaskCallback

BOTH = DistillationConfig(
    ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0, energy="fixed", energy_samples=5
)
RATIOS = DistillationConfig(ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0)
LENGTHS = (5, 14, 4, 20, 9, 12, 6, 3, 17, 8, 8, 4)


@dataclass(frozen=True)
class Case:
    """What is trained, on what."""

    family: str = "llama"
    method: str = "full"
    config: DistillationConfig = field(default_factory=lambda: BOTH)
    means: bool = False  # the model does not take the number of labels of a step: micro-batches have means
    some_masked: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


UNUSED = {"ddp_find_unused_parameters": True}
USED = {"ddp_find_unused_parameters": False}
APART = "every process for itself"
CASES = {
    "full": Case(arguments=USED),
    "full, find unused": Case(arguments=UNUSED),
    "full, ratios": Case(config=RATIOS),
    "tied": Case("qwen", arguments=USED),
    "mask_lora": Case(method="mask_lora", arguments=USED),
    "mask_lora, find unused": Case(method="mask_lora+norms", arguments=UNUSED),
    "states alone": Case(config=DistillationConfig(squarehead_weight=0.5, energy="fixed"), arguments=USED),
    "means": Case(means=True),
    "encoder-decoder": Case("t5", arguments=USED),
    "some masked": Case(some_masked=True, arguments={"per_device_train_batch_size": 1}),
    APART: Case(config=RATIOS, arguments={"average_tokens_across_devices": False, "max_steps": 1}),
}


class HalfMasked(Rows):
    """Rows of which every third has no label."""

    def __init__(self) -> None:
        super().__init__(LENGTHS)
        for row in self.rows[::3]:
            row["labels"] = torch.full_like(row["labels"], -100)


def models(case: Case) -> tuple[Any, Any, MaskSet]:
    """Student, teacher and masks."""
    student, masks = pruned(lively(case.family))
    if case.method != "full":
        torch.manual_seed(0)
        student = without_dropout(prepare_perp(student, case.method, masks, r=4))
    if case.means:
        student.accepts_loss_kwargs = False
    return student, lively(case.family, 1), masks


def run_case(name: str, directory: Path, *, together: int = 1, **more: Any) -> tuple[Run, MaskSet]:
    """Train one case in this process, which may be one of several."""
    case = CASES[name]
    student, teacher, masks = models(case)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, **case.arguments, **more}
    run = train(
        student, directory, case.config, teacher, data=HalfMasked() if case.some_masked else Rows(LENGTHS),
        callbacks=[MaskCallback(masks)], gradient_accumulation_steps=together, **settings,
    )  # fmt: skip
    return run, masks


def main(directory: Path) -> None:
    """Every case in turn."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name in CASES:
        run, _ = run_case(name, directory / name / "run")
        found = {f"weight {key}": value for key, value in snapshot(run.trainer.model).items()}
        found.update({f"gradient {key.removeprefix('module.')}": value for key, value in run.gradients[0].items()})
        save_file({key: value.contiguous() for key, value in found.items()}, directory / name / f"{rank}.safetensors")
        (directory / name / f"{rank}.json").write_text(json.dumps(run.logs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
