"""Deltas on a loaded model: what is applied is the checkpoint, and what is subtracted leaves the base bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deltas.pairs import assert_same, read, same_bits, save_models, state
from torch import nn

from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.entries import add_entries, add_kept, put_entries
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.resident import Delta, swap
from sparse_ft.deltas.scope import Selection
from sparse_ft.deltas.store import DeltaFile
from sparse_ft.models import load_model

#: A norm that bf16 could not change is in no digest, so fine-tunes would differ in theirs.
MATRICES = Selection(exclude=("norms",), excluded="take-base")


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


def test_autocast_sees_what_was_applied(tmp_path: Path) -> None:
    """The scale search measures between apply and subtract; weights that need gradients are cast once per region."""
    base, *tuned = save_models(tmp_path, "llama", torch.float32, seeds=2)
    for number, place in enumerate(tuned):
        extract_delta(base, place, tmp_path / f"delta{number}", Settings(density=0.5, scale=0.01), progress=False)
    first, second = (Delta.load(tmp_path / f"delta{number}") for number in range(2))
    model = load_model(base).requires_grad_()
    ids = torch.arange(12).view(1, -1)
    found = {}
    for cached in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            outputs = [model(ids).logits]
            for change in (
                lambda: first.apply(model),
                lambda: swap(model, first, second),
                lambda: second.subtract(model),
            ):
                change()
                outputs.append(model(ids).logits)
        found[cached] = outputs
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    assert torch.equal(found[True][0], found[True][-1])
    assert len({tuple(output.flatten().tolist()) for output in found[True]}) == 3


@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_loops_give_the_bits_of_torch(threads: int, tmp_path: Path) -> None:
    base, *tuned = save_models(tmp_path, "qwen", seeds=2)
    # positions as integers, and as bits
    settings = [Settings(density=0.05, seed=1, selection=MATRICES), Settings("magnitude", 0.3, selection=MATRICES)]
    for number, place in enumerate(tuned):
        extract_delta(base, place, tmp_path / f"delta{number}", settings[number], progress=False)
        apply_checkpoint(base, tmp_path / f"delta{number}", tmp_path / f"out{number}", progress=False)
    first, second = (Delta.load(tmp_path / f"delta{number}") for number in range(2))
    assert first.header.base_digest == second.header.base_digest, "so that they are swapped tensor by tensor"
    model, before = load_model(base), state(load_model(base))
    expected = [state(load_model(tmp_path / f"out{number}")) for number in range(2)]
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first.apply(model)
        assert_same(model, expected[0])
        swap(model, first, second)
        assert_same(model, expected[1])
        swap(model, second, first)
        assert_same(model, expected[0])
        first.subtract(model)
    finally:
        torch.set_num_threads(usual)
    assert_same(model, before)
    large = "model.layers.0.mlp.up_proj.weight"
    assert (first._positions[large].dtype, second._positions[large].dtype) == (torch.int32, torch.uint8)


def test_a_swap_that_fails_in_the_middle_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, *tuned = save_models(tmp_path, "llama", seeds=2)
    for number, place in enumerate(tuned):
        settings = Settings(density=0.2, seed=number, selection=MATRICES)
        extract_delta(base, place, tmp_path / f"delta{number}", settings, progress=False)
    first, second = (Delta.load(tmp_path / f"delta{number}") for number in range(2))
    assert first.header.base_digest == second.header.base_digest, "so that they are swapped tensor by tensor"
    model = load_model(base)
    before = state(model)
    first.apply(model, scale=0.3)
    there = state(model)
    last = list(second._values)[-1]
    usual, second._values[last] = second._values[last], torch.full_like(second._values[last], 3e38)
    with pytest.raises(ValueError, match=f"'{last}': A weight becomes infinite"):
        swap(model, first, second)
    assert_same(model, there)
    assert (first.is_applied(model), second.is_applied(model), first.applied_scale(model)) == (True, False, 0.3)
    second._values[last] = usual
    second._positions.clear()
    monkeypatch.setattr(DeltaFile, "positions", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        swap(model, first, second)
    assert_same(model, there)
    monkeypatch.undo()
    for _ in range(2):
        swap(model, first, second)
        swap(model, second, first)
    first.subtract(model)
    assert_same(model, before)


def test_a_loop_adds_and_rounds_as_torch_does() -> None:
    """Every exponent, ties of the rounding, signed zeros, deltas of zero, and what is too large."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    flat = patterns[patterns.isfinite() & (patterns.abs() < 1e37)]
    index = torch.randperm(len(flat), generator=generator).sort().values[::3].int()
    values = (flat[index.long()].float() * (torch.randint(-8, 9, (len(index),), generator=generator) / 512)).bfloat16()
    values[::7] = 0.0
    for scale in (1.0, 0.3, 0.0078125):
        live = flat.clone()
        old = add_entries(live, index, values, scale)
        expected = flat.clone()
        expected[index.long()] = add_kept(flat[index.long()], values, scale, torch.bfloat16)
        assert same_bits(live, expected) and same_bits(old, flat[index.long()])
        put_entries(live, index, old)
        assert same_bits(live, flat)
    for bad in (3e38, float("nan"), float("inf")):
        spoiled = values.clone()
        spoiled[-1] = bad
        with pytest.raises(ValueError, match="infinite or NaN"):
            add_entries(live, index, spoiled, 0.1)
        assert same_bits(live, flat)


