"""The command `delta`: every action on real files, and every refusal without a trace."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli.delta_place import write_place
from cli.refusals import Command, refused
from cli.workspace import tree
from deltas.pairs import read, same_bits

from sparse_ft.data import calibration_batches
from sparse_ft.deltas.store import DELTA_FILE, DeltaFile
from sparse_ft.deltas.structural import structural_keep
from sparse_ft.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `tuned`, `text` and a delta of density 0.1, read only."""
    return write_place(tmp_path_factory.mktemp("delta"))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def words(place: Path, **options: object) -> Iterator[object]:
    """A prune command that works, but for the options given; None takes one out."""
    defaults = {"base": place / "base", "finetuned": place / "tuned", "output_dir": place / "out"}
    yield "delta"
    for name, value in {**defaults, **options}.items():
        if value is not None:
            yield f"--{name}"
            yield from value if isinstance(value, list) else [] if value is True else [value]


@pytest.mark.parametrize("method", ["dare", "magnitude", "structural"])
def test_prune_info_and_apply(method: str, place: Path, command: Command) -> None:
    result = command(*words(place, method=method, density=0.1, seed=3))
    assert result.code == 0, result.err
    header = DeltaFile(place / "out").header
    assert (header.method, header.density, header.seed) == (method, 0.1, 3)
    record = json.loads((place / "out" / "delta.json").read_text())
    assert record["command"].startswith("sparse-ft delta --base") and record["total"] > record["kept"] > 0
    again = command("delta", "info", place / "out")
    assert again.code == 0 and again.out.splitlines()[1] in result.out and f"method {method}" in again.out
    applied = command("delta", "apply", place / "out", "--base", place / "base", "--output_dir", place / "new")
    assert applied.code == 0, applied.err
    found, base, tuned = read(place / "new"), read(place / "base"), read(place / "tuned")
    assert found.keys() == tuned.keys()
    changed = sum(int((found[name] != base[name]).sum()) for name in base)
    assert 0.05 < changed / sum(tensor.numel() for tensor in base.values()) < 0.15
    assert (place / "new" / "tokenizer.json").exists() and (place / "new" / "config.json").exists()


def test_structural_drops_whole_neurons(place: Path, command: Command) -> None:
    assert command(*words(place, method="structural", axis="neuron", density=0.4)).code == 0
    delta = DeltaFile(place / "out")
    kept = {}
    for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        dense = delta.delta(f"model.layers.0.mlp.{name}.weight") != 0
        kept[name] = dense.any(axis)
        assert torch.equal(dense.all(axis), kept[name]), "a neuron is kept or dropped as a whole"
    assert torch.equal(kept["gate_proj"], kept["up_proj"]) and torch.equal(kept["up_proj"], kept["down_proj"])
    assert 0 < int(kept["up_proj"].sum()) < 48


def test_wanda_keeps_an_exact_share_of_every_row(place: Path, command: Command) -> None:
    options = {"method": "wanda", "density": 0.25, "dataset": place / "text", "samples": 4, "sequence_length": 16}
    result = command(*words(place, **options))
    assert result.code == 0, result.err
    delta = DeltaFile(place / "out")
    rows = (delta.delta("model.layers.1.self_attn.q_proj.weight") != 0).sum(1)
    assert rows.tolist() == [8] * 32
    assert delta.kept("model.embed_tokens.weight") == 96 * 32 / 4


@pytest.mark.parametrize("objective", ["output_change", "perplexity"])
def test_darex_q_searches_its_scale(objective: str, place: Path, command: Command) -> None:
    options = {"method": "darex_q", "density": 0.05, "dataset": place / "text", "samples": 3, "sequence_length": 16}
    result = command(*words(place, objective=objective, **options))
    assert result.code == 0, result.err
    header = DeltaFile(place / "out").header
    tried = [line.split() for line in result.out.splitlines() if line.startswith("  scale")]
    best = min(tried, key=lambda line: float(line[-1]))
    assert float(tried[0][1]) == 0.05, "the density comes first, so the result is never worse than DARE on the text"
    assert math.isclose(header.scale, float(best[1]), rel_tol=1e-5)


def test_search_changes_the_scale_alone(place: Path, command: Command) -> None:
    before = dict(DeltaFile(place / "delta").tensors())
    options = ["--dataset", place / "text", "--samples", 3, "--sequence_length", 16]
    result = command("delta", "search", place / "delta", "--base", place / "base", *options)
    assert result.code == 0, result.err
    assert "by perplexity" in result.out
    delta = DeltaFile(place / "delta")
    assert all(same_bits(tensor, before[name]) for name, tensor in delta.tensors())
    assert (place / "delta" / "delta.json").exists()
    assert f"-> {delta.header.scale:.6g}" in result.out


