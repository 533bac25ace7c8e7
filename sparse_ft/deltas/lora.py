"""A LoRA adapter as a delta: what each of its matrices adds to the base, without importing PEFT.

    delta = s * B A        s = alpha / r, or alpha / sqrt(r) with rsLoRA        (out, in); transposed for Conv1D

An adapter always takes part as this product. Dropping entries of A and B instead is another method, of larger variance,
and adapters of different rank can only be joined as products. DoRA rescales each output row of base + s B A to a length
that was trained; its delta is the result less the base.

The directory is the one PEFT writes: `adapter_config.json` and `adapter_model.safetensors`. What was trained whole
beside the matrices (modules_to_save, biases, embeddings) comes as it is.

Source: Hu et al. 2021, LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732; DoRA, arXiv 2402.09353.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.checkpoints.resolve import ADAPTER_CONFIG_FILE, member
from sparse_ft.models import canonical_name

ADAPTER_FILE = "adapter_model.safetensors"

_PART = re.compile(r"^(.*)\.lora_(embedding_A|embedding_B|A|B|magnitude_vector)(?:\.weight)?$")
# Settings under which the product is not all the adapter does, or is added to other weights than the base's.
_UNSUPPORTED = (
    "target_parameters", "layer_replication", "lora_bias", "trainable_token_indices", "megatron_config", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "monteclora_config", "kasa_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraTarget:
    """One adapted matrix.

    Attributes:
        name: of the base's tensor, `"model.layers.0.self_attn.q_proj.weight"`.
        a: name of A in the adapter's file, (r, in), or (r, vocabulary) of an embedding.
        b: name of B, (out, r).
        scaling: s.
        transposed: the base's tensor is (in, out).
        magnitude: name of DoRA's row lengths in the file, or None.
        shape: of the base's tensor.
    """

    name: str
    a: str
    b: str
    scaling: float
    transposed: bool
    magnitude: str | None
    shape: tuple[int, ...]


class LoraAdapter(Mapping[str, LoraTarget]):
    """An adapter directory, read one matrix at a time.

    Attributes:
        targets: the adapted matrices by the base's tensor names.
        whole: tensors that replace the base's (modules_to_save, biases): the base's names, and those in the file.
        base: `base_model_name_or_path` of the configuration, or None.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], reader: CheckpointReader) -> None:
        self._directory, self._reader = directory, reader
        self.base: str | None = config.get("base_model_name_or_path")
        self.targets, self.whole = _find_targets(directory, config, reader)

    def __getitem__(self, name: str) -> LoraTarget:
        return self.targets[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def check_base(self, names: Collection[str]) -> None:
        """Refuse a base that lacks an adapted tensor.

        Raises:
            ValueError: naming it.
        """
        missing = [name for name in self.targets if name not in names]
        if missing:
            raise ValueError(
                f"The adapter '{self._directory}' changes '{missing[0]}' ({len(missing)} such tensors), which the base "
                f"does not have; give the base it was trained on, with tied weights stored separately if it adapts one."
            )

    def delta(self, name: str, base: Tensor | None = None) -> Tensor:
        """What the adapter adds to a tensor, fp32, in the shape of the base's tensor.

        Args:
            name: a key of `targets`.
            base: the base's tensor; only DoRA needs it.

        Raises:
            ValueError: if the adapter does not change this tensor, DoRA is given no base, or shapes do not fit.
        """
        if name not in self.targets:
            raise ValueError(f"The adapter '{self._directory}' does not change '{name}'.")
        target = self.targets[name]
        if base is not None and tuple(base.shape) != target.shape:
            raise ValueError(
                f"'{name}' has shape {tuple(base.shape)} in the base but the adapter '{self._directory}' is for "
                f"{target.shape}; give the base it was trained on."
            )
        a, b = self._reader.get(target.a).float(), self._reader.get(target.b).float()
        product = (b.flatten(1) @ a.flatten(1)).mul_(target.scaling)
        product = product.t().contiguous() if target.transposed else product.reshape(target.shape)
        if target.magnitude is None:
            return product
        if base is None:
            raise ValueError(f"'{name}' is adapted by DoRA, whose delta depends on the base; give its tensor.")
        return dora_delta(base, product, self._reader.get(target.magnitude), transposed=target.transposed)

    def replacement(self, name: str) -> Tensor:
        """A tensor that was trained whole, as stored."""
        return self._reader.get(self.whole[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor that was trained whole."""
        return self._reader.dtype(self.whole[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that was trained whole."""
        return self._reader.shape(self.whole[name])


def dora_delta(base: Tensor, product: Tensor, magnitude: Tensor, *, transposed: bool = False) -> Tensor:
    """DoRA's merged weight less the base, fp32.

    Args:
        base: (out, in), or (in, out) if `transposed`.
        product: s B A in the same layout.
        magnitude: (out,), the trained length of each output row.
        transposed: the layout is (in, out).

    Example:
        >>> dora_delta(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([10.0]))
        tensor([[3., 4.]])
    """
    weight = base.float() + product
    along = 0 if transposed else 1
    length = weight.norm(dim=along, keepdim=True) if weight.ndim == 2 else weight.flatten(1).norm(dim=1)
    factor = magnitude.float().reshape(-1) / length.reshape(-1)
    shape = [1] * weight.ndim
    shape[1 if transposed else 0] = -1
    return weight * factor.reshape(shape) - base.float()


def load_lora(directory: str | Path) -> LoraAdapter:
    """Open an adapter directory; matrices are read when they are asked for.

    Raises:
        FileNotFoundError: if there is no configuration or no safetensors weights.
        ValueError: if it is no LoRA, of a kind whose weights are more than the base plus a product, or damaged.

    Example:
        >>> adapter = load_lora("my-adapter")
        >>> merged = base[name].float() + adapter.delta(name, base[name])
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise FileNotFoundError(f"No {ADAPTER_CONFIG_FILE} in '{directory}'; give the directory PEFT wrote.")
    file = member(directory, ADAPTER_CONFIG_FILE)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not valid JSON ({error}); copy the adapter again.") from None
    _check_kind(file, config)
    if not (directory / ADAPTER_FILE).exists():
        raise FileNotFoundError(f"No {ADAPTER_FILE} in '{directory}'; save the adapter as safetensors.")
    return LoraAdapter(directory, config, CheckpointReader(member(directory, ADAPTER_FILE)))


def _check_kind(file: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"'{file}' is of type {kind}, not LORA; merge the adapter into its base and give the result.")
    for setting in _UNSUPPORTED:
        if config.get(setting):
            raise ValueError(
                f"'{file}' sets {setting}, with which an adapter is more than base + s B A; merge it with PEFT and "
                f"give the result."
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"'{file}' sets init_lora_weights to '{start}', which changes the base's weights before training; convert "
            f"the adapter with PEFT's path_initial_model_for_weight_conversion, or merge it and give the result."
        )


def _find_targets(
    directory: Path, config: Mapping[str, Any], reader: CheckpointReader
) -> tuple[dict[str, LoraTarget], dict[str, str]]:
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for name in reader.names():
        match = _PART.match(name)
        if match:
            parts.setdefault(canonical_name(f"{match[1]}.weight").removesuffix(".weight"), {})[match[2]] = name
        elif ".lora_" in name:
            raise ValueError(f"'{directory}' has a tensor '{name}' of a kind of LoRA that is not supported; merge it.")
        else:
            whole[canonical_name(name.replace(".modules_to_save.default", ""))] = name
    targets = {f"{module}.weight": _target(directory, config, reader, module, found) for module, found in parts.items()}
    if not targets and not whole:
        raise ValueError(f"'{directory}' adapts nothing; its {ADAPTER_FILE} has no tensors.")
    return targets, whole


def _target(
    directory: Path, config: Mapping[str, Any], reader: CheckpointReader, module: str, found: Mapping[str, str]
) -> LoraTarget:
    embedding = "embedding_A" in found or "embedding_B" in found
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if any(name not in found for name in names):
        raise ValueError(f"'{directory}' has {sorted(found)} of '{module}' but both A and B are needed; copy it again.")
    a, b = (found[name] for name in names)
    shape_a, shape_b = reader.shape(a), reader.shape(b)
    if len(shape_a) < 2 or len(shape_b) != len(shape_a) or shape_a[0] != shape_b[1] or not all(shape_a + shape_b):
        raise ValueError(f"A {shape_a} and B {shape_b} of '{module}' in '{directory}' do not fit; it is damaged.")
    transposed = embedding or (bool(config.get("fan_in_fan_out")) and len(shape_a) == 2)
    shape = (shape_a[1], shape_b[0]) if transposed else (shape_b[0], *shape_a[1:])
    scaling = _scaling(config, module, shape_a[0])
    magnitude = found.get("magnitude_vector")
    # an embedding's product is transposed, but DoRA measures its rows, the tokens
    if embedding and magnitude is not None:
        raise ValueError(f"'{directory}' adapts the embedding '{module}' with DoRA, not supported; merge it with PEFT.")
    return LoraTarget(f"{module}.weight", a, b, scaling, transposed, magnitude, shape)


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of one module: its alpha by the first pattern that fits, over its rank."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