def test_a_write_by_a_loop_is_counted_as_torch_counts() -> None:
    """autograd tells by this count that a tensor it needs was written to."""
    weight = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    product = (weight * weight).sum()
    index = torch.tensor([3], dtype=torch.int32)
    old = add_entries(weight.detach(), index, torch.ones(1, dtype=torch.bfloat16), 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    put_entries(weight.detach(), index, old)
    assert weight._version == 2


def test_inference_tensors_take_a_delta(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.1), progress=False)
    with torch.inference_mode():
        model = load_model(base)
        before = state(model)
        delta = Delta.load(tmp_path / "delta")
        delta.apply(model)
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        delta.subtract(model)
        assert_same(model, before)


def test_a_scale_of_ones_own(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama", torch.float32)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    delta.apply(model, scale=0.5)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", scale=0.5, progress=False)
    assert_same(model, state(load_model(tmp_path / "out")))


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_a_scale_that_nothing_can_be_divided_by_is_refused_before_any_work(scale: float, tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    model, delta = load_model(base), Delta.load(tmp_path / "delta")
    before = state(model)
    with pytest.raises(ValueError, match="scale is"):
        delta.apply(model, scale=scale)
    assert_same(model, before)
    assert not delta.is_applied(model)
    with pytest.raises(ValueError, match="scale is"):
        apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", scale=scale, progress=False)
    with pytest.raises(ValueError, match=r"dtype is torch\.int8"):
        apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", dtype=torch.int8, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned0", "delta"}


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


def test_what_is_held_is_as_small_as_documented(tmp_path: Path) -> None:
    base, tuned = save_models(tmp_path, "llama")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.05), progress=False)
    delta, model = Delta.load(tmp_path / "delta"), load_model(base)
    kept = sum(values.numel() for values in delta._values.values())
    assert delta.nbytes == 2 * kept
    delta.prepare()
    ready = delta.nbytes
    assert 7 * kept < ready <= 8 * kept
    delta.apply(model)
    assert delta.nbytes == ready, "nothing is left to be found or allocated"
    delta.subtract(model)
    assert delta.nbytes <= 8 * kept
    other = load_model(base)
    for _ in range(2):
        delta.apply(model)
        delta.apply(other)
        assert delta.nbytes <= 10 * kept, "two models have two bases set aside"
        delta.subtract(model)
        delta.subtract(other)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype, tmp_path: Path) -> None:
    base, *tuned = save_models(tmp_path, "qwen", dtype, seeds=2)
    deltas = []
    for number, place in enumerate(tuned):
        settings = (Settings(density=0.05), Settings("magnitude", density=0.3))[number]
        extract_delta(base, place, tmp_path / f"delta{number}", settings, progress=False)
        apply_checkpoint(base, tmp_path / f"delta{number}", tmp_path / f"out{number}", progress=False)
        deltas.append(Delta.load(tmp_path / f"delta{number}"))
    model = load_model(base).to("cuda")
    before = state(model)
    deltas[0].apply(model)
    assert_same(model, {n: t.to("cuda") for n, t in state(load_model(tmp_path / "out0")).items()})
    swap(model, *deltas)
    assert_same(model, {n: t.to("cuda") for n, t in state(load_model(tmp_path / "out1")).items()})
    deltas[1].subtract(model)
    assert_same(model, before)
