"""Which tensors are pruned: one case per rule, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas.pairs import base_tensors, write

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.deltas.scope import Selection, align, find_tied, sample_values

F32, I64 = torch.float32, torch.int64
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up.weight",
    "model.layers.0.self_attn.q.weight",
    "model.norm.weight",
)
COMMON = dict.fromkeys(NAMES, (F32, (8, 4))) | {"model.norm.weight": (F32, (4,))}


def kinds(base: dict, tuned: dict, **more: object) -> dict[str, str]:  # type: ignore[type-arg]
    return {name: entry.kind for name, entry in align(base, tuned, **more).entries.items()}  # type: ignore[arg-type]


def test_every_rule_in_its_order() -> None:
    base = {
        **COMMON,
        "position_ids": (I64, (9,)),
        "inv_freq": (F32, (2,)),
        "gone": (F32, (1,)),
        "score.weight": (F32, (2, 4)),
    }
    tuned = {**COMMON, "position_ids": (I64, (7,)), "inv_freq": (F32, (3,)), "new.weight": (F32, (2, 2))}
    tuned |= {"score.weight": (F32, (5, 4)), "model.embed_tokens.weight": (F32, (9, 4))}
    scope = align(base, tuned)
    assert {name: entry.kind for name, entry in scope.entries.items()} == {
        **dict.fromkeys(NAMES[1:], "delta"), "model.embed_tokens.weight": "resized", "gone": "base",
        **dict.fromkeys(("position_ids", "inv_freq", "new.weight", "score.weight"), "finetuned"),
    }  # fmt: skip
    embedding = scope.entries["model.embed_tokens.weight"]
    assert (embedding.shape, embedding.rows) == ((9, 4), 8)
    assert len(scope.warnings) == 1 and "'gone'" in scope.warnings[0]


def test_fewer_rows_give_the_fine_tunes_rows() -> None:
    entry = align(COMMON, COMMON | {NAMES[0]: (F32, (5, 4))}).entries[NAMES[0]]
    assert (entry.kind, entry.shape, entry.rows) == ("resized", (5, 4), 5)


@pytest.mark.parametrize(("preset", "pruned"), [("all", 4), ("encoder", 4), ("decoder", 2)])
def test_presets(preset: str, pruned: int) -> None:
    found = kinds(COMMON, COMMON | {"x.classifier.weight": (F32, (2, 2))} | {}, selection=Selection(preset))
    assert sum(kind == "delta" for kind in found.values()) == pruned
    assert found["x.classifier.weight"] == "finetuned"


@pytest.mark.parametrize(
    ("word", "fits"), [("embeddings", {NAMES[0]}), ("norms", {NAMES[3]}), (r"layers\.0\.mlp", {NAMES[1]})]
)
def test_words_and_expressions_exclude(word: str, fits: set[str]) -> None:
    found = kinds(COMMON, COMMON, selection=Selection(exclude=(word,), excluded="take-base"))
    assert {name for name, kind in found.items() if kind == "base"} == fits
    with pytest.raises(ValueError, match="fits none"):
        align(COMMON, COMMON, selection=Selection(exclude=("lm_head",)))


def test_shapes_that_differ_are_all_counted() -> None:
    tuned = COMMON | {NAMES[1]: (F32, (8, 5)), NAMES[2]: (F32, (7, 4))}
    with pytest.raises(ValueError, match=r"\(8, 4\) in the base and \(8, 5\).*and 1 more"):
        align(COMMON, tuned)
    with pytest.raises(ValueError, match="float8"):
        align(COMMON, COMMON | {NAMES[1]: (torch.float8_e4m3fn, (8, 4))})
    with pytest.raises(ValueError, match="architecture"):
        align({"h.0.weight": (F32, (8, 4))}, COMMON)
    with pytest.raises(ValueError, match="both need some"):
        align(COMMON, {})


def test_tied_names() -> None:
    both = {**COMMON, "lm_head.weight": (F32, (8, 4))}
    group = [("lm_head.weight", NAMES[0])]
    assert align(both, both).aliases == {}
    assert align(both, both, base_tied=group, finetuned_tied=group).aliases == {NAMES[0]: "lm_head.weight"}
    assert align(COMMON, both, finetuned_tied=group).aliases == {"lm_head.weight": NAMES[0]}
    assert align(both, COMMON, base_tied=group).aliases == {"lm_head.weight": NAMES[0]}
    apart = align(both, both, base_tied=group)
    assert apart.aliases == {} and apart.entries["lm_head.weight"].kind == "delta"


def test_equal_matrices_are_found_and_constant_ones_not(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors |= {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)}
    tensors["c.weight"] = tensors["lm_head.weight"].clone()
    big = torch.randn(100, 100)
    tensors |= {"d.weight": big, "e.weight": big.clone()}
    tensors["e.weight"].view(-1)[1] += 1  # between two samples
    assert sample_values(big).numel() == 1024
    found = find_tied(CheckpointReader(write(tmp_path / "x", tensors)))
    assert found == [("c.weight", "lm_head.weight", "model.embed_tokens.weight")]
