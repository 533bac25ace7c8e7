"""From two checkpoints to a delta and back to a checkpoint, and what is refused before any work."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from deltas.pairs import UP, base_tensors, read, same_bits, save_models, tuned_tensors, write, write_pair

from sparse_ft.deltas import random_keep
from sparse_ft.deltas.apply import apply_checkpoint
from sparse_ft.deltas.dare import add_delta, dare
from sparse_ft.deltas.darex_moments import InputMoments
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.magnitude import magnitude_delta
from sparse_ft.deltas.scope import Selection
from sparse_ft.deltas.store import DELTA_FILE, DeltaFile
from sparse_ft.deltas.structural import structural_delta

Tensors = dict[str, torch.Tensor]


def restore(place: Path, base: Path, tuned: Path, settings: Settings) -> Tensors:
    """The tensors of the checkpoint that the delta makes of its base."""
    extract_delta(base, tuned, place / "delta", settings, progress=False, overwrite=True)
    apply_checkpoint(base, place / "delta", place / "out", progress=False, overwrite=True)
    return read(place / "out")


def places(directory: Path, base: Tensors, tuned: Tensors) -> tuple[Path, Path]:
    return write(directory / "base", base), write(directory / "tuned", tuned)


METHODS: dict[str, Callable[[torch.Tensor, str], torch.Tensor]] = {
    "dare": lambda delta, name: dare(delta, density=0.3, seed=2, name=name),
    "magnitude": lambda delta, name: magnitude_delta(delta, density=0.3),
    "structural": lambda delta, name: structural_delta(delta, density=0.3, seed=2, name=name, axis=0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_is_the_method_on_the_tensors(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_tensors(dtype)
    tuned = tuned_tensors(base)
    settings = Settings(method, 0.3, seed=2, dtype=torch.float32)
    found = restore(tmp_path, *places(tmp_path, base, tuned), settings)
    for name, tensor in base.items():
        expected = add_delta(tensor, METHODS[method](tuned[name].float() - tensor.float(), name))
        assert same_bits(found[name], expected), name


@pytest.mark.parametrize("excluded", ["keep-finetuned", "take-base"])
def test_weights_too_large_for_float16_are_named_wherever_they_come_from(excluded: str, tmp_path: Path) -> None:
    base = base_tensors()
    tuned = tuned_tensors(base)
    for name in (UP, "lm_head.weight"):
        spoiled = {n: {k: t.clone() for k, t in tensors.items()} for n, tensors in (("b", base), ("t", tuned))}
        for tensors in spoiled.values():
            tensors[name][1, 1] = 1e6
        selection = Selection(exclude=("lm_head",), excluded=excluded)
        places = write(tmp_path / f"base-{name}", spoiled["b"]), write(tmp_path / f"tuned-{name}", spoiled["t"])
        delta = tmp_path / f"delta-{name}"
        extract_delta(*places, delta, Settings(density=0.01, selection=selection), progress=False)
        with pytest.raises(ValueError, match=f"'{name}' has values beyond 65504"):
            apply_checkpoint(places[0], delta, tmp_path / "out", dtype=torch.float16, progress=False)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_not_kept_has_the_bits_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_tensors(dtype)
    base[UP][0, :8] = -0.0
    found = restore(tmp_path, *places(tmp_path, base, tuned_tensors(base)), Settings(density=0.3))
    for name, tensor in base.items():
        keep = torch.from_numpy(random_keep(tensor.numel(), 0.3, seed=0, name=name)).view(tensor.shape)
        assert same_bits(found[name][~keep], tensor[~keep])
        assert not torch.equal(found[name][keep], tensor[keep])


def test_the_cast_of_the_values_is_as_small_as_documented(tmp_path: Path) -> None:
    base = base_tensors(seed=5)
    tuned = tuned_tensors(base, size=1e-2)
    delta = extract_delta(*places(tmp_path, base, tuned), tmp_path / "d", Settings(density=0.999), progress=False)
    inexact = total = 0
    for name, tensor in base.items():
        exact = (tuned[name].float() - tensor.float()).flatten()[torch.from_numpy(delta.positions(name))]
        stored = delta.values(name).float()
        assert bool(((stored - exact).abs() <= exact.abs() / 256).all())
        first, second = (t.float().flatten()[torch.from_numpy(delta.positions(name))] for t in (tensor, tuned[name]))
        near = (first.sign() == second.sign()) & (first.abs() <= 2 * second.abs()) & (second.abs() <= 2 * first.abs())
        assert torch.equal(stored[near], exact[near])
        inexact, total = inexact + int((stored != exact).sum()), total + exact.numel()
    assert 0 < inexact < total


@pytest.mark.parametrize("method", ["dare", "magnitude", "structural"])
def test_density_one_is_the_fine_tune_and_density_zero_the_base(method: str, tmp_path: Path) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors(), size=0.1)
    tuned[UP][0] = -base[UP][0]
    pair = places(tmp_path, base, tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for density, expected in ((1.0, tuned), (0.0, base)):
            found = restore(tmp_path, *pair, Settings(method, density))
            assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def test_density_one_with_a_scale_is_rescaled(tmp_path: Path) -> None:
    base = base_tensors(torch.float32)
    tuned = tuned_tensors(base)
    found = restore(tmp_path, *places(tmp_path, base, tuned), Settings(density=1.0, scale=2.0))
    for name, tensor in base.items():
        assert torch.equal(found[name], tensor + (tuned[name] - tensor) / 2)


def test_shards_and_order_do_not_change_a_byte(tmp_path: Path) -> None:
    one, three = write_pair(tmp_path / "one"), write_pair(tmp_path / "three", shards=3)
    squares = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = {UP: InputMoments(1, squares, squares, math.nan, 1)}
    methods = ("dare", "magnitude", "structural", "wanda")
    for pair in (one, three):
        for method in methods:
            settings = Settings(method, 0.25, moments=moments if method == "wanda" else None)
            extract_delta(*pair, pair[0].parent / method, settings, progress=False)
    for method in methods:
        first, second = (place / method / DELTA_FILE for place in (tmp_path / "one", tmp_path / "three"))
        assert first.read_bytes() == second.read_bytes()
    apply_checkpoint(three[0], tmp_path / "one" / "dare", tmp_path / "out", progress=False)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == sorted(
        file.name for file in three[0].glob("*.safetensors")
    )
    apply_checkpoint(one[0], tmp_path / "one" / "dare", tmp_path / "single", progress=False)
    single, sharded = read(tmp_path / "single"), read(tmp_path / "out")
    assert all(same_bits(sharded[name], tensor) for name, tensor in single.items())


def test_float32_and_bfloat16_of_equal_value_give_the_same_delta(tmp_path: Path) -> None:
    narrow = base_tensors(), tuned_tensors(base_tensors())
    wide = [{name: tensor.float() for name, tensor in tensors.items()} for tensors in narrow]
    settings = Settings(density=0.1, dtype=torch.float32)
    deltas = []
    for number, (base, tuned) in enumerate((narrow, wide)):
        pair = places(tmp_path / str(number), dict(base), dict(tuned))
        deltas.append(extract_delta(*pair, tmp_path / f"delta{number}", settings, progress=False))
    assert deltas[0].header.base_digest == deltas[1].header.base_digest
    for (name, first), (other, second) in zip(deltas[0].tensors(), deltas[1].tensors(), strict=True):
        assert name == other and same_bits(first, second)


def test_seeds_and_names_give_different_masks(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    first = extract_delta(*pair, tmp_path / "a", Settings(density=0.2, seed=0), progress=False)
    second = extract_delta(*pair, tmp_path / "b", Settings(density=0.2, seed=1), progress=False)
    layers = [UP, UP.replace("0", "1")]
    found = {tuple(delta.positions(name)) for delta in (first, second) for name in layers}
    assert len(found) == 4


def test_heads_buffers_and_resized_vocabularies(tmp_path: Path) -> None:
    base = base_tensors()
    tuned = tuned_tensors(base)
    tuned["score.weight"] = torch.randn(3, 16).bfloat16()
    base["score.weight"], tuned["classifier.bias"] = torch.zeros(2, 16).bfloat16(), torch.ones(3).bfloat16()
    tuned["model.position_ids"] = torch.arange(48) + 1
    base["model.position_ids"] = torch.arange(48)
    tuned["model.rotary_emb.inv_freq"], base["model.rotary_emb.inv_freq"] = torch.ones(4), torch.zeros(4)
    tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], torch.ones(5, 16).bfloat16()])
    tuned["lm_head.weight"] = tuned["lm_head.weight"][:40].clone()
    base["only.in.base"] = torch.ones(7)
    with pytest.warns(UserWarning, match=r"only\.in\.base"):
        found = restore(tmp_path, *places(tmp_path, base, tuned), Settings(density=0.25))
    whole = ("score.weight", "classifier.bias", "model.position_ids", "model.rotary_emb.inv_freq")
    assert all(same_bits(found[name], tuned[name]) for name in whole)
    assert same_bits(found["only.in.base"], base["only.in.base"])
    embedding, head = found["model.embed_tokens.weight"], found["lm_head.weight"]
    assert same_bits(embedding[48:], tuned["model.embed_tokens.weight"][48:]) and embedding.shape == (53, 16)
    assert head.shape == (40, 16)
    for name, rows in (("model.embed_tokens.weight", 48), ("lm_head.weight", 40)):
        keep = torch.from_numpy(random_keep(rows * 16, 0.25, seed=0, name=name)).view(rows, 16)
        assert same_bits(found[name][:rows][~keep], base[name][:rows][~keep])
        assert not torch.equal(found[name][:rows][keep], base[name][:rows][keep])


@pytest.mark.parametrize("policy", ["keep-finetuned", "take-base"])
def test_excluded_tensors_are_the_fine_tunes_or_the_bases(policy: str, tmp_path: Path) -> None:
    base, tuned = base_tensors(), tuned_tensors(base_tensors())
    selection = Selection(exclude=("embeddings", r"q_proj"), excluded=policy)
    found = restore(tmp_path, *places(tmp_path, base, tuned), Settings(density=0.2, selection=selection))
    source = tuned if policy == "keep-finetuned" else base
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert same_bits(found[name], source[name])
    assert not torch.equal(found[UP], base[UP]) and not torch.equal(found[UP], tuned[UP])


@pytest.mark.parametrize("stored_twice", ["base", "tuned", "both"])
def test_tied_weights_are_dealt_with_once_and_stay_tied(stored_twice: str, tmp_path: Path) -> None:
    tensors = {"base": base_tensors(), "tuned": tuned_tensors(base_tensors())}
    for name, entries in tensors.items():
        del entries["lm_head.weight"]
        if stored_twice in (name, "both"):
            entries["lm_head.weight"] = entries["model.embed_tokens.weight"].clone()
    pair = places(tmp_path, tensors["base"], tensors["tuned"])
    found = restore(tmp_path, *pair, Settings(density=0.2))
    delta = DeltaFile(tmp_path / "delta")
    assert set(delta.header.aliases) | set(delta.header.aliases.values()) == {
        "lm_head.weight", "model.embed_tokens.weight"
    }  # fmt: skip
    assert sum("embed" in name or "lm_head" in name for name, _ in delta.tensors()) == 1
    assert same_bits(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], tensors["base"]["model.embed_tokens.weight"])


def test_tiny_and_zero_tensors(tmp_path: Path) -> None:
    base = {**base_tensors(), "model.one": torch.ones(1), "model.scalar": torch.ones(()), "model.none": torch.ones(0)}
    tuned = {**tuned_tensors(base_tensors()), "model.one": torch.full((1,), 1.5)}
    tuned |= {"model.scalar": torch.full((), 1.25), "model.none": torch.ones(0)}
    tuned[UP] = base[UP].clone()
    for method in ("dare", "magnitude", "structural"):
        found = restore(tmp_path, *places(tmp_path, base, tuned), Settings(method, 0.5))
        assert all(bool(tensor.isfinite().all()) for tensor in found.values())
        assert same_bits(found[UP], base[UP]) and found["model.none"].shape == (0,)
        assert float(found["model.scalar"]) in (1.0, 1.25, 1.5)
    assert not any(UP in name for name, _ in DeltaFile(tmp_path / "delta").tensors()), "no change takes no place"


def test_only_what_differs_from_the_base_lies_beside_the_delta(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    (base / "tokenizer.json").write_text("{}")
    (tuned / "tokenizer.json").write_text("{}")
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    assert {file.name for file in (tmp_path / "delta").iterdir()} == {DELTA_FILE, "delta.json", "chat_template.jinja"}
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= {f.name for f in (tmp_path / "out").iterdir()}


def test_a_wrong_base_is_told(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    other = write(tmp_path / "other", base_tensors(seed=9))
    with pytest.warns(UserWarning, match=r"mean \|delta\| is 0\.02"):
        extract_delta(other, tuned, tmp_path / "doubtful", Settings(density=0.2), progress=False)
    record = json.loads((tmp_path / "doubtful" / "delta.json").read_text())
    assert 0.015 < record["mean_absolute_delta"] < 0.03
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_delta(base, tuned, tmp_path / "delta", Settings(density=0.2), progress=False)
    with pytest.raises(ValueError, match="digest"):
        apply_checkpoint(other, tmp_path / "delta", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    apply_checkpoint(other, tmp_path / "delta", tmp_path / "out", check_base=False, progress=False)


def _rename(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"transformer.{name}"] = tensors.pop(name)


def _wider(tensors: Tensors) -> None:
    tensors[UP] = torch.zeros(40, 20).bfloat16()


def _taller_inside_a_block(tensors: Tensors) -> None:
    tensors[UP] = torch.zeros(44, 16).bfloat16()


def _nan(tensors: Tensors) -> None:
    tensors[UP][1, 1] = math.nan


WRONG: dict[str, tuple[Callable[[Tensors], None], tuple[str, ...]]] = {
    "another architecture": (_rename, ("0 of", "architecture")),
    "another width": (_wider, (UP, "(40, 16)", "(40, 20)")),
    "other rows inside a block": (_taller_inside_a_block, (UP, "(40, 16)", "(44, 16)")),
    "NaN": (_nan, (UP, "NaN")),
}


@pytest.mark.parametrize("case", WRONG)
def test_checkpoints_that_do_not_fit(case: str, tmp_path: Path) -> None:
    tuned = tuned_tensors(base_tensors())
    WRONG[case][0](tuned)
    pair = places(tmp_path, base_tensors(), tuned)
    with pytest.raises(ValueError) as refusal:
        extract_delta(*pair, tmp_path / "delta", Settings(density=0.2), progress=False)
    assert all(part in str(refusal.value) for part in WRONG[case][1]), str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("settings", [
    {"density": math.nan}, {"density": -0.1}, {"density": 1.5}, {"scale": 0.0}, {"scale": math.nan}, {"method": "dar"},
    {"method": "magnitude", "scale": 0.5}, {"method": "wanda"}, {"dtype": torch.int8},
])  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Settings(**settings)


@pytest.mark.parametrize("selection", [{"preset": "al"}, {"excluded": "drop"}, {"exclude": ("(",)}])
def test_selections_that_cannot_be(selection: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Selection(**selection)


def test_files_that_are_damaged_or_lead_away(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, shards=2)
    shard = tuned / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    with pytest.raises(ValueError, match="truncated"):
        extract_delta(base, tuned, tmp_path / "delta", progress=False)
    shard.write_bytes(content)
    index = tuned / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"][UP] = "../base/model-00001-of-00002.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="outside"):
        extract_delta(base, tuned, tmp_path / "delta", progress=False)
    with pytest.raises(ValueError, match="input"):
        extract_delta(base, base, base, progress=False, overwrite=True)
    with pytest.raises(ValueError, match="quantised"):
        extract_delta(base, write(tmp_path / "q", base_tensors(), config={"quantization_config": {"bits": 4}}), "x")
    assert not (tmp_path / "delta").exists()


FULL_DISK = """
import resource, sys, torch
from sparse_ft.deltas.extract import Settings, extract_delta
from sparse_ft.deltas.apply import apply_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
for work in (lambda: extract_delta("base", "tuned", "delta", Settings(density=0.9), progress=False),
             lambda: apply_checkpoint("base", "small", "out", progress=False)):
    try:
        work()
    except RuntimeError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path)
    extract_delta(base, tuned, tmp_path / "small", Settings(density=0.01), progress=False)
    before = sorted(path.name for path in tmp_path.iterdir())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("Could not write") == 2, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_real_pair_gives_a_model_that_runs(tmp_path: Path) -> None:
    from tiny_models import tiny_batch

    from sparse_ft.models import load_model

    base, tuned = save_models(tmp_path, "gpt2", torch.float32)
    extract_delta(base, tuned, tmp_path / "delta", Settings(density=1.0), progress=False)
    apply_checkpoint(base, tmp_path / "delta", tmp_path / "out", progress=False)
    first, second = load_model(tuned), load_model(tmp_path / "out")
    batch = tiny_batch(first)
    assert torch.equal(first(**batch).logits, second(**batch).logits)
