"""The sparsity table against counting every weight one by one."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY

from sparse_ft.evaluation import SparsityRow, sparsity_table, sparsity_totals
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, named_weights


def pruned(name: str, pattern: str = "unstructured", sparsity: float | None = 0.6):  # type: ignore[no-untyped-def]
    """A tiny model pruned by magnitude, and its masks."""
    model = TINY[name]()
    targets, weights = find_targets(model), named_weights(model)
    masks = MaskSet.from_scores(
        {t.name: weights[t.name].detach().abs() for t in targets},
        pattern=pattern,
        sparsity=sparsity,
        input_dims={t.name: t.input_dim for t in targets},
    )
    masks.apply_(model)
    return model, masks


@pytest.mark.parametrize("name", list(TINY))
def test_counts_equal_counting_one_by_one(name: str) -> None:
    model, masks = pruned(name)
    weights = named_weights(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # some kept weights become zero, some pruned ones come back, one is -0 and one NaN
        for weight in (weights[n] for n in masks):
            weight[torch.rand(weight.shape, generator=generator) < 0.05] = 0.0
            weight[torch.rand(weight.shape, generator=generator) < 0.02] = 1.0
            weight.view(-1)[0], weight.view(-1)[1] = -0.0, float("nan")
    rows = sparsity_table(masks, model)
    assert sorted(row.name for row in rows) == sorted(masks)
    for row in rows:
        pairs = list(zip(masks[row.name].flatten().tolist(), weights[row.name].flatten().tolist(), strict=True))
        assert row.total == len(pairs)
        assert row.kept == sum(keep for keep, _ in pairs)
        assert row.zeros == sum(value == 0 for _, value in pairs)
        assert row.kept_but_zero == sum(keep and value == 0 for keep, value in pairs) > 0
        assert row.revived == sum(not keep and value != 0 for keep, value in pairs) > 0
        assert row.zeros == row.total - row.kept + row.kept_but_zero - row.revived
        assert row.sparsity == row.zeros / row.total
        assert row.shape == tuple(weights[row.name].shape)


@pytest.mark.parametrize("name", list(TINY))
def test_blocks_and_roles(name: str) -> None:
    model, masks = pruned(name)
    rows, targets = sparsity_table(masks, model), {t.name: t for t in find_targets(model)}
    assert [row.block for row in rows] == [targets[row.name].block for row in rows]
    experts = {row.role for row in rows if "experts" in row.name}
    for block in {row.block for row in rows}:
        alone = [row.role for row in rows if row.block == block and row.role not in experts]
        assert len(alone) == len(set(alone)), "two weights of a block share a role"
    assert all(row.role and row.role in row.name.replace(".weight", "") for row in rows if row.role not in experts)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
        ("bert", ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
    ],
)
def test_roles_read_well_and_in_order(name: str, expected: list[str]) -> None:
    model, masks = pruned(name)
    shuffled = MaskSet({n: masks[n] for n in sorted(masks, reverse=True)}, input_dims=masks.input_dims)
    rows = sparsity_table(shuffled, model)
    assert [row.role for row in rows] == expected * 2
    assert [row.block[-1] for row in rows] == ["0"] * len(expected) + ["1"] * len(expected)


def test_blocks_are_in_order_of_depth() -> None:
    masks = MaskSet({f"layers.{i}.w.weight": torch.eye(4).bool() for i in (10, 2, 0, 1, 11)})
    assert [row.block for row in sparsity_table(masks)] == [f"layers.{i}" for i in (0, 1, 2, 10, 11)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_violations_are_groups_with_too_many_weights(name: str, pattern: str) -> None:
    model, masks = pruned(name, pattern, None)
    assert all(row.violations == 0 for row in sparsity_table(masks, model))
    victim = next(iter(masks))
    weight, axis = named_weights(model)[victim].data, masks.input_dims[victim]
    weight.select(axis, 1).fill_(1.0)  # one group of every output now keeps every weight it can
    weight.select(axis, 2).fill_(1.0)
    weight.select(axis, 3).fill_(1.0)
    rows = {row.name: row for row in sparsity_table(masks, model)}
    assert rows[victim].violations == weight.numel() // weight.shape[axis]
    assert all(row.violations == 0 for n, row in rows.items() if n != victim)
    assert rows[victim].revived and rows[victim].pattern == pattern


def test_unstructured_masks_cannot_be_violated() -> None:
    model, masks = pruned("llama")
    assert {row.violations for row in sparsity_table(masks, model)} == {None}


def test_without_weights_only_the_masks_are_counted() -> None:
    model, masks = pruned("opt")
    with_weights, without = sparsity_table(masks, model), sparsity_table(masks)
    assert [(r.name, r.kept, r.total) for r in without] == [(r.name, r.kept, r.total) for r in with_weights]
    assert all(r.zeros == r.total - r.kept and r.revived is None and r.kept_but_zero is None for r in without)


def test_totals_are_the_sums() -> None:
    model, masks = pruned("mixtral")
    rows = sparsity_table(masks, model)
    numbers = [f.name for f in fields(SparsityRow) if f.name in ("kept", "total", "zeros", "kept_but_zero", "revived")]
    for by in ("all", "block", "role", "block_role"):
        totals = sparsity_totals(rows, by)
        for number in numbers:
            assert sum(getattr(t, number) for t in totals.values()) == sum(getattr(r, number) for r in rows)
    by_block = sparsity_totals(rows, "block")
    for block, total in by_block.items():
        assert total.kept == sum(int(masks[n].sum()) for n in masks if n.startswith(f"{block}."))
    assert sparsity_totals(rows)["all"].sparsity == pytest.approx(masks.sparsity())


def test_total_of_two_patterns_is_mixed() -> None:
    square = torch.tensor([[True, True, False, False]] * 4)
    names = ("l.0.a.weight", "l.0.b.weight")
    masks = MaskSet(dict.fromkeys(names, square), pattern=dict(zip(names, ("2:4", "unstructured"), strict=True)))
    total = sparsity_totals(sparsity_table(masks))["all"]
    assert total.pattern == "mixed" and total.violations == 0 and total.block == "l.0" and total.role == ""


def test_reads_tensors_from_a_mapping_one_at_a_time() -> None:
    model, masks = pruned("llama")
    weights = named_weights(model)
    asked: list[str] = []

    class Files(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().__getitem__(name)

    assert sparsity_table(masks, Files(weights)) == sparsity_table(masks, model)
    assert sorted(asked) == sorted(masks)


def test_another_models_masks_are_refused() -> None:
    model, _ = pruned("llama")
    _, masks = pruned("opt")
    with pytest.raises(ValueError, match="has no tensor"):
        sparsity_table(masks, model)
    with pytest.raises(ValueError, match="block_role"):
        sparsity_totals([], "layer")


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8), st.randoms())
def test_zeros_are_explained_by_mask_and_surprises(bits: list[list[bool]], random) -> None:  # type: ignore[no-untyped-def]
    mask = torch.tensor(bits)
    weight = torch.tensor([[random.choice([0.0, 1.0, -2.0]) for _ in line] for line in bits])
    (row,) = sparsity_table(MaskSet({"h.0.w.weight": mask}), {"h.0.w.weight": weight})
    assert row.kept_but_zero is not None and row.revived is not None
    assert row.zeros == row.total - row.kept + row.kept_but_zero - row.revived
    assert (row.revived == 0) == bool((weight[~mask] == 0).all())
