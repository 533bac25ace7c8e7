"""What must hold for every merge, from YAML to files; each test names its invariant.

The same properties are tested closer to the arithmetic in `test_merge_methods.py` (1-7, 9-12, 15), `test_engine.py`
(16), `test_planning.py` (13), `test_soups.py` (14), `test_vocabulary.py` (17) and, for adapters that stay adapters,
`adapters/test_adapter_combining.py` (18).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from merging.checkpoints import merge, near, prepare, read, write
from merging.lora import write_lora
from safetensors.torch import save_file
from torch import Tensor

from sparse_ft.deltas.random_mask import random_uniform
from sparse_ft.masks import MaskSet
from sparse_ft.merging.della import della, keep_probabilities
from sparse_ft.merging.families import FAMILIES
from sparse_ft.merging.soups import soup

MATRIX = "model.layers.0.mlp.up_proj.weight"
DELTA = [name for name, family in FAMILIES.items() if family.needs_base and name != "slerp"]
SETTINGS = "density: %s, weight: %s, gamma: 0, epsilon: 0.1, q: %s"


def tensors_of(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (9, 8), "model.norm.weight": (8,), "lm_head.weight": (9, 8)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and three fine-tunes in bfloat16, and a base of zeros."""
    base = {name: tensor.bfloat16() for name, tensor in tensors_of().items()}
    write(tmp_path / "base", base, hidden_size=8)
    write(tmp_path / "zero", {name: tensor * 0 for name, tensor in base.items()}, hidden_size=8)
    for seed, name in enumerate("abc", 1):
        tuned = near({key: tensor.float() for key, tensor in base.items()}, seed, 0.1)
        write(tmp_path / name, {key: tensor.bfloat16() for key, tensor in tuned.items()}, hidden_size=8)
    return tmp_path


def yaml(method: str, models: Mapping[str, str], base: str = "base", **keys: object) -> str:
    """A configuration; `models` has the parameters of each."""
    entries = ", ".join(f"{{model: @{name}, parameters: {{{settings}}}}}" for name, settings in models.items())
    more = "".join(f"{key}: {value}\n" for key, value in keys.items())
    head = "" if method == "linear" else f"base_model: @{base}\n"
    return f"merge_method: {method}\n{head}models: [{entries}]\n{more}"


def one(density: object = 1, weight: object = 1, q: float = 1) -> str:
    return SETTINGS % (density, weight, q)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("method", DELTA)
def test_1_one_whole_model_is_itself_and_2_without_weight_the_base(place: Path, method: str, compat: str) -> None:
    assert same(merge(place, yaml(method, {"a": one()}, compat=compat)), read(place / "a"))
    assert same(merge(place, yaml(method, {"a": one(0.5, 0), "b": one(0.5, 0)}, compat=compat)), read(place / "base"))


@pytest.mark.parametrize("method", DELTA)
def test_3_the_change_is_proportional_to_lambda(place: Path, method: str) -> None:
    models = {"a": one(0.5, 0.75), "b": one(0.5, 0.5)}
    changes = [
        merge(place, yaml(method, models, "zero", parameters=f"{{lambda: {lam}}}", dtype="float32"))
        for lam in (0.5, 1.0)
    ]
    for name, change in changes[0].items():
        assert torch.equal(2 * change, changes[1][name])


@pytest.mark.parametrize("method", [name for name in FAMILIES if name != "slerp"])
def test_4_the_order_of_the_models_changes_nothing(place: Path, method: str) -> None:
    settings = [one(0.5, weight) for weight in (0.75, 0.25, 1.125)]
    settings = [text.split(",")[1] if method == "linear" else text for text in settings]
    forward = merge(place, yaml(method, dict(zip("abc", settings, strict=True)), dtype="float32"))
    backward = merge(place, yaml(method, dict(zip("cba", settings[::-1], strict=True)), dtype="float32"))
    for name, tensor in forward.items():
        torch.testing.assert_close(tensor, backward[name], rtol=1e-5, atol=1e-6)


