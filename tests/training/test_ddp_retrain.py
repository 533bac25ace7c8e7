"""`sparse-ft retrain` in two processes: the result of one, written once, and exit codes that tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.workspace import save_model, sentences
from tiny_models import TINY

from sparse_ft.adapters import prepare_perp
from sparse_ft.checkpoints import CheckpointReader, check_weights, read_sidecars
from sparse_ft.cli.main import main
from sparse_ft.pruning import prune
from sparse_ft.training.processes import uses_every_parameter

REPOSITORY = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "launch/ddp.yaml")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a 2:4 model, `sparse`, and `text`."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "text").mkdir()
    (directory / "text" / "train.txt").write_text(sentences(300, 1))
    (directory / "text" / "test.txt").write_text(sentences(20, 2))
    dense = save_model(directory / "dense")
    words = ["prune", "--model_name_or_path", dense, "--pattern", "2:4", "--output_dir", directory / "sparse"]
    assert main([*map(str, words), "--no_eval"]) == 0
    return directory


def retrain(place: Path, output: str, *more: object, batches: int = 1, method: str = "mask_lora") -> list[str]:
    """Words of a short retraining, each optimizer step of which sees `batches` micro-batches per process."""
    words = [
        "retrain", "--model_name_or_path", place / "sparse", "--dataset", place / "text", "--sequence_length", 32,
        "--method", method, "--max_steps", 4, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", batches, "--logging_steps", 1, "--output_dir", place / output, "--use_cpu",
        "true", *more,
    ]  # fmt: skip
    return list(map(str, words))


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, env=environment)


def assert_same_weights(one: Path, two: Path) -> None:
    first, second = CheckpointReader(one), CheckpointReader(two)
    assert list(first.names()) == list(second.names())
    for name in first.names():
        assert torch.equal(first.get(name), second.get(name)), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "method"), [(TORCHRUN, "mask_lora+norms"), (ACCELERATE, "full")], ids=["torchrun", "accelerate"]
)
def test_two_processes_make_what_one_makes(launcher: list[str], method: str, place: Path) -> None:
    pair, alone = f"pair {method}", f"alone {method}"
    done = launch(*launcher, "-m", "sparse_ft", *retrain(place, pair, method=method))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("verified: every pruned weight is zero in the files") == 1, "one process speaks"
    assert done.stdout.count("perplexity on") == 1
    assert "find_unused_parameters" not in done.stderr, "torch's warning of a search that finds nothing"
    assert main(retrain(place, alone, method=method, batches=2)) == 0
    assert_same_weights(place / pair, place / alone)
    masks, record = read_sidecars(place / pair)
    check_weights(masks, record, CheckpointReader(place / pair))
    other = read_sidecars(place / alone)[1]
    assert record.arguments["world_size"] == 2 and other.arguments["world_size"] == 1
    assert [entry["perplexity"] for entry in record.evaluation] == [entry["perplexity"] for entry in other.evaluation]
    assert not (place / f"{pair}.run").exists()
    assert not list(place.glob(f".{pair}*")), "nothing hidden is left"


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["fails", pytest.param("killed", marks=pytest.mark.slow)])
def test_one_process_that_ends_ends_all(how: str, place: Path) -> None:
    """No process waits for ever for the dead one, the exit code says so, and there is no result."""
    words = retrain(place, how, "--no_eval", "--save_strategy", "steps", "--save_steps", 2)
    done = launch(*TORCHRUN, str(Path(__file__).with_name("one_fails.py")), how, "3", *words)
    assert done.returncode != 0
    if how == "fails":
        assert "sparse-ft retrain (process 1): error: the second process has lost its disk" in done.stderr
    assert not (place / how).exists()
    assert (place / f"{how}.run" / "checkpoint-2").is_dir(), "what there is to resume from is still there"
    if how == "killed":
        resumed = launch(*TORCHRUN, "-m", "sparse_ft", *words, "--resume_from_checkpoint", "true")
        assert resumed.returncode == 0, resumed.stderr[-3000:]
        assert main(retrain(place, "never killed", "--no_eval", batches=2)) == 0
        assert_same_weights(place / how, place / "never killed")


def test_where_every_step_reaches_every_parameter() -> None:
    assert all(uses_every_parameter(TINY[name]()) for name in ("llama", "gpt2", "opt", "qwen", "neox"))
    mixtral, opt, llama = TINY["mixtral"](), TINY["opt"](), TINY["llama"]()
    assert not uses_every_parameter(mixtral), "a batch need not reach all experts"
    opt.config.layerdrop = 0.1
    assert not uses_every_parameter(opt)
    masks = prune(llama, sparsity=0.5, progress=False)
    assert uses_every_parameter(prepare_perp(llama, "mask_lora+norms", masks, r=2))
    masks = prune(mixtral, sparsity=0.5, progress=False)
    assert not uses_every_parameter(prepare_perp(mixtral, "mask_lora", masks, r=2))


def test_sharding_is_refused_before_any_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    before = sorted(path.name for path in place.iterdir())
    assert main(retrain(place, "sharded")) == 2
    captured = capsys.readouterr()
    assert "run under FSDP, which shards it" in captured.err and "perplexity" not in captured.out
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_run_is_continued_by_as_many_processes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = retrain(place, "kept", "--no_eval", "--save_strategy", "steps", "--save_steps", 2, "--keep_run", "true")
    assert main(words) == 0
    file = place / "kept.run" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "world_size": 2}))
    assert main([*words, "--overwrite", "--resume_from_checkpoint", "true"]) == 2
    assert "was started with world_size 2 but now it is 1" in capsys.readouterr().err
