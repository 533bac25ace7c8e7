"""A multiple-choice task of lm_eval on a file of this machine, and its score computed a second time by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli.workspace import WORDS

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-eval: pip install 'sparse-ft[eval]', or make test-eval",
)

Question = dict[str, Any]


def questions(count: int = 40, seed: int = 0) -> list[Question]:
    """Some words, and three ways to go on that differ in their number of words and letters."""
    generator = torch.Generator().manual_seed(seed)

    def phrase(least: int, most: int) -> str:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return [
        {"question": phrase(3, 9), "choices": [phrase(1, 4) for _ in range(3)], "answer": i % 3} for i in range(count)
    ]


def task_config(directory: Path, asked: list[Question], name: str = "by_hand") -> dict[str, Any]:
    """The task's configuration; its data are written into `directory`."""
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in asked))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 3.0},
    }


def task_file(directory: Path, asked: list[Question], name: str = "by_hand") -> Path:
    """The same as a YAML file."""
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task_config(directory, asked, name)))
    return file


@torch.no_grad()
def scores_by_hand(model: Any, tokenizer: Any, asked: list[Question]) -> dict[str, float]:
    """`acc` and `acc_norm`: one answer at a time, the log-likelihoods of its tokens summed in fp64."""
    right = {"acc": 0, "acc_norm": 0}
    for question in asked:
        before = len(tokenizer(question["question"]).input_ids)
        sums = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}", return_tensors="pt").input_ids
            logits = model(input_ids=ids).logits[0].double()
            of_next = logits[:-1] - logits[:-1].logsumexp(-1, keepdim=True)
            sums.append(float(of_next[range(before - 1, ids.shape[1] - 1), ids[0, before:]].sum()))
        per_letter = [total / len(choice) for total, choice in zip(sums, question["choices"], strict=True)]
        right["acc"] += sums.index(max(sums)) == question["answer"]
        right["acc_norm"] += per_letter.index(max(per_letter)) == question["answer"]
    return {metric: count / len(asked) for metric, count in right.items()}


def standard_error(share: float, count: int) -> float:
    """Of the mean of `count` answers that are right or wrong."""
    return math.sqrt(share * (1 - share) / (count - 1))