def test_5_the_average_of_equal_models_is_the_model(place: Path) -> None:
    shutil.copytree(place / "a", place / "again")
    assert same(merge(place, yaml("linear", {"a": "weight: 0.3", "again": "weight: 0.9"})), read(place / "a"))


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_6_deltas_of_one_sign_give_their_mean_and_7_entries_the_elected_sign(place: Path, compat: str) -> None:
    for name in "abc":
        write(place / f"up_{name}", {key: tensor.abs() for key, tensor in read(place / name).items()}, hidden_size=8)
    weights = dict(zip("abc", (0.75, 0.25, 1.0), strict=True))
    up = {f"up_{name}": one(1, weight) for name, weight in weights.items()}
    for key, tensor in merge(place, yaml("ties", up, "zero", compat=compat, dtype="float32")).items():
        mean = sum(w * read(place / f"up_{name}")[key].double() for name, w in weights.items()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-5, atol=1e-6)
    models = {name: one(1, weight) for name, weight in weights.items()}
    for key, tensor in merge(place, yaml("ties", models, "zero", compat=compat, dtype="float32")).items():
        voices = [(w if compat == "mergekit" else 1.0, read(place / name)[key].double()) for name, w in weights.items()]
        votes = sum(voice * delta for voice, delta in voices)
        assert bool(((tensor.sign() == votes.sign()) | (tensor == 0) | (votes == 0)).all())


@pytest.mark.parametrize("method", FAMILIES)
def test_8_int8_mask_changes_no_bit(place: Path, method: str) -> None:
    models = {"a": one(0.5)} if method == "slerp" else {"a": one(0.5), "b": one(0.4, 0.5)}
    on, off = (
        merge(place, yaml(method, models, parameters=f"{{t: 0.3, int8_mask: {flag}}}")) for flag in ("true", "false")
    )
    assert same(on, off)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"])
def test_9_rescaling_by_l1_keeps_the_norm(place: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The path that names a model keys its mask: a relative one draws the same everywhere, and keeps something of all.
    monkeypatch.chdir(place)
    text = yaml(method, {"a": one(0.4)}, "zero", compat="mergekit", parameters="{rescale: true}", dtype="float32")
    for name, merged in merge(Path("."), text).items():
        whole = read(place / "a")[name].double().abs().sum()
        assert float(merged.double().abs().sum()) == pytest.approx(float(whole), rel=1e-5)


def test_9_the_papers_rescaling_is_right_on_average(place: Path) -> None:
    delta = read(place / "a")[MATRIX].float()
    generator, total, runs = torch.Generator().manual_seed(0), torch.zeros_like(delta), 400
    for _ in range(runs):
        numbers = torch.rand(delta.shape, generator=generator)
        total += della(torch.zeros_like(delta), [delta], [1], [0.5], [0.2], [numbers], elect=False, normalize=False)
    pi = keep_probabilities(delta, 0.5, 0.2)
    error = (total / runs - delta).double() / (delta.abs() * ((1 - pi) / pi / runs).sqrt())
    assert abs(float(error.mean())) < 4 / math.sqrt(delta.numel()) and float(error.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("density", [0.3, 0.9, 0.999])
def test_10_breadcrumbs_keep_exactly_their_share(place: Path, density: float) -> None:
    merged = merge(place, yaml("breadcrumbs", {"a": f"weight: 1, density: {density}, gamma: 0.05"}, "zero"))
    for tensor in merged.values():
        assert int((tensor != 0).sum()) == int(density * tensor.numel())


def test_11_della_keeps_its_share_and_large_entries_more_often(tmp_path: Path) -> None:
    delta = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    for name, tensor in (("zero", delta * 0), ("a", delta)):
        write(tmp_path / name, {MATRIX: tensor})
    text = yaml("della_linear", {"a": one(0.6)}, "zero", parameters="{rescale: false}")
    kept = merge(tmp_path, text)[MATRIX] != 0
    assert float(kept.float().mean()) == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / delta.numel()))
    ranks = delta.abs().argsort(dim=1).argsort(dim=1)
    shares = [float(kept[(ranks >= low) & (ranks < low + 50)].float().mean()) for low in range(0, 200, 50)]
    assert shares == sorted(shares) and shares[-1] - shares[0] == pytest.approx(2 * 0.1 * 0.75, abs=0.02)
    numbers = random_uniform(delta.numel(), seed=0, name=MATRIX, role=f"{tmp_path}/a").reshape(delta.shape)
    assert torch.equal(kept, torch.from_numpy(numbers) < keep_probabilities(delta, 0.6, 0.1))


