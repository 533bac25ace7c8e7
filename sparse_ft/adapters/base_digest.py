"""What binds an adapter to its base: a digest of the weights it was trained on.

Of a quantised model it is the digest of the weights before quantisation, so that the adapter can be loaded on them and
merged into them (`merge_into_base`). They are looked for where the model was loaded from: in the record of a sparse
checkpoint if its masks are these, else in the files, read one tensor at a time. If neither can be had, the digest is of
the packed weights and says so by its prefix; the adapter then only fits this quantised model.

A digest is over fp32 values, so a checkpoint in bfloat16 has one and the same whether it is loaded in bfloat16 or in
float32; one in float32 that is loaded in bfloat16 has another. For a quantised model the values are those in the files:
merge into the base in its stored dtype. Tensors that the files hold in another form than the model, such as fused
experts, are taken as they were loaded.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from sparse_ft.adapters.quantised import FloatWeights, quantised_bytes
from sparse_ft.checkpoints import RECORD_FILE, CheckpointReader, read_sidecars
from sparse_ft.masks import MASKS_FILE, MaskSet, pack_bits
from sparse_ft.masks.mask_set import tensor_digest
from sparse_ft.models import load_config, load_model, named_weights

PACKED = "packed:"


def bits_digest(masks: MaskSet) -> str:
    """SHA-256 over names, shapes and bits, whatever patterns the set declares."""
    sha = hashlib.sha256()
    for name in sorted(masks):
        sha.update(f"{name}|{masks.shape(name)}|".encode() + pack_bits(masks[name]).numpy().tobytes())
    return sha.hexdigest()


def base_digest(masks: MaskSet, model: nn.Module, dense: list[str]) -> str:
    """Digest of the masked weights, and of the dense modules where there are any.

    Args:
        masks: of the adapted tensors.
        model: plain or adapted, quantised or not.
        dense: modules with an ordinary LoRA.

    Returns:
        SHA-256 in hexadecimal, after `"packed:"` if it is of quantised weights.
    """
    loaded = FloatWeights(model)
    names = [*masks, *(f"{module}.weight" for module in dense)]
    quantised = [name for name in names if name in loaded.quantised]
    if not quantised:
        weights = named_weights(model)
        return _joined(masks.weights_digest(weights), weights, dense)
    try:
        directory = _origin(model)
        digest = _recorded_digest(masks, directory)
        wanted = quantised if digest is None else [name for name in quantised if name not in masks]
        stored = _stored_weights(directory, wanted, loaded) if digest is None or dense else {}
        if digest is None:
            masks.verify(stored)
            digest = masks.weights_digest(stored)
        return _joined(digest, stored, dense)
    except (OSError, ValueError, RuntimeError) as error:
        warnings.warn(
            f"The adapter can only be used on this quantised model, and merge_into_base will refuse it, for the "
            f"weights before quantisation are not to be had: {error}",
            stacklevel=2,
        )
        return PACKED + _packed_digest(loaded, names)


def _joined(digest: str, weights: Mapping[str, Tensor], dense: list[str]) -> str:
    if not dense:
        return digest
    parts = [f"{module}|{tensor_digest(weights[f'{module}.weight'])}" for module in dense]
    return hashlib.sha256("|".join([digest, *parts]).encode()).hexdigest()


def _packed_digest(weights: FloatWeights, names: list[str]) -> str:
    sha = hashlib.sha256()
    for name in sorted(names):
        module = weights.quantised.get(name)
        parts = [tensor_digest(weights[name])] if module is None else map(tensor_digest, quantised_bytes(module))
        sha.update(f"{name}|{'|'.join(parts)}|".encode())
    return sha.hexdigest()


def _origin(model: nn.Module) -> Path:
    """The directory a model was loaded from, in the Hub's cache for a Hub name.

    Raises:
        FileNotFoundError: if it is not known, or not there any more.
    """
    name = str(getattr(model, "name_or_path", "") or "")
    if Path(name).is_dir() and name:
        return Path(name)
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"no directory and no cached repository '{name}'.") from error


def _recorded_digest(masks: MaskSet, directory: Path) -> str | None:
    """The digest in the record of a sparse checkpoint whose masks are just these."""
    if not all((directory / name).is_file() for name in (RECORD_FILE, MASKS_FILE)):
        return None
    stored, record = read_sidecars(directory)
    return record.weights_digest if bits_digest(stored) == bits_digest(masks) else None


def _stored_weights(directory: Path, wanted: list[str], loaded: FloatWeights) -> Mapping[str, Tensor]:
    """The weights in the files by the model's names, and what the files have not as it was loaded.

    Args:
        directory: of a checkpoint.
        wanted: tensors that have to come from the files; if these use other names, transformers has to load them all.
        loaded: the model.

    Raises:
        FileNotFoundError: if there are no safetensors.
        ValueError: if they are quantised or cannot be read.
    """
    stored: Mapping[str, Tensor] = CheckpointReader(directory)
    if getattr(load_config(directory), "quantization_config", None) is not None:
        raise ValueError(f"'{directory}' holds the weights quantised.")
    if any(name not in stored for name in wanted):
        stored = named_weights(load_model(directory))
    return ChainMap(stored, loaded)  # type: ignore[arg-type]
