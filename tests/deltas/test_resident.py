"""Deltas on a loaded model: what is applied is the checkpoint, and what is subtracted leaves the base bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas.pairs import read, same_bits, save_models
from torch import nn

from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.entries import add_kept
from sparse_ft.deltas.resident import Delta, swap
from sparse_ft.models import load_model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_apply_is_the_checkpoint_and_subtract_the_base(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, family, dtype)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2, seed=1), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    model = load_model(base)
    before, after = state(model), state(load_model(tmp_path / "out"))
    delta = Delta.load(tmp_path / "delta")
    for _ in range(2):
        delta.apply(model)
        assert delta.is_applied(model)
        assert_same(model, after)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        delta.subtract(model)
        assert_same(model, before)


@pytest.mark.filterwarnings("ignore:The model was cast to float16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
def test_any_dtype_of_the_model_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.3), progress=False)
    model = load_model(base, dtype=dtype)
    before = state(model)
    delta = Delta.load(tmp_path / "delta")
    delta.apply(model)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    delta.subtract(model)
    assert_same(model, before)


def test_addition_is_not_undone_by_subtraction() -> None:
    base = torch.full((1,), 0.001, dtype=torch.bfloat16)
    value = torch.full((1,), 1.0, dtype=torch.bfloat16)
    there = add_kept(base, value, 1.0, torch.bfloat16)
    assert not torch.equal(add_kept(there, -value, 1.0, torch.bfloat16), base), "what is set aside would not be needed"
    assert same_bits(add_kept(-torch.zeros(1), torch.zeros(1), 0.5, torch.float32), -torch.zeros(1))
    with pytest.raises(ValueError, match="infinite"):
        add_kept(torch.ones(1), torch.full((1,), 60000.0), 0.01, torch.float16)


def test_swap_is_subtract_and_apply(tmp_path: Path) -> None:
    base, first, second = save_models(tmp_path, "qwen", seeds=2)
    for number, tuned in enumerate((first, second)):
        settings = Settings(method=("dare", "magnitude")[number], density=0.2)
        extract_delta(base, tuned, tmp_path / f"delta{number}", settings, progress=False)
    deltas = [Delta.load(tmp_path / f"delta{number}") for number in range(2)]
    model, reference = load_model(base), load_model(base)
    before = state(model)
    deltas[1].apply(reference)
    deltas[0].apply(model)
    swap(model, *deltas)
    assert_same(model, state(reference))
    assert (deltas[0].is_applied(model), deltas[1].is_applied(model)) == (False, True)
    swap(model, deltas[1], deltas[0])
    deltas[0].subtract(model)
    assert_same(model, before)


def test_a_swap_that_fails_leaves_the_first_delta(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    extract_delta(tuned, base, tmp_path / "wrong", Settings(density=0.2), progress=False)
    model, right, wrong = load_model(base), Delta.load(tmp_path / "delta"), Delta.load(tmp_path / "wrong")
    right.apply(model, scale=0.4)
    there = state(model)
    with pytest.raises(ValueError, match="digest"):
        swap(model, right, wrong)
    assert_same(model, there)
    assert right.is_applied(model) and right.applied_scale(model) == 0.4
    with pytest.raises(RuntimeError, match="applied to the model already"):
        right.apply(model)
    with pytest.raises(RuntimeError, match="not applied"):
        wrong.subtract(model)


def test_a_scale_of_ones_own(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama", torch.float32)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    delta.apply(model, scale=0.5)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", scale=0.5, progress=False)
    assert_same(model, state(load_model(tmp_path / "out")))


def test_weights_changed_after_apply_are_not_overwritten(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    before = state(model)
    delta.apply(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.0)  # written to, but with the same values
    delta.subtract(model)
    assert_same(model, before)
    delta.apply(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2.0)
    there = state(model)
    with pytest.raises(RuntimeError, match="up_proj"):
        delta.subtract(model)
    assert_same(model, there)


def test_density_one_gives_the_fine_tune_and_density_zero_the_base(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    expected = {1.0: state(load_model(tuned)), 0.0: state(load_model(base))}
    for density in (1.0, 0.0):
        place = tmp_path / f"delta{density}"
        extract_delta(base, tuned, place, Settings(density=density), progress=False)
        model, delta = load_model(base), Delta.load(place)
        delta.apply(model)
        assert_same(model, expected[density])
        delta.subtract(model)
        assert_same(model, expected[0.0])


def test_a_model_that_does_not_fit_is_refused_untouched(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    delta = Delta.load(tmp_path / "delta")
    other = load_model(tuned)
    before = state(other)
    with pytest.raises(ValueError, match="digest"):
        delta.apply(other)
    assert_same(other, before)
    other.resize_token_embeddings(100)
    with pytest.raises(ValueError, match=r"resize_token_embeddings"):
        delta.apply(other)
    with pytest.raises(ValueError, match="does not have"):
        delta.apply(nn.Linear(2, 2))


def test_untied_deltas_are_refused_on_a_tied_model(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "qwen")
    model = load_model(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = read(tuned)
    from safetensors.torch import save_file

    untied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    save_file(untied, tuned / "model.safetensors", metadata={"format": "pt"})
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        Delta.load(tmp_path / "delta").apply(model)


def test_a_delta_leaves_with_its_model(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    delta, model = Delta.load(tmp_path / "delta"), load_model(base)
    delta.apply(model)
    assert len(delta._applied) == 1
    del model
    import gc

    gc.collect()
    assert len(delta._applied) == 0