def test_12_slerp_ends_at_its_models_and_keeps_their_length_between(place: Path) -> None:
    for name in ("base", "a"):
        unit = {key: tensor.float() / tensor.float().norm() for key, tensor in read(place / name).items()}
        unit = {key: -tensor.flip(0) if name == "a" else tensor for key, tensor in unit.items()}  # far from the base
        write(place / name, unit, hidden_size=8)
    for t, end in ((0, "base"), (1, "a")):
        assert same(merge(place, yaml("slerp", {"a": ""}, parameters=f"{{t: {t}}}")), read(place / end))
    for key, tensor in merge(place, yaml("slerp", {"a": ""}, parameters="{t: 0.3}")).items():
        assert float(tensor.norm()) == pytest.approx(1, rel=1e-5), key


def test_13_a_gradient_begins_and_ends_with_the_layers_and_the_head_has_its_first_value(place: Path) -> None:
    plan = prepare(place, yaml("ties", {"a": one("[0.2, 0.8]"), "b": one()})).planned.plan
    found = {tensor.name: tensor.sources[0].parameters["density"] for tensor in plan.tensors}
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.2, pytest.approx(0.5), 0.8]
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == found["model.norm.weight"] == 0.2


@pytest.mark.parametrize("method", FAMILIES)
def test_14_models_that_share_a_mask_keep_it(place: Path, method: str) -> None:
    shape = (24, 16)
    masks = MaskSet.from_scores({MATRIX: torch.rand(shape, generator=torch.Generator().manual_seed(1))}, sparsity=0.6)
    for name in ("base", "a", "b"):
        tensors = read(place / name)
        masks.apply_({MATRIX: tensors[MATRIX]})
        write(place / name, tensors, hidden_size=8)
        masks.save(place / name)
    models = {"a": one(0.5)} if method == "slerp" else {"a": one(0.5), "b": one(0.4)}
    out = merge(place, yaml(method, models, parameters="{t: 0.4}", preserve_masks="shared"))
    assert MaskSet.load(place / "out") == masks and not out[MATRIX][~masks[MATRIX]].any()
    assert not torch.signbit(out[MATRIX][~masks[MATRIX]]).any(), "a pruned weight is +0"
    if method == "linear":
        members = [read(place / name) for name in "ab"]
        counts = {int((member[MATRIX] != 0).sum()) for member in [*members, soup(members, masks), out]}
        assert counts == {masks.counts()[MATRIX][0]}, "a soup has as many weights as each member"


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "linear"])
def test_14_dense_models_revive_nothing_inside_the_mask_of_their_base(place: Path, method: str) -> None:
    mask = torch.rand(24, 16, generator=torch.Generator().manual_seed(2)) < 0.5
    tensors = read(place / "base")
    MaskSet({MATRIX: mask}).apply_({MATRIX: tensors[MATRIX]})
    write(place / "base", tensors, hidden_size=8)
    MaskSet({MATRIX: mask}).save(place / "base")
    text = yaml(method, {"a": one(0.5), "b": one(0.4)}).replace(
        "merge_method: linear\n", "merge_method: linear\nbase_model: @base\n"
    )
    free, kept = merge(place, text + "preserve_masks: off\n"), merge(place, text + "preserve_masks: base\n")
    assert bool(free[MATRIX][~mask].any()), "without it zeros fill up"
    assert torch.equal(kept[MATRIX], torch.where(mask, free[MATRIX], 0)) and not kept[MATRIX][~mask].signbit().any()
    assert same(
        {n: t for n, t in kept.items() if n in free and n != MATRIX}, {n: t for n, t in free.items() if n != MATRIX}
    )


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("method", FAMILIES)
def test_15_single_entries_zeros_and_tiny_densities_give_numbers(tmp_path: Path, method: str, compat: str) -> None:
    shapes = [(1,), (1, 1), (7, 1), (1, 7), (5,), (3, 4), (0, 4)]
    base = {f"model.layers.{i}.x.weight": torch.full(shape, 0.5) for i, shape in enumerate(shapes)}
    write(tmp_path / "base", base)
    write(tmp_path / "a", base)
    write(tmp_path / "b", {name: tensor + 1 for name, tensor in base.items()})
    for density in (0, 1e-9, 0.5, 1):
        settings = f"weight: 1, gamma: 0.01, q: 0.5, density: {density}, epsilon: 1.0e-10"
        for models in ("a", "ab"[: 1 if method == "slerp" else 2]):
            text = yaml(method, dict.fromkeys(models, settings), compat=compat, parameters="{t: 0.5}")
            out = merge(tmp_path, text)
            assert all(bool(tensor.isfinite().all()) for tensor in out.values())
            assert {name: tensor.shape for name, tensor in out.items()} == {n: t.shape for n, t in base.items()}
            if models == "a":
                assert same(out, base), "no difference, no change"


