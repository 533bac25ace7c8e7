"""Every option of every verb: flat dataclasses, the same name for the same thing everywhere.

A verb composes the groups it needs; `retrain` adds `transformers.TrainingArguments` unchanged, so its fields keep the
names and meanings they have there. Numbers are checked here (`cli.limits`), other values by the library functions that
use them, once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparse_ft.cli.limits import OPTION_LIMITS, check_limits
from sparse_ft.cli.parser import ConfigParser

__all__ = [
    "CalibrationArguments",
    "DemoArguments",
    "EvalArguments",
    "EvaluationArguments",
    "ModelArguments",
    "OutputArguments",
    "PruneArguments",
    "ReportArguments",
    "RetrainArguments",
    "TextArguments",
    "first_word_is_model",
    "parse",
]

# The retraining recipe of PERP (arXiv 2312.15230), as defaults of transformers' own options; all can be overridden.
RETRAIN_DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "max_steps": 1000,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 2,
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
}
# Who asks for epochs is not stopped by the default number of steps.
RETRAIN_OVERRULES = {"num_train_epochs": "max_steps"}


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the text `--help` shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model is read."""

    model_name_or_path: str = field(metadata={"help": "directory of a checkpoint, or a name on the Hugging Face Hub"})
    allow_pickle: bool = option(False, "accept pytorch_model.bin where there is no safetensors; read as plain tensors")


@dataclass
class OutputArguments:
    """Where a new checkpoint goes."""

    output_dir: str | None = option(None, "directory to make; written beside its place and renamed when whole")
    overwrite: bool = option(False, "replace an output directory that is not empty")
    seed: int = option(0, "seed of everything random")


@dataclass
class TextArguments:
    """Which text is read, and in what portions."""

    dataset: str | None = option(
        None, "text: a `datasets` name, a directory with train.txt and test.txt (or .jsonl, .gz), or one such file"
    )
    dataset_config: str | None = option(None, "configuration of a `datasets` name, for example wikitext-2-raw-v1")
    text_field: str = option("text", "column or JSON key that holds the text")
    sequence_length: int | None = option(None, "tokens per sequence; by default what the model can take, at most 2048")


@dataclass
class EvaluationArguments:
    """How the perplexity before and after is measured."""

    eval: bool = option(True, "measure perplexity before and after, if the text has a test or validation split")
    eval_dataset: str | None = option(None, "text to evaluate on; by default the test split of --dataset")
    eval_split: str | None = option(None, "split to evaluate on; by default test, else validation")
    eval_windows: int | None = option(None, "evaluate on the first so many sequences; by default on the whole split")
    eval_batch_size: int = option(8, "sequences per forward pass in evaluation; does not change the result")


@dataclass
class CalibrationArguments:
    """Text that data-dependent pruning methods look at."""

    samples: int = option(128, "number of calibration sequences, drawn at random from --dataset")
    calibration_split: str = option("train", "split of --dataset they are drawn from")


@dataclass
class PruneArguments:
    """How weights are chosen."""

    method: str = option("magnitude", "magnitude, random, wanda or sparsegpt")
    pattern: str = option("unstructured", "unstructured, or n:m with n weights kept of every m inputs (2:4)")
    sparsity: float | None = option(None, "share of weights to remove, for unstructured: 0.6")
    allocation: str = option("uniform", "how the share is spread over layers: uniform, global or erk")
    exclude: list[str] | None = field(
        default=None, metadata={"help": "modules to leave dense, as globs: k_proj 'layers.0.*'"}
    )
    indivisible: str = option("error", "inputs that m does not divide: error, skip the tensor, or dense_tail")
    update_weights: bool = option(True, "sparsegpt: let the remaining weights make up for the removed ones")
    block_size: int = option(128, "sparsegpt: columns per block")
    damping: float = option(0.01, "sparsegpt: share of the mean diagonal added to the Hessian")
    min_keep: float = option(0.0005, "global allocation: floor on what a layer keeps, as a share of all weights")
    inside: str | None = option(
        None, "masks of an earlier pruning (its directory): weights removed there stay removed, counts are of the whole"
    )
    device: str | None = option(None, "where a block is computed; by default cuda if there is one, else cpu")


