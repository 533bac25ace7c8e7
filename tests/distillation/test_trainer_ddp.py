"""Two processes that learn from a teacher do what one process does with the same rows in each step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters.sparse_models import snapshot
from distillation import two_learn
from distillation.runs import Collate, Rows, Run, assert_same, gradients, lively, padding, terms, total, train
from safetensors.torch import load_file
from torch import Tensor
from training.two_processes import launch

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("two_learn.py")
ADDING = [name for name in two_learn.CASES if name != two_learn.APART]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which two processes left the results of every case."""
    directory = tmp_path_factory.mktemp("both")
    done = launch(SCRIPT, directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def left(directory: Path, kind: str, process: int = 0) -> dict[str, Tensor]:
    found = load_file(directory / f"{process}.safetensors")
    return {name.removeprefix(f"{kind} "): value for name, value in found.items() if name.startswith(f"{kind} ")}


@pytest.mark.parametrize("name", ADDING)
def test_two_processes_are_one_that_accumulates(name: str, both: Path, tmp_path: Path) -> None:
    run, masks = two_learn.run_case(name, tmp_path, together=2)
    assert_same(left(both / name, "gradient"), run.gradients[0], 2e-6)
    weights = left(both / name, "weight")
    for key, wanted in snapshot(run.trainer.model).items():
        torch.testing.assert_close(weights[key], wanted, rtol=1e-5, atol=1e-6)
    told = Run(run.trainer, [], json.loads((both / name / "0.json").read_text()))
    assert len(told.distill) == 3
    for found, wanted in zip(told.distill, run.distill, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    masks.verify(weights)


@pytest.mark.parametrize("name", two_learn.CASES)
def test_both_processes_end_with_the_same_bits_and_every_zero(name: str, both: Path) -> None:
    first, second = left(both / name, "weight"), left(both / name, "weight", 1)
    assert first.keys() == second.keys()
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())
    _, _, masks = two_learn.models(two_learn.CASES[name])
    for key, mask in masks.items():
        assert int(first[key].view(torch.int32)[~mask].abs().sum()) == 0, f"{key} is not +0 where it is pruned"


class Recorded:
    """A collator that keeps what it made."""

    def __init__(self, collate: Collate) -> None:
        self.collate, self.batches = collate, list[dict[str, Tensor]]()

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.batches.append(self.collate(rows))
        return self.batches[-1]


def test_processes_with_their_own_means(both: Path, tmp_path: Path) -> None:
    """`average_tokens_across_devices` off: the gradient is the mean of what each process computes of its own rows."""
    config, collate = two_learn.RATIOS, Recorded(padding())
    train(lively("llama"), tmp_path, None, data=Rows(two_learn.LENGTHS), collate=collate, max_steps=1,
          per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    student, teacher, masks = two_learn.models(two_learn.CASES[two_learn.APART])
    found = [terms(student, teacher, batch, config) for batch in collate.batches[:2]]
    assert found[0].tokens != found[1].tokens and found[0].labels != found[1].labels
    loss = (total(found[0], config) + total(found[1], config)) / 2
    expected = {name: g * masks[name] if name in masks else g for name, g in gradients(student, loss).items()}
    assert_same(left(both / two_learn.APART, "gradient"), expected)
    told = Run(None, [], json.loads((both / two_learn.APART / "0.json").read_text()))  # type: ignore[arg-type]
    assert told.distill[0]["distill/kl"] == pytest.approx((found[0].kl + found[1].kl).item() / 2, rel=1e-4)
    squarehead = sum(part.features["squarehead"].item() for part in found) / 2
    assert told.distill[0]["distill/squarehead"] == pytest.approx(squarehead, rel=1e-5)
