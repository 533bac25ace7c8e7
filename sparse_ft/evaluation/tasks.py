"""Zero-shot tasks: the share of questions a model answers right, measured by lm-evaluation-harness.

    results = zero_shot(model, tokenizer, PERP_TASKS)
    for result in results:
        print(result)      # hellaswag acc_norm 0.… ± 0.… (10,042 questions, 0-shot, lm_eval 0.…)

A multiple-choice task asks the model for the log-likelihood of each answer after the question. `acc` takes the answer
with the highest sum over its tokens, `acc_norm` divides the sum by the answer's length in characters first; tables that
do not say which are not comparable, so every number here carries its metric. `PERP_TASKS` is the zero-shot set of PERP.

Limits: one process. lm_eval is the extra `eval` and is imported only when a task is run. The data sets come from the
Hugging Face Hub or its cache.

Source: Gao et al., A framework for few-shot language model evaluation (github.com/EleutherAI/lm-evaluation-harness);
the set of tasks: Zimmer et al. 2023 (arXiv 2312.15230).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from sparse_ft.evaluation.perplexity import class_name, config_of, dtype_line, eval_mode, sees_the_right
from sparse_ft.naming import did_you_mean

PERP_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
#: Names that stand for several tasks.
SETS = {"perp": PERP_TASKS}

_MISSING = "Zero-shot tasks need lm-eval, which is not installed; install it with `pip install 'sparse-ft[eval]'`."


@dataclass(frozen=True)
class TaskResult:
    """One number of one task, and everything needed to measure it again.

    Attributes:
        task: name of the task, or of a group of tasks.
        metric: `"acc"`, `"acc_norm"`, ...; with the name of an answer filter behind a comma where there is one.
        value: the number, as the harness defines it (a share for `acc` and `acc_norm`).
        stderr: its standard error; None where the harness gives none.
        samples: how many questions were asked.
        limit: the most that was asked for, None for all.
        num_fewshot: answered examples in front of each question.
        seed: that chose them.
        task_version: of the task's definition.
        max_length: tokens a question may have before its beginning is cut off.
        dtype: of the weights.
        lm_eval: version of the harness.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    limit: int | None
    num_fewshot: int
    seed: int
    task_version: str
    max_length: int
    dtype: str
    lm_eval: str

    def __str__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.4f}"
        shots = f"{self.num_fewshot}-shot, lm_eval {self.lm_eval}"
        return f"{self.task} {self.metric} {self.value:.4f}{error} ({self.samples:,} questions, {shots})"

    def to_dict(self, **extra: Any) -> dict[str, Any]:
        """Plain values, as stored in `sparse_ft.json` and `report.json`; `extra` adds keys such as `label="pruned"`."""
        values = asdict(self)
        result = {name: values.pop(name) for name in ("task", "metric", "value", "stderr")}
        return {**extra, **result, "protocol": {"task": self.task, "metric": self.metric, **values}}


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    num_fewshot: int = 0,
) -> list[TaskResult]:
    """Ask a model the questions of some tasks.

    The global generators of Python, NumPy and torch are seeded, as the harness does.

    Args:
        model: a transformers model that generates text, plain or wrapped by PEFT, merged or not; run in eval mode.
        tokenizer: its tokenizer; it is not changed.
        tasks: names of lm_eval (`"boolq"`, also a group or a tag), `"perp"` for `PERP_TASKS`, paths of task files in
            YAML, task configurations as mappings, or what `load_tasks` returned.
        limit: ask only the first so many questions of each task.
        batch_size: answers per forward pass.
        seed: of everything random.
        num_fewshot: answered examples in front of each question.

    Returns:
        One result per task and metric, in the order of the tasks.

    Raises:
        RuntimeError: if lm_eval is not installed.
        ValueError: if there is no such task (the nearest is named), its data cannot be had, a number is out of range,
            or the model does not predict text from the left.

    Example:
        >>> [f"{r.task} {r.metric}" for r in zero_shot(model, tokenizer, ["hellaswag"], limit=100)]
        ['hellaswag acc', 'hellaswag acc_norm']
    """
    check_numbers(limit, batch_size, num_fewshot)
    _check_generates(model)
    loaded = load_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _errors_only(), eval_mode(model):
        # The harness gives a tokenizer without a padding token one.
        asked: Any = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found: Any = simple_evaluate(
            asked,
            tasks=loaded,
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    fixed = dict(limit=limit, seed=seed, max_length=int(asked.max_length), dtype=dtype_line(model, None))
    return [result for name in found["results"] for result in _of_task(found, name, fixed)]


def load_tasks(tasks: Sequence[Any]) -> list[Any]:
    """The tasks with their data, so that a wrong name or missing data is found before a model is loaded.

    Args:
        tasks: as in `zero_shot`; what is loaded already is returned as it is.

    Raises:
        RuntimeError: if lm_eval is not installed.
        ValueError: if there is no such task, or its data cannot be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RuntimeError(_MISSING) from error
    listed = [tasks] if isinstance(tasks, (str, Mapping)) else tasks
    wanted: list[Any] = []
    for task in listed:
        several = SETS.get(task, (task,)) if isinstance(task, str) else (task,)
        wanted += [one for one in several if one not in wanted]
    if not wanted:
        raise ValueError("No task was named; give one of lm_eval, for example boolq, or perp for the set of PERP.")
    with _errors_only():
        manager = TaskManager(include_defaults=any(isinstance(task, str) and not _is_file(task) for task in wanted))
        for task in wanted:
            _check_known(task, manager)
        return [part for task in wanted for part in _load(task, manager)]


def task_protocol(protocol: Mapping[str, Any]) -> str:
    """How a task was measured, in one line, but for the task itself: `tasks by lm_eval ..., 0-shot, all questions`.

    Args:
        protocol: of `TaskResult.to_dict`.
    """
    limit, shots = protocol.get("limit"), protocol.get("num_fewshot")
    asked = "all questions" if limit is None else f"the first {limit:,} questions"
    examples = f"{shots}-shot" if not shots else f"{shots}-shot, seed {protocol.get('seed')}"
    length, dtype = protocol.get("max_length"), protocol.get("dtype")
    return f"tasks by lm_eval {protocol.get('lm_eval')}, {examples}, {asked}, at most {length} tokens, {dtype}"


def perp_means(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of `acc` over `PERP_TASKS` by label, where all of them were measured alike.

    Args:
        entries: from `TaskResult.to_dict`.
    """
    of_label: dict[tuple[str, str], dict[str, float]] = {}
    for entry in entries:
        if entry.get("metric") == "acc" and entry.get("task") in PERP_TASKS:
            key = str(entry.get("label", "")), task_protocol(entry["protocol"])
            of_label.setdefault(key, {})[entry["task"]] = float(entry["value"])
    return {
        label: math.fsum(values.values()) / len(values)
        for (label, _), values in of_label.items()
        if len(values) == len(PERP_TASKS)
    }


def check_numbers(limit: int | None, batch_size: int, num_fewshot: int) -> None:
    """Refuse numbers that `zero_shot` cannot use.

    Raises:
        ValueError: if one is out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit} but must be at least 1; leave it out to ask every question.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size} but must be at least 1; pass the answers per forward pass.")
    if num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot} but cannot be negative; 0 shows no answered examples.")


def _check_generates(model: nn.Module) -> None:
    name = class_name(model)
    if sees_the_right(name, config_of(model)):
        raise ValueError(f"{name} predicts a token from both sides but tasks are for models that generate; pass one.")


def _check_known(task: Any, manager: Any) -> None:
    if not isinstance(task, str) or task in manager.task_index or _is_file(task):
        return
    hint = did_you_mean(task, [*SETS, *manager.all_tasks], otherwise="`lm_eval ls tasks` lists them.")
    raise ValueError(f"lm_eval has no task {task!r}. {hint}")


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml")) and Path(task).is_file()


def _load(task: Any, manager: Any) -> list[Any]:
    """One task or group, the tasks of a tag."""
    if not isinstance(task, (str, Mapping)):
        return [task]
    try:
        found = manager.load([dict(task) if isinstance(task, Mapping) else task])
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError) as error:
        name = task if isinstance(task, str) else str(task.get("group", task.get("task")))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Task {name!r} cannot be loaded: {reason}; its data come from the Hugging Face Hub or its cache."
        ) from error
    groups = list((found.get("groups") or {}).values())
    return groups[:1] or list(found["tasks"].values())


def _of_task(found: Mapping[str, Any], name: str, fixed: Mapping[str, Any]) -> Iterator[TaskResult]:
    """The results of one task or group; keys of the harness are `metric,filter` and `metric_stderr,filter`."""
    numbers = found["results"][name]
    for key, value in numbers.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = numbers.get(f"{metric}_stderr,{chosen}")
        yield TaskResult(
            task=name,
            metric=metric if chosen == "none" else key,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
            samples=int(numbers["sample_len"]),
            num_fewshot=int(found["n-shot"].get(name) or 0),
            task_version=str(found["versions"].get(name, "")),
            lm_eval=metadata.version("lm_eval"),
            **fixed,
        )


@contextmanager
def _errors_only() -> Iterator[None]:
    """The harness warns of what is meant here: a model that is loaded already, and another number of examples."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
