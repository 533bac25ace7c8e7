"""README.md and merge.json of a merged model: what it was made of, how, and what differs from mergekit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_ft.checkpoints import versions
from sparse_ft.merging.config import MergeConfig
from sparse_ft.merging.inputs import OpenModel
from sparse_ft.merging.preflight import Preflight

#: Beside the weights: the configuration, the models, the report's notes and versions.
RECORD_FILE = "merge.json"
CARD_FILE = "README.md"

_TITLES = {
    "linear": ("weighted average (model soup)", "2203.05482"),
    "slerp": ("spherical interpolation", None),
    "task_arithmetic": ("task arithmetic", "2212.04089"),
    "ties": ("TIES", "2306.01708"),
    "dare_linear": ("DARE with task arithmetic", "2311.03099"),
    "dare_ties": ("DARE with TIES", "2311.03099"),
    "della": ("DELLA", "2406.11617"),
    "della_linear": ("DELLA with task arithmetic", "2406.11617"),
    "breadcrumbs": ("Model Breadcrumbs", "2312.06795"),
    "breadcrumbs_ties": ("Model Breadcrumbs with TIES", "2312.06795"),
    "darex_q": ("DAREx-q", "2410.09344"),
}
_RANDOM = frozenset({"dare_linear", "dare_ties", "della", "della_linear", "darex_q"})
_ELECTING = frozenset({"ties", "dare_ties", "della", "breadcrumbs_ties"})


def model_card(
    name: str, config: MergeConfig, models: Mapping[str, OpenModel], report: Preflight, yaml_text: str
) -> str:
    """The text of README.md, with the metadata the Hub reads at its top.

    Args:
        name: of the output.
        config: the configuration.
        models: every model, by label.
        report: of the preflight.
        yaml_text: the configuration as given.
    """
    title, paper = _TITLES[config.method]
    source = f" ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else ""
    lines = ["---", *_metadata(config, models), "---", "", f"# {name}", ""]
    lines += [f"Made by merging with {title}{source}, in float32, with one cast at the end.", "", "## Models", ""]
    for facts in report.models:
        role = " (base)" if config.base_model and facts.label == config.base_model.text else ""
        delta = "" if facts.delta is None else f", mean difference to the base {facts.delta:.2e}"
        adapter = " with a LoRA adapter" if models[facts.label].adapter else ""
        lines.append(f"* `{facts.label}`{role}: {facts.architecture}, {facts.dtype}{adapter}{delta}")
    lines += ["", "## Configuration", "", "```yaml", yaml_text.strip(), "```", ""]
    lines += ["## What differs from mergekit", "", *(f"* {line}" for line in deviations(config)), ""]
    if report.notes:
        lines += ["## Notes", "", *(f"* {note}" for note in report.notes), ""]
    return "\n".join(lines)


def deviations(config: MergeConfig) -> list[str]:
    """Where the result is not what mergekit computes from the same file, one sentence each."""
    found = ["Sums are computed in float32 whatever `dtype` says; `dtype` and `out_dtype` name the files' dtype."]
    if config.method in _RANDOM:
        found.append(
            f"Random masks depend on seed ({config.seed}), model and tensor only, so they are not mergekit's draws."
        )
    if any(case.values for case in config.parameters.get("shared_drop", ())):
        found.append("`shared_drop` draws one mask for all models; mergekit does not know it.")
    if config.compat == "mergekit":
        found.append("Otherwise the formulas are mergekit's (`compat: mergekit`).")
        return found
    if config.method in _ELECTING:
        found.append("Signs are elected by the unweighted deltas; an exact tie takes the prevailing sign, not plus.")
    if config.trim == "model":
        found.append("Each delta is trimmed as one vector (`trim: model`), not tensor by tensor.")
    if config.method in ("dare_linear", "dare_ties"):
        found.append("What is kept of a delta is divided by the density, not scaled to the delta's L1 norm.")
    if config.method in ("della", "della_linear"):
        found.append("Each kept entry is divided by its own keep probability, not scaled to the delta's L1 norm.")
    if config.method == "dare_ties":
        found.append("`normalize` is true unless it is set, as in TIES.")
    if config.preserve_masks.policy not in ("auto", "off"):
        found.append(f"The output is masked: preserve_masks is {config.preserve_masks.policy}.")
    return found


def write_model_card(
    directory: Path,
    name: str,
    config: MergeConfig,
    models: Mapping[str, OpenModel],
    report: Preflight,
    yaml_text: str,
    command: Sequence[str] = (),
) -> None:
    """Write README.md and merge.json into an existing directory."""
    text = model_card(name, config, models, report, yaml_text)
    (directory / CARD_FILE).write_text(text, encoding="utf-8")
    record: dict[str, Any] = {
        "format_version": 1,
        "command": list(command),
        "configuration": yaml_text,
        "method": config.method,
        "compat": config.compat,
        "seed": config.seed,
        "models": [{**vars(facts), "path": str(models[facts.label].input.path)} for facts in report.models],
        "notes": list(report.notes),
        "versions": versions(),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    (directory / RECORD_FILE).write_text(text, encoding="utf-8")


def _metadata(config: MergeConfig, models: Mapping[str, OpenModel]) -> list[str]:
    # Local paths are no names on the Hub, which would refuse the card.
    hub = [ref.model for ref in config.references() if not Path(ref.model).exists() and ref.model.count("/") == 1]
    lines = ["library_name: transformers", "tags:", "- merge", "- sparse-ft"]
    return [*lines, "base_model:", *(f"- {name}" for name in dict.fromkeys(hub))] if hub else lines
