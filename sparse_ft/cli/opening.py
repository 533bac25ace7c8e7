"""Open the checkpoint a verb starts from: a directory, a Hub name, and with `--allow_pickle` pickled weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter, copy_side_files, resolve_checkpoint
from sparse_ft.checkpoints.resolve import weights_file
from sparse_ft.cli.arguments import ModelArguments
from sparse_ft.models import model_class

__all__ = ["is_causal", "open_source"]


@contextmanager
def open_source(model: ModelArguments) -> Iterator[Path]:
    """The directory of a checkpoint whose weights are safetensors, for as long as the block lasts.

    Pickled weights are converted into a temporary directory first, opened as plain tensors only.

    Raises:
        FileNotFoundError: if there is no such checkpoint, or it has no config or weights.
        ValueError: if its weights are pickled and `--allow_pickle` was not given, or are not plain tensors.
    """
    source = resolve_checkpoint(model.model_name_or_path, allow_pickle=model.allow_pickle)
    if weights_file(source, allow_pickle=model.allow_pickle).name.endswith((".safetensors", ".safetensors.index.json")):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="sparse_ft_") as scratch:
        reader = CheckpointReader(source, allow_pickle=True)
        plan = [(file, {n: (reader.dtype(n), reader.shape(n)) for n in names}) for file, names in reader.shards]
        with CheckpointWriter(scratch, plan) as writer:
            for name in reader.names():
                writer.write(name, reader.get(name))
        copy_side_files(source, scratch)
        yield Path(scratch)


def is_causal(config: PretrainedConfig) -> bool:
    """Whether the model predicts the next token, so that perplexity and next-token training mean something."""
    return model_class(config).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
