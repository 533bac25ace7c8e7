"""Options of `sparse-ft delta`, by action."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_ft.cli.plain_options import option

__all__ = ["DeltaApplyArguments", "DeltaArguments", "DeltaInfoArguments", "DeltaSearchArguments", "ScaleArguments"]


@dataclass
class DeltaArguments:
    """delta prune (also without the word): a fine-tune becomes a small delta of its base."""

    base: str = field(metadata={"help": "directory or Hub name of the base model"})
    finetuned: str = field(metadata={"help": "of the fine-tune, or the directory of a LoRA adapter of the base"})
    output_dir: str | None = option(None, "directory to make; it appears when it is whole")
    overwrite: bool = option(False, "replace an output directory that is not empty")
    seed: int = option(0, "seed of everything random")
    method: str = option("dare", "dare, darex_q (dare with a searched scale), structural, magnitude or wanda")
    density: float = option(0.01, "share of the delta's entries that is kept, 0 to 1")
    scale: float | None = option(None, "what kept entries are divided by; by default the density, or 1 where ranked")
    axis: str = option("row", "structural: what is dropped as a whole: row (an output), column (an input) or neuron")
    preset: str = option(
        "all", "what is pruned: all (but task heads), encoder (all but classifier), decoder (blocks only)"
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "tensors not to prune: regular expressions, or embeddings, norms, lm_head"}
    )
    excluded: str = option("keep-finetuned", "what those tensors are: keep-finetuned (stored whole) or take-base")
    values_dtype: str = option("auto", "dtype of stored entries: auto (the fine-tune's), float32, bfloat16 or float16")


@dataclass
class ScaleArguments:
    """The text that darex_q, wanda and delta search look at, and what makes a scale good."""

    objective: str | None = option(
        None, "perplexity of the text, or output_change against the fine-tune; by default the latter if that is given"
    )
    samples: int = option(50, "number of sequences of --dataset")
    split: str = option("train", "split of --dataset they are taken from; not the one results are reported on")
    max_scale: float | None = option(None, "largest scale tried; by default ten times the density, at most 1")
    device: str | None = option(None, "where the model runs; by default cuda if there is one, else cpu")


@dataclass
class DeltaSearchArguments:
    """delta search: another scale for a delta that is there; no value in it changes."""

    delta: str = field(metadata={"help": "delta directory"})
    base: str = field(metadata={"help": "directory or Hub name of its base model"})
    finetuned: str | None = option(None, "the fine-tune it was taken from; needed for output_change")
    seed: int = option(0, "seed of the sequences drawn, and of the masks of output_change")


@dataclass
class DeltaApplyArguments:
    """delta apply: base + delta as an ordinary checkpoint."""

    delta: str = field(metadata={"help": "delta directory"})
    base: str = field(metadata={"help": "directory or Hub name of its base model"})
    output_dir: str | None = option(None, "directory to make; it appears when it is whole")
    overwrite: bool = option(False, "replace an output directory that is not empty")
    dtype: str = option("auto", "dtype of the weights: auto (the fine-tune's), float32, bfloat16 or float16")
    scale: float | None = option(None, "what kept entries are divided by, in place of the stored scale")
    check_base: bool = option(True, "refuse a base other than the one the delta was taken from")


@dataclass
class DeltaInfoArguments:
    """delta info: what a delta holds."""

    delta: str = field(metadata={"help": "delta directory"})
