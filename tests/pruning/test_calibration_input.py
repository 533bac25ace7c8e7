"""Calibration batches without the model's input are refused in one sentence that names the keys that were found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import TINY, tiny_batch

import sparse_ft
from sparse_ft.models import named_weights

IDS = torch.ones(2, 40, dtype=torch.long)


@pytest.mark.parametrize(
    ("family", "batch", "found"),
    [
        ("llama", {"ids": IDS, "attention_mask": IDS}, "has no 'input_ids', only 'attention_mask', 'ids'; rename"),
        ("llama", {}, "has no 'input_ids', nothing; rename"),
        ("llama", {"input_ids": None}, "has no 'input_ids', nothing"),
        ("bert", {"text": "a sentence"}, "for BertForMaskedLM has no 'input_ids', only 'text'"),
        ("t5", {"labels": IDS}, "has no 'input_ids', only 'labels'"),
    ],
)
def test_keys_that_were_found_are_named(family: str, batch: dict[str, Any], found: str) -> None:
    model = TINY[family]()
    before = {name: weight.clone() for name, weight in named_weights(model).items()}
    with pytest.raises(ValueError) as caught:
        sparse_ft.prune(model, pattern="2:4", method="wanda", calibration=[tiny_batch(model), batch])
    assert found in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_embeddings_are_an_input_too() -> None:
    model = TINY["llama"]()
    vectors = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    masks = sparse_ft.prune(model, pattern="2:4", method="wanda", calibration=[{"inputs_embeds": vectors}])
    assert masks.sparsity() == 0.5
