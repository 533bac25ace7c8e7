"""Zero-shot tasks: the harness's score is that of a computation by hand, and says how it was measured."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.sparse_models import sparse_model
from cli.workspace import save_tokenizer
from evaluation.local_task import needs_lm_eval, questions, scores_by_hand, standard_error, task_config, task_file
from peft import get_peft_model
from tiny_models import TINY
from transformers import AutoTokenizer

from sparse_ft.adapters import MaskLoraConfig
from sparse_ft.evaluation import PERP_TASKS, TaskResult, load_tasks, zero_shot


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def shares(results: list[TaskResult]) -> dict[str, float]:
    return {result.metric: result.value for result in results}


@needs_lm_eval
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_computed_by_hand(family: str, tmp_path: Path, tokenizer: Any) -> None:
    asked, model = questions(), TINY[family]().eval()
    results = zero_shot(model, tokenizer, [task_config(tmp_path, asked)], batch_size=5)
    expected = scores_by_hand(model, tokenizer, asked)
    assert shares(results) == pytest.approx(expected)
    assert expected["acc"] != expected["acc_norm"], "the two metrics must differ for the test to tell them apart"
    for result in results:
        assert result.stderr == pytest.approx(standard_error(result.value, len(asked)))
        assert (result.task, result.samples, result.limit, result.num_fewshot) == ("by_hand", len(asked), None, 0)
        assert (result.lm_eval, result.task_version) == (metadata.version("lm_eval"), "3.0")
        assert (result.max_length, result.dtype) == (64, "float32 weights")
        assert f"by_hand {result.metric} {result.value:.4f} ± {result.stderr:.4f} (40 questions, 0-shot" in str(result)


@needs_lm_eval
def test_limit_takes_the_first_questions_and_batches_do_not_matter(tmp_path: Path, tokenizer: Any) -> None:
    asked, model = questions(), TINY["llama"]().eval()
    file = str(task_file(tmp_path, asked))
    results = zero_shot(model, tokenizer, [file], limit=13, batch_size=1)
    assert shares(results) == pytest.approx(scores_by_hand(model, tokenizer, asked[:13]))
    assert {(result.samples, result.limit) for result in results} == {(13, 13)}
    assert shares(zero_shot(model, tokenizer, file, limit=13, batch_size=8)) == shares(results)


@needs_lm_eval
def test_a_masked_adapter_counts_merged_and_unmerged(tmp_path: Path, tokenizer: Any) -> None:
    asked = questions(60)
    model, masks = sparse_model("llama")
    before = scores_by_hand(model, tokenizer, asked)
    adapted = get_peft_model(model, MaskLoraConfig(r=4, masks=masks, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    task = task_config(tmp_path, asked)
    adapted.train()
    unmerged = shares(zero_shot(adapted, tokenizer, [task]))
    assert adapted.training, "the mode of the model comes back"
    adapted.eval()
    assert unmerged == pytest.approx(scores_by_hand(adapted, tokenizer, asked)) != pytest.approx(before)
    merged = adapted.merge_and_unload()
    masks.verify(merged)
    assert shares(zero_shot(merged, tokenizer, [task])) == unmerged


@needs_lm_eval
def test_nothing_of_the_caller_is_changed(tmp_path: Path, tokenizer: Any) -> None:
    model, asked = TINY["llama"](), questions(4)
    without_padding = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    without_padding.pad_token = None
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    level = logging.getLogger("lm_eval").level
    zero_shot(model, without_padding, [task_config(tmp_path, asked)])
    assert without_padding.pad_token is None
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert logging.getLogger("lm_eval").level == level


@needs_lm_eval
def test_a_group_counts_its_tasks_together(tmp_path: Path, tokenizer: Any) -> None:
    import yaml
    from lm_eval.tasks import TaskManager

    model, lists = TINY["llama"]().eval(), {"one": questions(10, 1), "two": questions(30, 2)}
    tasks = [task_config(tmp_path, asked, name) for name, asked in lists.items()]
    group = {"group": "both", "task": tasks, "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "both.yaml").write_text(yaml.safe_dump(group))
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path / "own"))
    results = zero_shot(model, tokenizer, list(manager.load(["both"])["groups"].values()))
    both = next(result for result in results if result.task == "both")
    assert both.samples == 40
    assert both.value == pytest.approx(scores_by_hand(model, tokenizer, lists["one"] + lists["two"])["acc"])


@needs_lm_eval
def test_wrong_arguments_are_refused_in_one_sentence(tmp_path: Path, tokenizer: Any) -> None:
    task, model = task_config(tmp_path, questions(3)), TINY["llama"]()
    for options, message in (
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            zero_shot(model, tokenizer, [task], **options)
    with pytest.raises(ValueError, match="No task was named"):
        zero_shot(model, tokenizer, [])
    with pytest.raises(ValueError, match="BertForMaskedLM predicts a token from both sides"):
        zero_shot(TINY["bert"](), tokenizer, [task])
    Path(task["dataset_kwargs"]["data_files"]["test"]).unlink()
    with pytest.raises(ValueError, match="Task 'by_hand' cannot be loaded: Unable to find"):
        zero_shot(model, tokenizer, [task])


@needs_lm_eval
@pytest.mark.slow
def test_names_are_looked_up_before_any_data(tokenizer: Any) -> None:
    """All names of the set are known before the first task looks for its data, which are not on this machine."""
    with pytest.raises(ValueError, match=r"lm_eval has no task 'helaswag'\. Did you mean 'hellaswag'\?$"):
        load_tasks(["boolq", "helaswag"])
    with pytest.raises(ValueError, match=r"Task 'boolq' cannot be loaded: .*the Hugging Face Hub or its cache"):
        load_tasks(["perp"])


def test_the_set_of_perp_is_the_published_one() -> None:
    assert PERP_TASKS == ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def test_without_lm_eval_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeError, match=r"lm-eval, which is not installed; .*`pip install 'sparse-ft\[eval\]'`\.$"):
        zero_shot(TINY["llama"](), tokenizer, ["boolq"])