def test_the_scale_of_whole_neurons_is_searched_with_whole_neurons(place: Path, command: Command) -> None:
    """Single entries make less noise than neurons at the same density, so their scale would be another."""
    assert command(*words(place, method="structural", axis="neuron", density=0.4)).code == 0
    options = ["--finetuned", place / "tuned", "--dataset", place / "text", "--samples", 3, "--sequence_length", 16]
    result = command("delta", "search", place / "out", "--base", place / "base", *options)
    assert result.code == 0, result.err
    first = next(line for line in result.out.splitlines() if line.startswith("  scale"))
    base, tuned, header = read(place / "base"), read(place / "tuned"), DeltaFile(place / "out").header
    model = load_model(place / "tuned").eval()
    tokenizer = load_tokenizer(place / "tuned")
    drawn = calibration_batches(str(place / "text"), tokenizer, samples=3, sequence_length=16, seed=0, split="train")
    batches = torch.cat([batch["input_ids"] for batch in drawn])
    with torch.no_grad():
        top = model(batches).logits.topk(5)
        for name, part in header.tensors.items():
            if part.kind != "delta":
                continue
            assert part.mask == "slices"
            keep = structural_keep(part.shape[part.axis], density=0.4, seed=0, name=part.key or name, role="search")
            keep = keep.view([-1 if axis == part.axis else 1 for axis in range(len(part.shape))])
            model.get_parameter(name).copy_(base[name] + torch.where(keep, tuned[name] - base[name], 0) / 0.4)
        change = float((model(batches).logits.gather(-1, top.indices) - top.values).square().mean())
    assert float(first.split()[1]) == 0.4 and float(first.split()[-1]) == pytest.approx(change, rel=1e-3)


SEARCHES: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "density one": ({"density": 1}, ("density 1", "between 0 and 1")),
    "unknown objective": ({"objective": "perplexty"}, ("perplexty", "Did you mean 'perplexity'?")),
    "largest scale below the first": ({"density": 0.1, "max_scale": 0.05}, ("0.05", "0.1")),
    "an adapter": ({"finetuned": "adapter"}, ("adapter", "merge it")),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_search_that_cannot_work_is_refused_before_the_delta_is_made(
    case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("sparse_ft.cli.delta_prune.write_delta", lambda *_, **__: pytest.fail("work has begun"))
    options, naming = SEARCHES[case]
    refused(command, place, *words(place, method="darex_q", dataset="text", **options), naming=naming)


def test_density_one_comes_back_bit_for_bit(place: Path, command: Command) -> None:
    assert command(*words(place, density=1)).code == 0
    apply = ["delta", "apply", place / "out", "--base", place / "base", "--output_dir", place / "new"]
    assert command(*apply).code == 0
    assert (place / "new" / "model.safetensors").read_bytes() == (place / "tuned" / "model.safetensors").read_bytes()


def test_a_recipe_and_the_command_line(place: Path, command: Command) -> None:
    result = command(*words(place, config="delta/llama_dare_99", density=0.3))
    assert result.code == 0, result.err
    assert DeltaFile(place / "out").header.density == 0.3


REFUSALS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown option": ({"densty": 0.1}, ("--densty", "Did you mean '--density'?")),
    "unknown method": ({"method": "dar"}, ("dar", "Did you mean 'dare'?")),
    "density nan": ({"density": "nan"}, ("density", "nan")),
    "density above one": ({"density": 1.5}, ("density", "1.5")),
    "scale zero": ({"scale": 0}, ("scale", "0")),
    "scale of magnitude": ({"method": "magnitude", "scale": 0.1}, ("scale", "0.1", "magnitude")),
    "darex_q without a text": ({"method": "darex_q"}, ("darex_q", "--dataset")),
    "wanda without a text": ({"method": "wanda"}, ("wanda", "--dataset")),
    "a text for dare": ({"dataset": "text"}, ("dare", "--dataset")),
    "unknown preset": ({"preset": "encodr"}, ("encodr", "encoder")),
    "unknown policy": ({"excluded": "drop"}, ("drop", "take-base")),
    "exclude without a match": ({"exclude": "q_prj"}, ("q_prj",)),
    "unknown dtype": ({"values_dtype": "int8"}, ("int8", "bfloat16")),
    "unknown axis": ({"method": "structural", "axis": "rows"}, ("rows", "row")),
    "no output": ({"output_dir": None}, ("--output_dir",)),
    "no base": ({"base": "no/such/place"}, ("no/such/place",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_options_of_prune(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options, naming = REFUSALS[case]
    refused(command, place, *words(place, **options), naming=naming)


def test_the_output_may_not_be_an_input(place: Path, command: Command) -> None:
    refused(command, place, *words(place, output_dir=place / "base", overwrite=True), naming=("input",))
    apply = ["delta", "apply", place / "delta", "--base", place / "base", "--output_dir"]
    refused(command, place, *apply, place / "delta", "--overwrite", naming=("input",))
    refused(command, place, *apply, place / "tuned", naming=("not empty", "--overwrite"))


def test_other_refusals(place: Path, command: Command) -> None:
    search = ["delta", "search", place / "delta", "--base", place / "base"]
    refused(command, place, "delta", "aply", naming=("aply", "Did you mean 'apply'?"))
    refused(command, place, *search, naming=("--dataset",))
    refused(
        command, place, *search, "--dataset", place / "text", "--objective", "output_change", naming=("--finetuned",)
    )
    wrong = ["delta", "apply", place / "delta", "--base", place / "tuned", "--output_dir", place / "x"]
    refused(command, place, *wrong, naming=("digest",))
    right = ["delta", "apply", place / "delta", "--base", place / "base", "--output_dir", place / "x"]
    refused(command, place, *right, "--scale=-0.1", naming=("scale", "-0.1"))
    file = place / "delta" / DELTA_FILE
    file.write_bytes(file.read_bytes()[:-9])
    refused(command, place, "delta", "info", place / "delta", naming=("truncated",))
    assert command(*wrong[:3], "--base", place / "base", "--output_dir", place / "x").code == 2
    assert "x" not in tree(place)


def test_help_of_every_action(command: Command) -> None:
    assert "--density" in command("delta", "--help").out
    for action, option in (("search", "--objective"), ("apply", "--check_base"), ("info", "DELTA")):
        result = command("delta", action, "--help")
        assert result.code == 0 and option in result.out
