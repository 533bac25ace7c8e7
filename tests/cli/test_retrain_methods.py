"""`retrain --method`: each method trains its parameters and nothing else, says so, and keeps the zeros."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.refusals import Command, refused, retrain_words
from cli.workspace import save_model
from safetensors.torch import load_file
from tiny_models import TINY

from sparse_ft.cli.main import main
from sparse_ft.cli.retrain_run import run_dir_of
from sparse_ft.masks import MaskSet

NORMS = r"(norm|ln_\d|ln_f)\.(weight|bias)$"
GROUP = {"biases": r"\.bias$", "norms": NORMS, "embeddings": r"embed_tokens\.weight$", "head": r"lm_head\.weight$"}
QUICK = {"max_steps": 2, "learning_rate": "1e-2", "logging_steps": 1, "eval": "false", "sequence_length": 16}


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """Pruned tiny models by family, and one in bf16. Read only."""
    place = tmp_path_factory.mktemp("families")
    made = {}
    for name in ("llama", "opt", "gpt2", "mixtral", "bf16"):
        source = save_model(place / f"{name}_dense", "llama" if name == "bf16" else name)
        if name == "bf16":
            TINY["llama"]().to(torch.bfloat16).save_pretrained(source)
        made[name] = place / name
        words = ["--model_name_or_path", source, "--sparsity", "0.6", "--output_dir", made[name]]
        assert main(["prune", *map(str, words)]) == 0
    return made


def words(source: Path, text: Path, target: Path, **options: object) -> list[object]:
    given = {"model_name_or_path": source, "dataset": text, "output_dir": target}
    return retrain_words(target.parent, **{**QUICK, **given, **options})


def changed(before: Path, after: Path) -> set[str]:
    """Names of the stored tensors that differ in a bit."""
    one, other = (load_file(directory / "model.safetensors") for directory in (before, after))
    assert set(one) == set(other)
    assert all(one[name].dtype == other[name].dtype for name in one)
    return {name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))}


def expected(source: Path, method: str) -> set[str]:
    """What a method may change, by the names in the file."""
    names, parts = set(load_file(source / "model.safetensors")), method.split("+")
    found = set(MaskSet.load(source)) if {"mask_lora", "scale_lora", "lora_prune"} & set(parts) else set()
    patterns = [GROUP[part] for part in parts if part in GROUP]
    return found | {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


CASES = [
    ("llama", "norms"),
    ("llama", "head"),
    ("llama", "embeddings"),
    ("llama", "scale_lora"),
    ("llama", "lora_prune"),
    ("llama", "norms+mask_lora"),
    ("llama", "head+norms"),
    ("llama", "mask_lora+head+embeddings"),
    ("opt", "biases"),
    ("opt", "norms+biases"),
    ("opt", "scale_lora+biases+norms"),
    ("gpt2", "mask_lora+norms"),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_method_trains_its_parameters_and_nothing_else(
    family: str, method: str, sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    source, target = sparse[family], tmp_path / "out"
    result = command(*words(source, text, target, method=method, activation_checkpointing=True))
    assert result.code == 0, result.err
    assert changed(source, target) == expected(source, method)
    masks = MaskSet.load(target)
    assert masks == MaskSet.load(source)
    masks.verify(load_file(target / "model.safetensors"))
    trainable = json.loads((target / "sparse_ft.json").read_text())["training"]["trainable"]
    assert set(trainable["groups"]) == set(method.split("+"))
    assert sum(group["weights"] for group in trainable["groups"].values()) == trainable["trainable"] > 0
    assert all(group["tensors"] > 0 for group in trainable["groups"].values())
    assert json.loads((target / "report.json").read_text())["trainable"] == trainable
    share = f"training {trainable['trainable']:,} of {trainable['total']:,} parameters"
    assert f"{share} ({trainable['trainable'] / trainable['total']:.4%})" in result.out
    for name, group in trainable["groups"].items():
        line = rf"\n  {name} +{group['tensors']} tensors +{group['weights']:,} parameters"
        assert re.search(line, result.out), result.out
    assert not run_dir_of(target).exists()


def test_the_counts_are_those_of_the_formulae(
    sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    """r (o + d) for each adapted matrix, one number per entry of a norm."""
    target = tmp_path / "out"
    assert command(*words(sparse["llama"], text, target, method="mask_lora+norms+head", r=4)).code == 0
    tensors = load_file(sparse["llama"] / "model.safetensors")
    adapted = sum(4 * sum(tensors[name].shape) for name in MaskSet.load(sparse["llama"]))
    trainable = json.loads((target / "sparse_ft.json").read_text())["training"]["trainable"]
    assert {name: group["weights"] for name, group in trainable["groups"].items()} == {
        "mask_lora": adapted,
        "norms": 5 * 32,
        "head": 4 * (96 + 32),
    }
    total = sum(tensor.numel() for tensor in tensors.values())
    assert trainable["total"] == total + adapted + 4 * (96 + 32)


def test_full_says_what_it_trains(sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command) -> None:
    result = command(*words(sparse["llama"], text, tmp_path / "out", method="full"))
    assert result.code == 0 and "(100.0000%)" in result.out
    trainable = json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["training"]["trainable"]
    assert trainable["groups"] == {"full": {"tensors": 21, "weights": trainable["total"]}}


def test_a_part_that_is_empty_is_said(sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command) -> None:
    result = command(*words(sparse["llama"], text, tmp_path / "out", method="biases+norms"))
    said = [line for line in result.err.splitlines() if "has no biases" in line]
    assert said == ["warning: LlamaForCausalLM has no biases to train; the rest of biases+norms is trained."]
    assert result.code == 0 and re.search(r"biases +0 tensors", result.out)
    assert changed(sparse["llama"], tmp_path / "out") == expected(sparse["llama"], "norms")


@pytest.mark.parametrize("method", ["norms", "embeddings", "head", "scale_lora+norms"])
def test_reentrant_checkpoints_get_gradients_too(
    method: str, sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    results = []
    for name, more in (
        ("plain", {}),
        (
            "checkpointed",
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": '{"use_reentrant": true}'},
        ),
    ):
        assert command(*words(sparse["llama"], text, tmp_path / name, method=method, **more)).code == 0
        results.append(load_file(tmp_path / name / "model.safetensors"))
    assert changed(sparse["llama"], tmp_path / "checkpointed") == expected(sparse["llama"], method)
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-6)


# -- adapters with groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "mask_lora+norms"),
        ("opt", "scale_lora+biases+norms"),
        ("llama", "head+norms"),
        ("mixtral", "mask_lora+head"),
    ],
)
def test_the_adapter_by_itself_is_the_merged_model(
    family: str, method: str, sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    adapter, target = tmp_path / "adapter", tmp_path / "out"
    result = command(*words(sparse[family], text, target, method=method, save_adapter=adapter, r=4))
    assert result.code == 0, result.err
    assert {"adapter_config.json", "sparse_masks.safetensors", "sparse_ft.json"} <= {p.name for p in adapter.iterdir()}
    held = load_file(adapter / "adapter_model.safetensors")
    assert not any(name.endswith("lm_head.base_layer.weight") for name in held), "the head itself is not in it"
    perplexities = []
    for directory in (target, adapter):
        evaluated = command("eval", directory, "--dataset", text, "--sequence_length", 16, "--no_record")
        assert evaluated.code == 0, evaluated.err
        perplexities.append(float(evaluated.out.split()[1]))
    assert perplexities[0] == pytest.approx(perplexities[1], abs=2e-3)


OPTIONS: list[tuple[str, dict[str, object], dict[str, Any]]] = [
    ("mask_lora", {"r": 4, "lora_alpha": 6, "use_rslora": True}, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    ("lora_prune+norms", {"lora_dropout": 0.25}, {"r": 16, "lora_alpha": 32, "lora_dropout": 0.25}),
    ("scale_lora", {"r": 2, "break_symmetry": True}, {"r": 2, "break_symmetry": True, "lora_alpha": None}),
    ("head", {"r": 3}, {"r": 3, "lora_alpha": 6, "use_rslora": False}),
]


@pytest.mark.parametrize(("method", "options", "config"), OPTIONS)
def test_options_reach_the_adapter(
    method: str, options: dict[str, object], config: dict[str, Any], sparse: dict[str, Path], text: Path,
    tmp_path: Path, command: Command,
) -> None:  # fmt: skip
    adapter = tmp_path / "adapter"
    given = words(sparse["llama"], text, tmp_path / "out", method=method, save_adapter=adapter, **options)
    assert command(*given).code == 0
    saved = json.loads((adapter / "adapter_config.json").read_text())
    assert {name: saved[name] for name in config} == config
    recorded = json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["arguments"]
    assert recorded["r"] == config["r"] and recorded["method"] == method


def test_a_method_without_rank_records_none(
    sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    assert command(*words(sparse["llama"], text, tmp_path / "out", method="norms")).code == 0
    assert json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["arguments"]["r"] is None


# -- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"bf16": True}, {"dtype": "float32"}], ids=["bf16", "float32"])
@pytest.mark.parametrize("method", ["norms", "mask_lora+norms+embeddings"])
def test_half_precision(
    method: str, more: dict[str, object], sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    target = tmp_path / "out"
    result = command(*words(sparse["bf16"], text, target, method=method, **more))
    assert result.code == 0, result.err
    assert changed(sparse["bf16"], target) == expected(sparse["bf16"], method)
    assert command("eval", target, "--dataset", text, "--sequence_length", 16).code == 0


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["norms", "mask_lora+norms", "lora_prune+head"])
def test_a_resumed_run_ends_with_the_same_weights(
    method: str, sparse: dict[str, Path], text: Path, tmp_path: Path, command: Command
) -> None:
    options = {"method": method, "max_steps": 4, "save_steps": 2}
    assert command(*words(sparse["llama"], text, tmp_path / "one", **options, keep_run=True)).code == 0
    shutil.copytree(run_dir_of(tmp_path / "one"), run_dir_of(tmp_path / "two"))
    shutil.rmtree(run_dir_of(tmp_path / "two") / "checkpoint-4")
    resumed = words(sparse["llama"], text, tmp_path / "two", **options, resume_from_checkpoint="true")
    assert command(*resumed).code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


@pytest.mark.parametrize(
    ("method", "change"),
    [("scale_lora", "break_symmetry"), ("mask_lora", "use_rslora"), ("lora_prune", "lora_dropout")],
)
def test_another_option_is_another_run(method: str, change: str, place: Path, command: Command) -> None:
    assert command(*retrain_words(place, method=method, keep_run=True, save_steps=1)).code == 0
    shutil.rmtree(place / "out")
    more = {change: 0.5 if change == "lora_dropout" else True, "resume_from_checkpoint": "true"}
    refused(command, place, *retrain_words(place, method=method, **more), naming=("out.run", change))


# -- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "unknown part": ({"method": "mask_lora+nroms"}, ("'nroms'", "Did you mean 'norms'?")),
    "empty part": ({"method": "norms+"}, ("'norms+'", "nothing on one side")),
    "part twice": ({"method": "norms+norms"}, ("'norms' 2 times",)),
    "two adapters": ({"method": "mask_lora+scale_lora"}, ("two adapters, mask_lora and scale_lora",)),
    "full joined": ({"method": "full+norms"}, ("'full' joins with nothing", "'full+norms'")),
    "no biases": ({"method": "biases"}, ("LlamaForCausalLM has no biases", "another group")),
    "rank without an adapter": ({"method": "norms", "r": 4}, ("'norms' does not use --r",)),
    "rank of full": ({"method": "full", "r": 16}, ("'full' does not use --r",)),
    "alpha of scale_lora": ({"method": "scale_lora", "lora_alpha": 32}, ("'scale_lora' does not use --lora_alpha",)),
    "rslora of scale_lora": ({"method": "scale_lora", "use_rslora": True}, ("does not use --use_rslora",)),
    "dropout of mask_lora": ({"lora_dropout": 0.1}, ("'mask_lora' does not use --lora_dropout",)),
    "symmetry of mask_lora": (
        {"method": "mask_lora+norms", "break_symmetry": True},
        ("'mask_lora+norms' does not use --break_symmetry",),
    ),
    "dropout of one": ({"method": "lora_prune", "lora_dropout": "1.0"}, ("--lora_dropout 1", "[0, 1)")),
    "dropout nan": ({"method": "lora_prune", "lora_dropout": "nan"}, ("--lora_dropout nan", "[0, 1)")),
    "negative rank": ({"r": -4}, ("--r -4",)),
    "rank above the weights": ({"r": 17}, ("r=17", "16", "proj")),
    "rank above the head": ({"method": "head", "r": 33}, ("r=33", "32", "head")),
    "alpha of zero": ({"lora_alpha": 0}, ("--lora_alpha 0",)),
    "learning rate nan": ({"learning_rate": "nan"}, ("--learning_rate nan", "positive")),
    "learning rate inf": ({"learning_rate": "inf"}, ("--learning_rate inf", "positive")),
    "learning rate of zero": ({"method": "norms", "learning_rate": 0}, ("--learning_rate 0", "positive")),
    "negative learning rate": ({"method": "full", "learning_rate": "-0.0001"}, ("--learning_rate -0.0001", "positive")),
    "adapter of groups": ({"method": "norms", "save_adapter": "adapter"}, ("'norms' has no adapter", "--save_adapter")),
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the perplexity to start from, the first work of a run, is an error."""

    def measured(*args: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("sparse_ft.cli.retrain.measure", measured)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    options, naming = BAD[case]
    refused(command, place, *retrain_words(place, **options), naming=naming)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("method", ["head", "mask_lora+embeddings"])
def test_tied_weights(method: str, sparse: dict[str, Path], place: Path, command: Command) -> None:
    shutil.copytree(sparse["gpt2"], place / "tied")
    words = retrain_words(place, model_name_or_path=place / "tied", method=method)
    refused(command, place, *words, naming=("share their weight", "untie", "leave out"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16"}])
def test_half_precision_without_autocast(
    more: dict[str, object], sparse: dict[str, Path], place: Path, command: Command
) -> None:
    shutil.copytree(sparse["bf16"], place / "half")
    words = retrain_words(place, model_name_or_path=place / "half", method="mask_lora+norms", **more)
    refused(command, place, *words, naming=("norms", "float32", "bfloat16", "--bf16"))
