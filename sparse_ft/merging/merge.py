"""From a mergekit YAML to a Hugging Face directory: open, check, plan, merge, add config, tokenizer and card.

from sparse_ft.merging import merge_checkpoints

merge_checkpoints("mergekit.yaml", "merged")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_ft.checkpoints import CheckpointReader, check_output_dir, copy_side_files, make_record, write_sidecars
from sparse_ft.masks import MaskSet
from sparse_ft.merging.config import MergeConfig, parse_config
from sparse_ft.merging.engine import MergeReport, execute
from sparse_ft.merging.imposing import impose, reprune
from sparse_ft.merging.inputs import OpenModel, open_models
from sparse_ft.merging.memory import peak_bytes
from sparse_ft.merging.model_card import write_model_card
from sparse_ft.merging.output_config import write_configs
from sparse_ft.merging.output_tokenizer import TokenizerPlan, plan_tokenizer, write_tokenizer
from sparse_ft.merging.plan import Compatibility, default_threads
from sparse_ft.merging.planning import SHARD_BYTES, Planned, plan_merge
from sparse_ft.merging.preflight import Preflight, check_models, preflight
from sparse_ft.merging.preserving import preserved_masks
from sparse_ft.merging.whole_model import densities_of_models, trim_whole_models
from sparse_ft.merging.yaml_text import read_yaml_file


@dataclass(frozen=True)
class PreparedMerge:
    """Everything that is known before a weight is merged.

    Attributes:
        config: the configuration.
        text: its YAML.
        models: the models, opened, by label.
        planned: the plan.
        tokenizer: the output's tokenizer.
        masks: masks the output will have, as far as the inputs tell.
        report: what the preflight found.
    """

    config: MergeConfig
    text: str
    models: Mapping[str, OpenModel]
    planned: Planned
    tokenizer: TokenizerPlan
    masks: MaskSet | None
    report: Preflight


def prepare_merge(
    path: str | Path,
    *,
    seed: int | None = None,
    compat: Compatibility | None = None,
    truncate_embeddings: bool = False,
    max_shard_size: int = SHARD_BYTES,
    threads: int | None = None,
) -> PreparedMerge:
    """Read a configuration, open its models, check them and plan the merge; nothing is written.

    Args:
        path: YAML file, as mergekit reads it.
        seed: of everything random; None takes the file's, or 0.
        compat: whose formulas where mergekit and the papers differ; None takes the file's, or the papers'.
        truncate_embeddings: without tokenizer_source, cut embeddings of different length to the shortest.
        max_shard_size: bytes of an output file at most.
        threads: tensors that will be worked on at once, for the report's memory.

    Raises:
        FileNotFoundError: if the file or a model is missing.
        ValueError: if the configuration is wrong, or the models cannot be merged.
    """
    content, text = read_yaml_file(path)
    config = parse_config(content)
    config = replace(config, seed=config.seed if seed is None else seed, compat=compat or config.compat)
    models = open_models(config.references())
    first = config.base_model or config.modules[0].slices[0].sources[0].model
    check_models(models, models[first.text])
    tokenizer = plan_tokenizer(config, models)
    planned = plan_merge(
        config,
        models,
        vocabulary=tokenizer.vocabulary,
        truncate_embeddings=truncate_embeddings,
        max_shard_size=max_shard_size,
    )
    if config.trim == "model":
        densities_of_models(planned.plan)
    renumbered = bool(planned.layer_origins)
    masks, notes = preserved_masks(config.preserve_masks, planned.plan, planned.base, renumbered=renumbered)
    if tokenizer.vocabulary is not None:
        notes += tokenizer.vocabulary.notes
    again = config.preserve_masks.policy == "reprune"
    peak = peak_bytes(planned.plan, models, threads or default_threads(), pruned_again=again)
    return PreparedMerge(config, text, models, planned, tokenizer, masks, preflight(planned, models, peak, notes))


def merge_checkpoints(
    path: str | Path | PreparedMerge,
    output_dir: str | Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    command: Sequence[str] = (),
) -> MergeReport:
    """Merge checkpoints as a mergekit YAML says.

    Args:
        path: the YAML file, or what `prepare_merge` made of it.
        output_dir: directory to make; it appears when it is whole. The same call goes on after an interruption.
        threads: tensors worked on at once; the result does not depend on it.
        overwrite: replace an output directory that is not empty.
        progress: show a bar.
        command: the command line, for the record.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: as `prepare_merge`.
        FileExistsError: if the output is a file, or not empty without `overwrite`.
        ValueError: as `prepare_merge`, or the output is one of the inputs, or a weight is NaN or infinite.
        RuntimeError: if the disk is full.

    Example:
        >>> merge_checkpoints("mergekit.yaml", "merged").merged      # doctest: +SKIP
        291
    """
    prepared = path if isinstance(path, PreparedMerge) else prepare_merge(path, threads=threads)
    check_output_dir(output_dir, inputs=input_directories(prepared), overwrite=overwrite)

    def finish(directory: Path) -> None:
        finish_directory(prepared, directory, Path(output_dir).name, command)

    plan = prepared.planned.plan
    if prepared.config.trim == "model":
        plan = trim_whole_models(plan, threads, progress=progress)
    return execute(plan, output_dir, threads=threads, progress=progress, overwrite=overwrite, finish=finish)


def input_directories(prepared: PreparedMerge) -> list[Path]:
    """Every directory a merge reads."""
    inputs = [model.input for model in prepared.models.values()]
    return [place for one in inputs for place in (one.path, one.adapter) if place is not None]


def finish_directory(prepared: PreparedMerge, directory: Path, name: str, command: Sequence[str] = ()) -> None:
    """Put everything but the merged weights into the output: config, tokenizer, masks, card.

    Args:
        prepared: the merge.
        directory: holds the weights.
        name: of the output, for the card.
        command: the command line, for the record.
    """
    source, reference = prepared.tokenizer.source, prepared.planned.reference
    write_configs(prepared.planned, prepared.models, source, directory)
    copy_side_files(reference.input.path, directory)
    if prepared.config.tokenizer is not None or prepared.tokenizer.chat_template is not None:
        write_tokenizer(prepared.tokenizer, prepared.models, directory)
    masks = prepared.masks
    if prepared.config.preserve_masks.policy == "reprune":
        masks = reprune(directory, prepared.config.preserve_masks)
    if masks is not None:
        impose(directory, masks)
        weights = CheckpointReader(directory)
        arguments = {"method": prepared.config.method, "seed": prepared.config.seed, "configuration": prepared.text}
        write_sidecars(directory, masks, make_record(masks, weights, command="merge", arguments=arguments))
    write_model_card(directory, name, prepared.config, prepared.models, prepared.report, prepared.text, command)