@pytest.mark.parametrize("method", ["dare_ties", "ties", "della", "slerp"])
def test_16_the_files_of_the_inputs_change_nothing(place: Path, method: str) -> None:
    models = {"a": one(0.5)} if method == "slerp" else {"a": one(0.5), "b": one(0.4)}
    text = yaml(method, models, parameters="{t: 0.4}")
    whole = merge(place, text)
    for name in ("base", "a", "b"):
        tensors = read(place / name)
        names = sorted(tensors, reverse=name == "a")
        parts = [names[i::3] for i in range(3)] if name != "b" else [[key] for key in names]
        files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
        (place / name / "model.safetensors").unlink()
        for file, part in zip(files, parts, strict=True):
            save_file({key: tensors[key] for key in part}, place / name / file)
        weight_map = {key: file for file, part in zip(files, parts, strict=True) for key in part}
        (place / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(merge(place, text), whole)


def test_17_every_row_of_a_union_is_bit_for_bit_the_row_it_comes_from(tmp_path: Path) -> None:
    ids = {"base": {"<unk>": 0, "x": 1, "y": 2}, "a": {"<unk>": 0, "z": 1, "y": 2, "x": 3}, "b": {"<unk>": 0, "v": 1}}
    table = "model.embed_tokens.weight"
    for seed, (name, words) in enumerate(ids.items()):
        rows = torch.randn(len(words), 8, generator=torch.Generator().manual_seed(seed)).bfloat16()
        write(tmp_path / name, {table: rows, MATRIX: torch.ones(2, 2).bfloat16()}, words, hidden_size=8)
    rows = {name: read(tmp_path / name)[table] for name in ids}
    for weights, order in (((0, 0), ("base", "a", "b")), ((1, 0), ("a", "base", "b"))):
        models = dict(zip("ab", (f"weight: {weight}" for weight in weights), strict=True))
        out = merge(tmp_path, yaml("task_arithmetic", models, tokenizer_source="union"))[table]
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
        assert set(found) == set().union(*ids.values())
        for word, place in found.items():
            origin = next(name for name in order if word in ids[name])
            assert torch.equal(out[place], rows[origin][ids[origin][word]]), (word, origin)


def test_18_adapters_merge_as_their_products_whatever_their_ranks(place: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    factors, weights = {}, {"one": 0.75, "two": -0.5}
    for name, rank in (("one", 2), ("two", 5)):
        factors[name] = (torch.randn(rank, 16, generator=generator), torch.randn(24, rank, generator=generator))
        write_lora(place / name, {MATRIX: factors[name]}, alpha=3)
    scaled = [(w * 3 / len(factors[n][0]) * factors[n][1], factors[n][0]) for n, w in weights.items()]
    wide = (torch.cat([a for _, a in scaled]), torch.cat([b for b, _ in scaled], dim=1))
    write_lora(place / "cat", {MATRIX: wide}, alpha=7)
    models = {f"base+@{name}": f"weight: {weight}" for name, weight in weights.items()}
    merged = merge(place, yaml("task_arithmetic", models, dtype="float32"))
    concatenated = merge(place, yaml("task_arithmetic", {"base+@cat": "weight: 1"}, dtype="float32"))
    products = sum((b.double() @ a.double() for b, a in scaled), torch.zeros(24, 16, dtype=torch.float64))
    for found in (merged, concatenated):
        change = found[MATRIX].double() - read(place / "base")[MATRIX].double()
        torch.testing.assert_close(change, products, rtol=1e-5, atol=1e-5)