@dataclass
class RetrainArguments:
    """What is trained."""

    method: str = option(
        "mask_lora",
        "full (every weight), or parts joined by +: one adapter under the mask, merged at the end (mask_lora, "
        "scale_lora, lora_prune), and groups of parameters (biases, norms, head, embeddings); or reconstruct, which "
        "works block by block without a backward pass through the model",
    )
    train_split: str = option("train", "split of --dataset to train on; a `datasets` name takes slices, train[:5000]")
    r: int | None = option(None, "adapters and head: rank; by default 16")
    lora_alpha: int | None = option(
        None, "mask_lora, lora_prune, head: the update is scaled by lora_alpha / r; by default 2 r"
    )
    use_rslora: bool = option(False, "mask_lora, lora_prune, head: scale by lora_alpha / sqrt(r) instead")
    lora_dropout: float | None = option(None, "lora_prune: share of the adapters' inputs dropped in training")
    break_symmetry: bool = option(False, "scale_lora: start so that the rescaling can become more than rank 1")
    dtype: str = option(
        "auto", "dtype of the weights in training: float32, bfloat16, or auto (float32 for full, else as stored)"
    )
    quantization: str | None = option(
        None, "adapters: train on a 4bit (nf4, double quantization) or 8bit copy, and merge into the stored weights"
    )
    save_adapter: str | None = option(
        None, "adapters and head: also keep the adapter, with its groups, unmerged, in this directory"
    )
    overwrite: bool = option(False, "replace an output directory that is not empty")
    keep_run: bool = option(False, "keep <output_dir>.run with the training checkpoints after success")


@dataclass
class EvalArguments:
    """How a checkpoint is evaluated and where the result goes."""

    split: str | None = option(None, "split of --dataset; by default test, else validation")
    stride: int | None = option(None, "step from window to window; by default no overlap")
    max_windows: int | None = option(None, "use the first so many windows; by default all")
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "zero-shot tasks of lm-evaluation-harness: names, perp for the set of PERP, or YAML files"},
    )
    limit: int | None = option(None, "--tasks: ask only the first so many questions of each; by default all")
    num_fewshot: int = option(0, "--tasks: answered examples in front of each question")
    seed: int = option(0, "--tasks: of everything random, such as the choice of those examples")
    merge: bool = option(False, "merge an adapter into its model first, and evaluate what would be saved")
    batch_size: int = option(8, "windows or answers per forward pass; does not change the result")
    dtype: str = option("auto", "dtype of the weights: auto (as stored), float32, bfloat16 or float16")
    device: str | None = option(None, "by default cuda if there is one, else cpu")
    trust_remote_code: bool = option(False, "allow model code shipped with the checkpoint to run")
    record: bool = option(True, "add the result to sparse_ft.json and report.html of a sparse_ft checkpoint")
    output_dir: str | None = option(None, "write the result as a new directory with report.html instead")


@dataclass
class ReportArguments:
    """What is shown of a checkpoint."""

    targets: bool = option(False, "list the prunable tensors with shape, orientation and block; reads no weights")
    exclude: list[str] | None = field(default=None, metadata={"help": "modules to leave out of --targets, as globs"})


@dataclass
class DemoArguments:
    """The whole story on one small model."""

    model_name_or_path: str | None = option(None, "dense model to use instead of the one the demo trains itself")
    dataset: str | None = option(None, "text to use instead of the standard library's docstrings; needs a test split")
    dataset_config: str | None = option(None, "configuration of a `datasets` name")
    text_field: str = option("text", "column or JSON key that holds the text")
    output_dir: str = option("outputs/demo", "directory for the report and the recovered checkpoints")
    sequence_length: int = option(128, "tokens per sequence")
    samples: int = option(128, "calibration sequences")
    eval_windows: int = option(160, "sequences of the test split each perplexity is measured on")
    retrain_steps: int = option(100, "optimizer steps of each retraining")
    r: int = option(16, "rank of the adapters")
    learning_rate: float = option(2e-3, "learning rate of the adapters")
    seed: int = option(0, "seed of everything random")


def parse(
    argv: Sequence[str],
    groups: Sequence[type],
    *,
    verb: str,
    description: str,
    defaults: dict[str, Any] | None = None,
    required: Sequence[str] = (),
    overrules: dict[str, str] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[Any, ...]:
    """Fill `groups` from the words after the verb.

    Args:
        argv: Words after the verb.
        groups: Dataclasses whose fields are the options.
        verb: Name for `--help`.
        description: First paragraph of `--help`.
        defaults: Replaces defaults of dataclasses that are not ours.
        required: Options of such dataclasses that must be given.
        overrules: Options of such dataclasses that stand in for another one, as `ConfigParser.change`.
        check: Sees the values by option before the dataclasses are made, and may raise.

    Raises:
        ValueError: As `ConfigParser.parse`.
    """
    parser = ConfigParser(groups, prog=f"sparse-ft {verb}", description=description)
    parser.change(defaults or {}, required, overrules)

    def check_numbers(values: Mapping[str, Any]) -> None:
        if check is not None:
            check(values)
        check_limits(values, OPTION_LIMITS)

    return parser.parse(argv, check_numbers)


def first_word_is_model(argv: Sequence[str]) -> list[str]:
    """`eval S …` means `eval --model_name_or_path S …`."""
    words = list(argv)
    return ["--model_name_or_path", *words] if words and not words[0].startswith("-") else words
