"""What a step with a teacher adds up: the loss and its gradient against formulas, and what the trainer's options do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation.runs import (
    Collate,
    Rows,
    assert_bits,
    assert_same,
    gradients,
    lively,
    padding,
    terms,
    token_terms,
    total,
    train,
)
from tiny_models import VOCABULARY
from torch import Tensor

from sparse_ft.distillation import CachedTargets, DistillationConfig, predictor, write_targets

ALL = DistillationConfig(ce_weight=0.7, kl_weight=0.5, squarehead_weight=0.3, temperature=2.0)
UNEQUAL = (5, 14, 4, 20, 9, 12, 6, 3)  # lengths of rows: two halves of very different numbers of tokens


def batch_of(rows: Rows, side: str = "right") -> dict[str, Tensor]:
    return padding(side)(list(rows))  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen"])
def test_loss_and_gradient_are_the_formula(name: str, side: str, tmp_path: Path) -> None:
    student, teacher, rows = lively(name), lively(name, 1), Rows()
    found = terms(student, teacher, batch_of(rows, side), ALL)
    loss = total(found, ALL)
    expected = gradients(student, loss)
    run = train(student, tmp_path, ALL, teacher, data=rows, collate=padding(side))
    assert run.logged("loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert_same(run.gradients[0], expected)
    (logs,) = run.distill
    assert logs["distill/ce"] == pytest.approx(found.ce.item(), rel=1e-5)
    assert logs["distill/kl"] == pytest.approx(found.kl.item(), rel=1e-4)
    assert logs["distill/squarehead"] == pytest.approx(found.features["squarehead"].item(), rel=1e-5)
    layers = [logs[f"distill/squarehead/layer_{layer}"] for layer in (1, 2)]
    assert sum(layers) == pytest.approx(logs["distill/squarehead"], rel=1e-6) and len(logs) == 5


def test_the_loss_of_routers_stays(tmp_path: Path) -> None:
    student, teacher, rows = lively("mixtral"), lively("mixtral", 1), Rows()
    for model in (student, teacher):
        model.config.output_router_logits = True
        model.router_aux_loss_coef = 0.5
    batch = batch_of(rows)
    found = terms(student, teacher, batch, ALL)
    own = student(**batch).loss
    assert own.item() > found.ce.item() + 0.1
    found.ce = own
    loss = total(found, ALL)
    expected = gradients(student, loss)
    run = train(student, tmp_path, ALL, teacher, data=rows)
    assert run.logged("loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert_same(run.gradients[0], expected)


def ce_by_hand(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_cross_entropy_with_kl_is_cross_entropy_beside_it(name: str, tmp_path: Path) -> None:
    """The same gradient whether a few tokens at a time, or the model's logits and a function of the user's."""
    runs, widths = [], []
    for extra in ({}, {"compute_loss_func": ce_by_hand}):
        student, seen = lively(name), []
        student.lm_head.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.shape[1]))
        settings = {"data": Rows(UNEQUAL), "gradient_accumulation_steps": 2, "trainer": extra}
        runs.append(train(student, tmp_path, ALL, lively(name, 1), **settings))
        widths.append(set(seen))
    assert widths[0] == {1} and min(widths[1]) > 1, "the paths are not the two that are to be compared"
    assert_same(runs[0].gradients[0], runs[1].gradients[0], 1e-6)
    assert runs[0].distill[0] == pytest.approx(runs[1].distill[0], rel=1e-5)
    assert runs[0].logged("loss") == pytest.approx(runs[1].logged("loss"), rel=1e-6)


# -- several micro-batches -------------------------------------------------------------------------------------------

ADDING = {
    "squarehead": DistillationConfig(squarehead_weight=0.3, energy="fixed", energy_samples=3),
    "kl": DistillationConfig(kl_weight=0.5, temperature=2.0),
    "mse": DistillationConfig(ce_weight=0.0, mse_weight=0.5),
    "cosine": DistillationConfig(cosine_weight=0.5),
    "all": DistillationConfig(
        kl_weight=0.5, squarehead_weight=0.3, mse_weight=0.1, cosine_weight=0.2, energy="fixed", energy_samples=8
    ),
}


@pytest.mark.parametrize("name", ADDING)
def test_micro_batches_add_up_to_one_batch(name: str, tmp_path: Path) -> None:
    """Invariant 11, with very different numbers of tokens and labels in the micro-batches."""
    runs = []
    for size in (8, 4, 2):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        runs.append(train(lively("llama"), tmp_path, ADDING[name], lively("llama", 1), data=Rows(UNEQUAL), **settings))
    for run in runs[1:]:
        assert_same(run.gradients[0], runs[0].gradients[0], 2e-6)
        assert run.distill == [pytest.approx(runs[0].distill[0], rel=1e-5)]
        assert run.logged("loss") == pytest.approx(runs[0].logged("loss"), rel=1e-6)


class Recorded:
    """A collator that keeps what it made."""

    def __init__(self, collate: Collate) -> None:
        self.collate, self.batches = collate, list[dict[str, Tensor]]()

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        self.batches.append(self.collate(rows))
        return self.batches[-1]


def test_ratios_of_micro_batches_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    student, teacher, collate = lively("llama"), lively("llama", 1), Recorded(padding())
    reference = lively("llama")
    run = train(
        student, tmp_path, ALL, teacher, data=Rows(UNEQUAL), collate=collate,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    assert len(collate.batches) == 4
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in collate.batches)
    found = [terms(reference, teacher, batch, ALL, items=items) for batch in collate.batches]
    tokens = sum(part.tokens for part in found)
    assert len({part.tokens for part in found}) > 2 and len({part.labels for part in found}) > 2
    squarehead = sum(part.features["squarehead"] * (part.tokens / tokens) for part in found)
    loss = 0.7 * sum(part.ce for part in found) + 0.5 * sum(part.kl for part in found) + 0.3 * squarehead
    assert_same(run.gradients[0], gradients(reference, loss))
    assert run.logged("loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert run.distill[0]["distill/squarehead"] == pytest.approx(squarehead.item(), rel=1e-5)


def test_fixed_energies_are_the_teachers_on_the_first_samples(tmp_path: Path) -> None:
    config = DistillationConfig(ce_weight=0.0, squarehead_weight=1.0, energy="fixed", energy_samples=5)
    student, teacher, rows = lively("llama"), lively("llama", 1), Rows(UNEQUAL)
    reference, whole = lively("llama"), batch_of(rows)
    with torch.no_grad():
        five = padding()([rows[index] for index in range(5)])
        states = teacher(five["input_ids"], attention_mask=five["attention_mask"], output_hidden_states=True)
    energies = [(state[five["attention_mask"].bool()] ** 2).mean() for state in states.hidden_states[1:]]
    loss = total(terms(reference, teacher, whole, config, energies=energies), config)
    run = train(student, tmp_path, config, teacher, data=rows, per_device_train_batch_size=2, max_steps=1,
                gradient_accumulation_steps=4)  # fmt: skip
    assert_same(run.gradients[0], {**gradients(reference, loss), "lm_head.weight": run.gradients[0]["lm_head.weight"]})
    assert not run.gradients[0]["lm_head.weight"].any()


# -- options of the trainer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [0.5, 0.0])
def test_label_smoothing(kl_weight: float, tmp_path: Path) -> None:
    config = DistillationConfig(kl_weight=kl_weight, squarehead_weight=0.3, temperature=2.0)
    student, teacher, rows = lively("llama"), lively("llama", 1), Rows()
    batch = batch_of(rows)
    found = terms(student, teacher, batch, config)
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    found.ce = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2)
    loss = total(found, config)
    expected = gradients(student, loss)
    run = train(student, tmp_path, config, teacher, data=rows, label_smoothing_factor=0.2)
    assert run.logged("loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert_same(run.gradients[0], expected)


def test_a_model_whose_mean_the_trainer_divides(tmp_path: Path) -> None:
    """Without `num_items_in_batch`, each micro-batch has its own mean, and the step the mean of these."""
    student, teacher, collate = lively("llama"), lively("llama", 1), Recorded(padding())
    reference = lively("llama")
    student.accepts_loss_kwargs = False
    run = train(
        student, tmp_path, ALL, teacher, data=Rows(UNEQUAL), collate=collate,
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    found = [terms(reference, teacher, batch, ALL) for batch in collate.batches]
    tokens = sum(part.tokens for part in found)
    squarehead = sum(part.features["squarehead"] * (part.tokens / tokens) for part in found)
    loss = sum(0.7 * part.ce + 0.5 * part.kl for part in found) / 2 + 0.3 * squarehead
    assert_same(run.gradients[0], gradients(reference, loss))
    assert run.distill[0]["distill/kl"] == pytest.approx(sum(part.kl.item() for part in found) / 2, rel=1e-4)
    assert run.distill[0]["distill/ce"] == pytest.approx(sum(part.ce.item() for part in found) / 2, rel=1e-5)
    assert run.distill[0]["distill/squarehead"] == pytest.approx(squarehead.item(), rel=1e-5)


def test_a_function_for_the_loss_keeps_its_word(tmp_path: Path) -> None:
    """Whatever it computes counts, here the mean square of logits."""

    def square(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        assert outputs.logits.shape[1] > 1
        return outputs.logits.square().mean()

    student, teacher, rows = lively("llama"), lively("llama", 1), Rows()
    batch = batch_of(rows)
    found = terms(student, teacher, batch, ALL)
    found.ce = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.square().mean()
    expected = gradients(student, total(found, ALL))
    run = train(student, tmp_path, ALL, teacher, data=rows, trainer={"compute_loss_func": square})
    assert_same(run.gradients[0], expected)


def test_shifted_labels_of_a_collator(tmp_path: Path) -> None:
    def shifted(rows: list[Any]) -> dict[str, Tensor]:
        batch = padding()(rows)
        return {**batch, "shift_labels": F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]}

    runs = [
        train(lively("llama"), tmp_path, ALL, lively("llama", 1), collate=collate, remove_unused_columns=False)
        for collate in (padding(), shifted)
    ]
    assert_bits(runs[1].gradients[0], runs[0].gradients[0])


# -- stored targets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_stored_targets_are_their_teacher(side: str, tmp_path: Path) -> None:
    """All of the vocabulary is the whole of KL, eight of its words less of it; no teacher is needed."""
    config, teacher, rows = DistillationConfig(kl_weight=0.5, temperature=2.0), lively("llama", 1), Rows()
    wanted = train(lively("llama"), tmp_path, config, teacher, data=rows, collate=padding(side))
    logged = {}
    for k in (VOCABULARY, 8):
        write_targets(
            tmp_path / str(k), [row["input_ids"] for row in rows.rows], predictor(teacher), k=k, temperature=2.0,
            dtype=torch.float32, vocabulary=VOCABULARY, progress=False,
        )  # fmt: skip
        run = train(
            lively("llama"), tmp_path, config, CachedTargets.open(tmp_path / str(k)), data=rows, collate=padding(side)
        )
        logged[k] = run.distill[0]["distill/kl"]
        if k == VOCABULARY:
            assert_same(run.gradients[0], wanted.gradients[0])
    assert logged[VOCABULARY] == pytest.approx(wanted.distill[0]["distill/kl"], rel=1e-4)
    assert 0.1 * logged[VOCABULARY] < logged[8] < 0.99 * logged[VOCABULARY]


# -- no teacher in effect --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equal_models_have_no_distance(name: str, tmp_path: Path) -> None:
    """Invariant 1: nothing to learn from a teacher equal to the student, to the bit."""
    config = DistillationConfig(squarehead_weight=1.0, mse_weight=2.0)
    runs = [
        train(lively(name), tmp_path, *taught, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        for taught in ((None,), (config, lively(name)))
    ]
    assert_bits(runs[1].gradients[0], runs[0].gradients[0])
    assert runs[1].logged("loss") == runs[0].logged("loss")
    logs = runs[1].distill[0]
    assert {logs[f"distill/{part}"] for part in ("squarehead", "squarehead/layer_1", "mse")} == {0.0}
    assert logs["distill/ce"] == pytest.approx(runs[0].logged("loss")[0], rel=1e-6)


def test_equal_models_have_no_kl(tmp_path: Path) -> None:
    config = DistillationConfig(ce_weight=0.0, kl_weight=1.0, squarehead_weight=1.0, temperature=2.0)
    run = train(lively("llama"), tmp_path, config, lively("llama"), optim="adamw_torch", weight_decay=0.0)
    assert run.logged("loss") == [0.0] and set(run.distill[0].values()) == {0.0}
    assert not any(gradient.any() for gradient in run.gradients[0].values())


def test_evaluation_has_no_teacher(tmp_path: Path) -> None:
    losses = []
    for taught in ((None,), (DistillationConfig(kl_weight=1.0, squarehead_weight=1.0), lively("llama", 1))):
        run = train(lively("llama"), tmp_path, *taught, learning_rate=0.0, trainer={"eval_dataset": Rows(UNEQUAL)})
        if len(taught) > 1:
            calls: list[int] = []
            taught[1].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        losses.append(run.trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] and not calls


def test_the_log_is_a_mean_over_steps(tmp_path: Path) -> None:
    means = []
    for every in (1, 3):
        run = train(lively("llama"), tmp_path, ALL, lively("llama", 1), data=Rows(UNEQUAL), max_steps=6,
                    per_device_train_batch_size=2, logging_steps=every)  # fmt: skip
        parts = run.distill
        assert len(parts) == 6 // every
        means.append([{n: sum(p[n] for p in parts[i : i + 3 // every]) * every / 3 for n in parts[0]}
                      for i in range(0, len(parts), 3 // every)])  # fmt: skip
    assert means[0][0] == pytest.approx(means[1][0], rel=1e-5)
    assert means[0][1] == pytest.approx(means[1][1], rel=1e-5)


def test_token_terms_are_what_torch_computes() -> None:
    """The formula of these tests against torch's own."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, -100, 1, 0, 10, -100, 2])
    ce, kl = token_terms(s, t, labels, 2.0)
    keep = labels != -100
    assert ce.item() == pytest.approx(F.cross_entropy(s, labels).item())
    wanted = 4 * F.kl_div((s[keep] / 2).log_softmax(-1), (t[keep] / 2).softmax(-1), reduction="batchmean")
    assert kl.item() == pytest.approx(wanted.item())
