"""Deltas on models that are out of the ordinary: tied and resized ones, buffers of integers, tensors of one entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas.pairs import assert_same, read, same_bits, save_models, state, write
from safetensors.torch import save_file
from torch import nn

from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.resident import Delta, swap
from sparse_ft.models import load_model


class Odd(nn.Module):
    """One entry, no entry, nothing but zeros, integers, and a matrix."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one = nn.Parameter(torch.full((1,), 1.0 + seed / 4).bfloat16())
        self.scalar = nn.Parameter(torch.full((), 2.0 + seed / 4).bfloat16())
        self.none = nn.Parameter(torch.empty(0).bfloat16())
        self.zeros = nn.Parameter(torch.zeros(4, 8).bfloat16())
        self.matrix = nn.Parameter((torch.randn(16, 8, generator=generator) * 0.02).bfloat16())
        self.register_buffer("ids", torch.arange(5) + seed)
        self.register_buffer("flags", torch.tensor([seed == 0, True]))


@pytest.mark.filterwarnings("ignore:The mean")
@pytest.mark.parametrize("method", ["dare", "magnitude", "structural"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_odd_tensors_are_the_files_and_come_back(method: str, density: float, tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / str(number), Odd(number).state_dict())
    deltas = []
    for number in (1, 2):
        settings = Settings(method, density, scale=0.5 if method == "dare" and density else None)
        extract_delta(tmp_path / "0", tmp_path / str(number), tmp_path / f"d{number}", settings, progress=False)
        apply_checkpoint(tmp_path / "0", tmp_path / f"d{number}", tmp_path / f"o{number}", progress=False)
        deltas.append(Delta.load(tmp_path / f"d{number}"))
    model = Odd(0)
    before = state(model)
    deltas[0].apply(model)
    assert_same(model, read(tmp_path / "o1"))
    swap(model, *deltas)
    assert_same(model, read(tmp_path / "o2"))
    assert torch.equal(model.ids, torch.arange(5) + 2), "integers are copied, never differenced"
    deltas[1].subtract(model)
    assert_same(model, before)


@pytest.mark.parametrize("stored_twice", ["base", "tuned", "both", "neither"])
def test_tied_weights_stay_tied_and_are_changed_once(stored_twice: str, tmp_path: Path) -> None:
    base, *tuned = save_models(tmp_path, "qwen", seeds=2)
    for name, places in (("base", [base]), ("tuned", tuned)):
        if stored_twice in (name, "both"):
            for place in places:
                tensors = read(place)
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
                save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    deltas = []
    for number, place in enumerate(tuned):
        extract_delta(base, place, tmp_path / f"d{number}", Settings(density=0.2, seed=number), progress=False)
        apply_checkpoint(base, tmp_path / f"d{number}", tmp_path / f"o{number}", progress=False)
        deltas.append(Delta.load(tmp_path / f"d{number}"))
    model = load_model(base)
    before = state(model)
    deltas[0].apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for number, delta in enumerate(deltas):
        if number:
            swap(model, deltas[0], delta)
        found = read(tmp_path / f"o{number}")
        assert same_bits(model.lm_head.weight.detach(), found["model.embed_tokens.weight"])
        assert ("lm_head.weight" in found) == (stored_twice != "neither")
        assert same_bits(found.get("lm_head.weight", model.lm_head.weight.detach()), model.lm_head.weight.detach())
    deltas[1].subtract(model)
    assert_same(model, before)


@pytest.mark.parametrize("rows", [101, 90])
def test_rows_of_a_resized_vocabulary(rows: int, tmp_path: Path) -> None:
    """Further rows of the fine-tune are put in whole and taken off again; rows it lacks are gone from the model."""
    base, tuned = save_models(tmp_path, "llama")
    resized = load_model(tuned)
    resized.resize_token_embeddings(rows)
    resized.save_pretrained(tuned)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        delta.apply(model)
    model.resize_token_embeddings(rows)
    before = state(model)
    delta.apply(model)
    assert_same(model, state(load_model(tmp_path / "out")))
    assert len(model.lm_head.weight) == rows
    assert same_bits(model.lm_head.weight[96:].detach(), resized.lm_head.weight[96:].detach())
    delta.subtract(model)
    assert_same(model, before)


def test_a_model_is_saved_with_its_delta(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "gpt2")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    delta.apply(model)
    model.save_pretrained(tmp_path / "saved")
    delta.subtract(model)
    model.save_pretrained(tmp_path / "again")
    for one, other in (("saved", "out"), ("again", "base")):
        first, second = read(tmp_path / one), read(tmp_path / other)
        assert first.keys() == second.keys()
        assert all(same_bits(first[name], second[name]) for name in first)


def test_a_base_spoiled_by_nan_is_refused_and_given_back(tmp_path: Path) -> None:
    """Between the values that the digest looks at; with the check off too."""
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.5), progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    name = "model.layers.1.mlp.down_proj.weight"
    delta.prepare()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[int(delta._index(name, torch.device("cpu"))[7])] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=f"'{name}': A weight becomes infinite or NaN"):
        delta.apply(model, check_base=False)
    assert_same(model, before)
    assert not delta.is_applied(model)
