"""`retrain --quantization`: an adapter trained on a 4-bit or 8-bit copy ends in the stored weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install sparse-ft[quant]")

from adapters.quantised_models import MODELS
from cli.refusals import Command, refused, retrain_words
from cli.workspace import save_tokenizer

from sparse_ft.adapters import merge_into_base
from sparse_ft.checkpoints import CheckpointReader, read_sidecars
from sparse_ft.cli.main import main


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A Llama in bfloat16 at 2:4 with rows of whole blocks. Read only."""
    home = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    MODELS["llama"]().bfloat16().save_pretrained(home / "dense")
    save_tokenizer(home / "dense")
    words = ["prune", "--model_name_or_path", str(home / "dense"), "--pattern", "2:4", "--output_dir"]
    assert main([*words, str(home / "sparse"), "--eval", "false"]) == 0
    return home / "sparse"


def words(sparse: Path, text: Path, target: Path, **options: object) -> list[object]:
    quick = {"max_steps": 2, "learning_rate": "1e-2", "eval_windows": 2, "r": 4, "bf16": True}
    given = {"model_name_or_path": sparse, "dataset": text, "output_dir": target}
    return retrain_words(target.parent, **{**quick, **given, **options})


def changed(one: Path, other: Path) -> set[str]:
    """Names of the stored tensors that differ in a bit."""
    before, after = CheckpointReader(one), CheckpointReader(other)
    assert set(before) == set(after) and all(before.dtype(name) == after.dtype(name) for name in before)
    return {name for name in before if not torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))}


@pytest.mark.parametrize(
    "method, quantization", [("mask_lora+norms", "4bit"), ("scale_lora+head", "8bit"), ("lora_prune", "4bit")]
)
def test_the_adapter_is_merged_into_the_stored_weights(
    method: str, quantization: str, sparse: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    options = dict(method=method, quantization=quantization, save_adapter=tmp_path / "adapter")
    result = command(*words(sparse, text, tmp_path / "out", **options, activation_checkpointing=True))
    assert result.code == 0, result.err
    masks, record = read_sidecars(tmp_path / "out")
    masks.verify(CheckpointReader(tmp_path / "out"))
    expected = set(masks) | {name for name in CheckpointReader(sparse) if "norm" in name and "norms" in method}
    assert changed(sparse, tmp_path / "out") == expected | ({"lm_head.weight"} if "head" in method else set())
    assert record.arguments["quantization"] == quantization
    assert [entry["label"] for entry in record.evaluation] == ["pruned", "retrained"]
    merged = merge_into_base(tmp_path / "adapter", sparse)
    merged.save_pretrained(tmp_path / "merged")
    assert not changed(tmp_path / "merged", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert command(*words(sparse, text, tmp_path / "plain", method=method)).code == 0
    assert changed(tmp_path / "plain", tmp_path / "out"), "it was trained on the quantised weights"


def test_a_killed_run_ends_with_the_same_weights(sparse: Path, text: Path, tmp_path: Path, command: Command) -> None:
    options = dict(quantization="4bit", save_steps=1, keep_run=True)
    assert command(*words(sparse, text, tmp_path / "out", **options)).code == 0
    (tmp_path / "out").rename(tmp_path / "straight")
    shutil.rmtree(tmp_path / "out.run" / "checkpoint-2")
    resumed = words(sparse, text, tmp_path / "out", **options, resume_from_checkpoint="true")
    refused(command, tmp_path, *resumed, "--quantization", "8bit", naming=("quantization '4bit'", "'8bit'"))
    assert command(*resumed).code == 0
    assert not changed(tmp_path / "straight", tmp_path / "out")


@pytest.mark.parametrize(
    "options, naming",
    [
        ({"quantization": "3bit"}, ("quantization", "'3bit'")),
        ({"quantization": "4bit", "method": "full"}, ("'full'", "mask_lora", "--quantization")),
        ({"quantization": "8bit", "method": "norms+head"}, ("'norms+head'", "mask_lora", "--quantization")),
        ({"quantization": "4bit", "method": "reconstruct"}, ("--quantization", "reconstruct")),
    ],
)
def test_what_cannot_be_quantised_is_refused(
    options: dict[str, object], naming: tuple[str, ...], place: Path, command: Command
) -> None:
    refused(command, place, *retrain_words(place, **options), naming=naming)
