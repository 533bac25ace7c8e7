"""`eval --tasks`: scores of models, checkpoints and adapters, printed, recorded and on the page."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.workspace import Result, tree
from evaluation.local_task import needs_lm_eval, questions, scores_by_hand, task_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Command = Callable[..., Result]
ASKED = questions(30, seed=3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_file(tmp_path_factory.mktemp("task"), ASKED)


def by_hand(directory: Path) -> dict[str, float]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    return scores_by_hand(model.eval(), tokenizer, ASKED)


def printed(result: Result) -> dict[str, float]:
    """Metric and value of the lines of our task."""
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines() if line.startswith("  by_hand ")]
    return {words[1]: float(words[2]) for words in lines}


@needs_lm_eval
def test_a_model_is_scored_and_left_alone(dense: Path, task: Path, command: Command) -> None:
    before = tree(dense)
    result = command("eval", dense, "--tasks", task)
    assert printed(result) == pytest.approx(by_hand(dense), abs=1e-4)
    assert "30 questions" in result.out and "0-shot, all questions" in result.out and "±" in result.out
    assert tree(dense) == before


@needs_lm_eval
def test_results_are_recorded_once_per_protocol(pruned: Path, task: Path, text: Path, tmp_path: Path, command: Command):
    own = tmp_path / "own"
    shutil.copytree(pruned, own)
    for limit in ([], [], ["--limit", 7]):
        words = ["--dataset", text, "--sequence_length", 16] if not limit else []
        result = command("eval", own, "--tasks", task, *limit, *words)
        assert result.code == 0, result.err
        assert ("perplexity" in result.out) == bool(words)
    entries = json.loads((own / "sparse_ft.json").read_text())["evaluation"]
    found = [
        (e["label"], e["metric"], e["protocol"]["limit"], e["protocol"]["samples"]) for e in entries if "task" in e
    ]
    expected = [("pruned", metric, limit, limit or 30) for limit in (None, 7) for metric in ("acc", "acc_norm")]
    assert found == expected
    assert {e["metric"]: e["value"] for e in entries if "task" in e and e["protocol"]["limit"] is None} == by_hand(own)
    assert [e["protocol"]["sequence_length"] for e in entries if "perplexity" in e] == [32, 32, 16]
    numbers = json.loads((own / "report.json").read_text())
    assert len(numbers["tasks"]) == 4 and len(numbers["evaluation"]) == 3
    page = (own / "report.html").read_text()
    assert "by_hand" in page and "acc_norm" in page and "the first 7 questions" in page
    result = command("report", own)
    assert result.code == 0 and len(printed(result)) == 2 and "pruned tasks by lm_eval" in result.out
    before = tree(own)
    assert command("eval", own, "--tasks", task, "--no_record").code == 0
    assert tree(own) == before


@needs_lm_eval
def test_a_directory_of_its_own(dense: Path, task: Path, tmp_path: Path, command: Command) -> None:
    assert command("eval", dense, "--tasks", task, "--output_dir", tmp_path / "result").code == 0
    numbers = json.loads((tmp_path / "result" / "report.json").read_text())
    assert {(e["label"], e["metric"]): e["value"] for e in numbers["tasks"]} == {
        ("model", metric): value for metric, value in by_hand(dense).items()
    }


@needs_lm_eval
def test_an_adapter_counts_as_it_was_trained_and_merged(
    pruned: Path, task: Path, text: Path, tmp_path: Path, command: Command
) -> None:
    words = ["--dataset", text, "--sequence_length", 16, "--max_steps", 6, "--learning_rate", "5e-2", "--no_eval"]
    places = ["--output_dir", tmp_path / "out", "--save_adapter", tmp_path / "adapter", "--r", 4]
    assert command("retrain", "--model_name_or_path", pruned, *words, *places).code == 0
    merged = by_hand(tmp_path / "out")
    assert merged != by_hand(pruned), "training must change some answers for the test to see the adapter"
    for more in ([], ["--merge"]):
        assert printed(command("eval", tmp_path / "adapter", "--tasks", task, *more)) == pytest.approx(merged, abs=1e-4)
    assert printed(command("eval", tmp_path / "out", "--tasks", task)) == pytest.approx(merged, abs=1e-4)


@needs_lm_eval
def test_a_task_whose_data_are_gone_is_found_before_the_model_is_loaded(
    pruned: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = task_file(tmp_path, ASKED)
    (tmp_path / "by_hand.jsonl").unlink()
    monkeypatch.setattr("sparse_ft.cli.eval.load_subject", lambda *_, **__: pytest.fail("the model was loaded"))
    result = command("eval", pruned, "--tasks", file)
    assert result.code == 2 and "cannot be loaded" in result.complaint and str(file) in result.complaint


def test_wrong_words_are_refused_in_one_sentence(
    pruned: Path, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, naming in (
        ([], ["No text was given", "--dataset", "--tasks"]),
        (["--tasks", "boolq", "--limit", 0], ["--limit 0"]),
        (["--tasks", "boolq", "--num_fewshot", -2], ["--num_fewshot -2"]),
        (["--dataset", text, "--merge"], ["not an adapter", "--merge"]),
    ):
        result = command("eval", pruned, *words)
        assert result.code == 2 and all(part in result.complaint for part in naming), result.complaint
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    before = tree(pruned)
    result = command("eval", pruned, "--tasks", "perp")
    assert result.code == 2 and "pip install 'sparse-ft[eval]'" in result.complaint
    assert tree(pruned) == before
