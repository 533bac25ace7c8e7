"""Subclasses, other generators, several runs, the first token: what a trainer with a teacher must not get wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation.runs import Rows, lively, padding, train
from tiny_models import TINY
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from sparse_ft import prune
from sparse_ft.distillation import DistillationConfig, distilling, self_teacher, squarehead_layer
from sparse_ft.distillation.tokens import valid_tokens
from sparse_ft.distillation.trainer import _check_still_shared

KL = DistillationConfig(kl_weight=1.0)


class OwnLlama(LlamaForCausalLM):
    """A class that transformers' tables do not name."""


def test_a_subclass_is_what_it_is_derived_from(tmp_path: Path) -> None:
    """Position i predicts token i + 1 in it too, and logits of all tokens are not made."""
    student = lively("llama")
    own = OwnLlama(student.config)
    own.load_state_dict(student.state_dict())
    widths: set[int] = set()
    own.lm_head.register_forward_hook(lambda _module, _args, out: widths.add(out.shape[1]))
    runs = [train(model, tmp_path, KL, lively("llama", 1)) for model in (student, own)]
    assert runs[1].distill == [pytest.approx(runs[0].distill[0], rel=1e-6)]
    assert widths == {1}


def test_energies_do_not_depend_on_other_generators(tmp_path: Path) -> None:
    """A collator may draw from numpy or random: the energies are those of the seed, and the draws go on as before."""

    def noisy(rows: list[Any]) -> dict[str, Tensor]:
        batch = padding()(rows)
        change = torch.from_numpy(np.random.randint(3, 90, tuple(batch["input_ids"].shape)))
        chosen = torch.tensor([random.random() < 0.5 for _ in range(change.numel())]).view(change.shape)
        return {**batch, "input_ids": torch.where(chosen, change, batch["input_ids"])}

    config = DistillationConfig(squarehead_weight=1.0, energy="fixed", energy_samples=4)
    found, after = [], []
    for draws in (0, 5):
        run = train(lively("llama"), tmp_path, config, lively("llama", 1), trainer={"data_collator": noisy})
        distiller: Any = run.trainer.distiller  # type: ignore[attr-defined]
        np.random.seed(3)
        random.seed(3)
        np.random.random(draws)
        distiller.measure_energies(run.trainer._energy_batches())  # type: ignore[attr-defined]
        found.append(torch.stack(distiller.energies[0]))
        after.append((np.random.random(), random.random()))
    assert torch.equal(found[0], found[1])
    expected = np.random.RandomState(3)
    assert after[0][0] == expected.random_sample() and after[0][1] == random.Random(3).random()


def test_a_second_run_logs_its_own_steps(tmp_path: Path) -> None:
    config = DistillationConfig(kl_weight=1.0)
    run = train(lively("llama"), tmp_path, config, lively("llama", 1), max_steps=2, logging_steps=3)
    trainer: Any = run.trainer
    assert (trainer._steps, trainer._values) == (0, {})


def test_the_first_token_of_each_row_may_be_left_out(tmp_path: Path) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    [(found, count)] = valid_tokens({"attention_mask": mask}, ("",), skip_first=True)
    assert found is not None and found.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert int(count) == 4
    [(found, count)] = valid_tokens({"input_ids": torch.ones(2, 3)}, ("",), no_padding=True, skip_first=True)
    assert found is not None and found.int().tolist() == [[0, 1, 1]] * 2 and int(count) == 4

    student, teacher, rows = lively("llama"), lively("llama", 1), Rows((6, 9))
    batch = padding()([rows[0], rows[1]])
    states = [m(**batch, output_hidden_states=True).hidden_states[1:] for m in (student, teacher)]
    [(keep, _)] = valid_tokens(batch, ("",), skip_first=True)
    expected = sum(squarehead_layer(s, t, keep) for s, t in zip(*states, strict=True))
    config = DistillationConfig(squarehead_weight=1.0, skip_first=True)
    run = train(student, tmp_path, config, teacher, data=rows, per_device_train_batch_size=2)
    assert run.distill[0]["distill/squarehead"] == pytest.approx(float(expected), rel=1e-5)


def test_a_shared_teacher_whose_student_moves_is_refused() -> None:
    dense, student = TINY["llama"](), TINY["llama"]()
    masks = prune(student, method="magnitude", pattern="unstructured", sparsity=0.5, progress=False)
    teacher = self_teacher(student.requires_grad_(False), masks, dense)
    _check_still_shared(teacher, "cpu")
    _check_still_shared(dense, "cuda")
    with pytest.raises(ValueError, match=r"before self_teacher"):
        _check_still_shared(teacher, "cuda")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distillation": {"kl_weight": 1.0}}, "distillation is a dict"),
        ({"distillation": KL, "teacher": "path"}, "teacher is a str"),
        ({"distillation": KL, "teacher": TINY["bert"]()}, "predicts the next token"),
    ],
)
def test_arguments_of_another_kind(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=says):
        distilling(Trainer)(model=TINY["gpt2"](), args=arguments, **options)


def test_a_compiled_student_shows_no_states(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", torch_compile=True)
    states: Any = {"distillation": DistillationConfig(squarehead_weight=1.0), "teacher": TINY["llama"](1)}
    with pytest.raises(ValueError, match="torch_compile"):
        distilling(Trainer)(model=TINY["llama"](), args=arguments, **states)


@pytest.mark.parametrize("other", [dict, TINY["llama"]()])
def test_only_classes_of_trainers_are_taken(other: Any) -> None:
    with pytest.raises(ValueError, match="derived from transformers"):
        distilling(other)
