"""TIES that trims a delta as one vector, against one stable sort of the whole delta."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from merging import merge_formulas as formulas
from merging.checkpoints import merge, prepare, read, write
from torch import Tensor

from sparse_ft.merging import chunks, whole_model
from sparse_ft.merging.whole_model import trim_whole_models

TEXT = """
merge_method: ties
base_model: @base
models:
  - {model: @a, parameters: {weight: 0.75, density: %g}}
  - {model: @b, parameters: {weight: 0.5, density: %g}}
trim: %s
dtype: float32
"""
SHAPES = {f"model.layers.{i}.mlp.up_proj.weight": (31, 20 + i) for i in range(4)} | {"model.norm.weight": (1,)}


@pytest.fixture(params=["smooth", "lattice", "all equal"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tensors whose deltas have different sizes, or so few different ones that many are equal at the cut."""
    monkeypatch.setattr(chunks, "CHUNK", 200)
    generator = torch.Generator().manual_seed(0)
    base = {name: (torch.randn(shape, generator=generator) * 8).round() / 8 for name, shape in SHAPES.items()}
    write(tmp_path / "base", base)
    for model in "ab":
        tuned = {}
        for i, (name, tensor) in enumerate(base.items()):
            noise = torch.randn(tensor.shape, generator=generator) * (0.1 + 0.2 * i)
            noise = {"smooth": noise, "lattice": (noise * 8).round() / 8, "all equal": torch.full_like(noise, 0.25)}
            tuned[name] = tensor + noise[request.param]
        write(tmp_path / model, tuned | {"model.extra": torch.ones(3)} if model == "b" else tuned)
    return tmp_path


def cut_by_sorting(place: Path, model: str, density: float) -> dict[str, Tensor]:
    """The deltas of a model after one cut through all of them, tensors in the order of the output."""
    base, tuned = read(place / "base"), read(place / model)
    names = [tensor.name for tensor in prepare(place, TEXT % (0.5, 0.5, "model")).planned.plan.tensors if tensor.base]
    whole = torch.cat([(tuned[name] - base[name]).reshape(-1) for name in names])
    kept = formulas.top(whole.double(), round(density * whole.numel()))
    parts = kept.split([base[name].numel() for name in names])
    return {name: part.view(base[name].shape) for name, part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("densities", [(0.2, 0.2), (0.1, 0.63), (0.001, 1.0), (0.0, 0.999)])
def test_the_cut_is_that_of_the_whole_delta(place: Path, densities: tuple[float, float]) -> None:
    out, base = merge(place, TEXT % (*densities, "model")), read(place / "base")
    cut = {model: cut_by_sorting(place, model, density) for model, density in zip("ab", densities, strict=True)}
    assert "trimmed as one vector (`trim: model`)" in (place / "out" / "README.md").read_text()
    for name in SHAPES:
        deltas = [cut["a"][name], cut["b"][name]]
        expected = formulas.elected(base[name], deltas, [0.75, 0.5], True, 1.0, False)
        torch.testing.assert_close(out[name].double(), expected, rtol=1e-6, atol=1e-6)


def test_counts_are_exact_for_any_threads_and_rounded_once(place: Path) -> None:
    plan = prepare(place, TEXT % (0.2, 0.37, "model")).planned.plan
    found = trim_whole_models(plan, 1)
    assert found == trim_whole_models(plan, 3)
    total = sum(math.prod(shape) for shape in SHAPES.values())
    for model, density in ((1, 0.2), (2, 0.37)):
        counts = [
            source.parameters["density"] * math.prod(tensor.shape)
            for tensor in found.tensors
            for source in tensor.sources
            if source.model == model
        ]
        assert sum(map(round, counts)) == round(density * total)
        assert all(abs(count - round(count)) < 1e-6 for count in counts)


def test_what_is_held_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        write(tmp_path / name, {f"model.layers.{i}.w": torch.randn(3, generator=generator) for i in range(60)})
    plan = prepare(tmp_path, TEXT % (0.2, 0.4, "model")).planned.plan
    histogram = whole_model._BINS * 8
    tracemalloc.start()
    try:
        trim_whole_models(plan, 2)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 24 * histogram, f"{most / histogram:.0f} histograms at once, of 60 tensors of two models"


def test_a_tensor_alone_is_the_model(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))})
    by_model, by_tensor = (merge(tmp_path, TEXT % (0.2, 0.4, trim)) for trim in ("model", "tensor"))
    assert torch.equal(by_model["w"], by_tensor["w"])


def test_what_cannot_be_trimmed_so_is_refused_before_any_work(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, {f"model.layers.{i}.w": torch.full((4,), float(seed)) for i in range(2)})
    text = TEXT % (0.2, 0.4, "model")
    for changed, reason in (
        (text.replace("method: ties", "method: dare_ties"), "'trim: model' is how the paper of ties trims"),
        (text + "compat: mergekit\n", "but this is ties with compat mergekit"),
        (text.replace("density: 0.2", "density: [0.2, 0.4]"), "at one density, but it has 0.2 and for .* 0.4"),
        (text.replace("trim: model", "trim: layer"), "Unknown trim 'layer'; give 'model'"),
    ):
        with pytest.raises(ValueError, match=reason):
            prepare(tmp_path, changed)
