"""MaskLoRA: LoRA for a pruned model that keeps every zero, as a PEFT method of its own.

    W_eff = W + c (B A) ∘ m,   c = alpha / r,   B (out, r), A (r, in), m the mask, W frozen.

Training sees the weight it will be merged into, so merged and unmerged model agree and pruned weights stay exactly
zero. PEFT does everything else: `get_peft_model`, `save_pretrained`, `PeftModel.from_pretrained`, `add_adapter`,
`load_adapter`, `merge_and_unload`, `disable_adapter`, and transformers' own adapter methods.

Example:
    >>> config = MaskLoraConfig(r=16, target_modules="pruned", masks=masks, task_type="CAUSAL_LM")
    >>> model = get_peft_model(model, config)            # train it with Trainer or SFTTrainer
    >>> model.save_pretrained("adapter")                 # PEFT's files and sparse_masks.safetensors
    >>> model = model.merge_and_unload()                 # as sparse as before
    >>> masks.verify(model)

A saved adapter is bound to its masks and its base: `adapter_config.json` holds digests of both, each layer's tensors a
fingerprint, and `sparse_masks.safetensors` beside them the masks. With a file missing, other masks or other weights,
loading fails. To load one, this module has to be imported (`import sparse_ft.adapters`); without it PEFT stops at the
unknown type MASKLORA.

Limits: no dropout (it acts on an input branch that W_eff does not have), no quantised base, none of LoRA's variants.

Source: Zimmer et al., PERP, arXiv 2312.15230, section 3 (MaskLoRA); r = 16 and c = 2 as in the authors' code.
"""

from __future__ import annotations

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from peft import LoraConfig, LoraModel
from peft.config import CONFIG_NAME
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.layer import LoraLayer
from peft.utils import register_peft_method
from torch import Tensor, nn

from sparse_ft.adapters.mask_lora_layer import AdapterMask, MaskLoraExperts, MaskLoraLinear
from sparse_ft.adapters.mask_lora_targets import PRUNED, prepare
from sparse_ft.adapters.peft_type import add_peft_type
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import canonical_name

MASKLORA = add_peft_type("MASKLORA")

# field of LoraConfig -> why MaskLoRA cannot have it
_REFUSED = {
    "lora_dropout": "dropout acts on the adapter's own input, which the masked weight does not have",
    "use_dora": "DoRA rescales whole columns of the dense weight",
    "lora_bias": "a bias of the adapter is not part of the masked weight; use bias='lora_only' to train biases",
    "use_qalora": "the base has to be in floating point",
    "loftq_config": "LoftQ changes the base weights",
    "eva_config": "EVA initialises through LoRA's own layers",
    "corda_config": "CorDA changes the base weights",
    "lora_ga_config": "LoRA-GA changes the base weights",
    "velora_config": "VeLoRA replaces LoRA's backward pass",
    "monteclora_config": "MonteCLoRA samples unmasked factors",
    "kasa_config": "KaSA changes the base weights",
    "arrow_config": "Arrow routes between unmasked factors",
    "use_bdlora": "block-diagonal factors are not masked",
    "alora_invocation_tokens": "aLoRA cannot be merged",
    "megatron_config": "Megatron's layers are not supported",
    "layer_replication": "replicated layers share their weights, so the adapters could not be merged",
    "trainable_token_indices": "it belongs to the embeddings; train them through modules_to_save",
    "ensure_weight_tying": "tied weights cannot be adapted",
}
_INITS = (True, False, "gaussian")
_NO_FINGERPRINT = (
    "The adapter's tensors for '{}' were not saved by MaskLoRA, for they have no fingerprint of mask and base; load a "
    "directory that save_pretrained wrote."
)


@dataclass
class MaskLoraConfig(LoraConfig):
    """Configuration of MaskLoRA: LoraConfig's fields and the masks.

    Args:
        r: rank of B A.
        lora_alpha: c = lora_alpha / r (/ sqrt(r) with `use_rslora`); None is 2 r, hence c = 2.
        target_modules: `"pruned"` for every tensor that has a mask, fused experts included, or names as in LoraConfig;
            each of them needs a mask (one that is True everywhere for a dense layer).
        masks: a `MaskSet`, or where to load one from. Held while the program runs; written beside the adapter.
        masks_digest: of the masks of the adapted tensors; written by PEFT, not by hand.
        weights_digest: of the adapted base weights; written by PEFT, not by hand.

    Raises:
        ValueError: for an option of LoraConfig that MaskLoRA cannot honour.

    Example:
        >>> MaskLoraConfig(r=16, masks=masks, task_type="CAUSAL_LM", exclude_modules=["k_proj"])
    """

    r: int = field(default=16, metadata={"help": "Rank of the masked update."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale c = alpha / r; default 2 r, so c = 2."})
    target_modules: list[str] | set[str] | str | None = field(
        default=PRUNED, metadata={"help": "'pruned' for every tensor that has a mask, or names as in LoraConfig."}
    )
    masks_digest: str | None = field(default=None, metadata={"help": "Digest of the adapted tensors' masks."})
    weights_digest: str | None = field(default=None, metadata={"help": "Digest of the adapted base weights."})
    masks: InitVar[MaskSet | str | Path | None] = None

    def __post_init__(self, masks: MaskSet | str | Path | None) -> None:
        super().__post_init__()
        self.peft_type = MASKLORA
        self._refuse_unsupported()
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        self.masks: MaskSet | None = MaskSet.load(masks) if isinstance(masks, (str, Path)) else masks
        saved = self.masks_digest is not None and self.weights_digest is not None
        self._saved_with = (str(self.masks_digest), str(self.weights_digest)) if saved else None

    def _refuse_unsupported(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name, None):
                raise ValueError(f"MaskLoRA does not support {name}={getattr(self, name)!r}: {reason}.")
        if self.init_lora_weights not in _INITS:
            raise ValueError(
                f"MaskLoRA does not support init_lora_weights={self.init_lora_weights!r}, only True, False or "
                f"'gaussian': the others change the base weights, which revives pruned ones."
            )

    def record(self, masks: MaskSet, masks_digest: str, weights_digest: str) -> None:
        """Note what the adapter works on; a saved adapter's digests have to agree.

        Raises:
            ValueError: if they do not.
        """
        saved_masks, saved_weights = self._saved_with or (masks_digest, weights_digest)
        if saved_masks != masks_digest:
            raise ValueError(
                f"The adapter was trained with masks {saved_masks[:12]} but these are {masks_digest[:12]}; give the "
                f"{MASKS_FILE} that was saved with it."
            )
        if saved_weights != weights_digest:
            raise ValueError(
                f"The adapter was trained on base weights {saved_weights[:12]} but this model has "
                f"{weights_digest[:12]}; load the base it was trained on, in the same precision."
            )
        self.masks, self.masks_digest, self.weights_digest = masks, masks_digest, weights_digest

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json holds; sets in order, so that equal configs give equal files."""
        fields: dict[str, Any] = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, before it, the masks.

        Raises:
            ValueError: if the config has no masks.
        """
        if self.masks is None:
            raise ValueError("A MaskLoraConfig without masks cannot be saved; pass masks=... when making it.")
        os.makedirs(save_directory, exist_ok=True)
        self.masks.save(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MaskLoraConfig:
        """Read a saved adapter's config together with its masks.

        Args:
            pretrained_model_name_or_path: directory or Hub repository of the adapter.
            subfolder: folder inside it.
            **kwargs: as in PEFT, for example `revision`, `token`, `cache_dir`.

        Raises:
            FileNotFoundError: if the masks are missing.
            ValueError: if there is no config, or the file of masks is damaged.
        """
        config: MaskLoraConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            config.masks = _load_beside(folder)
            return config
        download, _, _ = cls._split_kwargs(kwargs)
        try:
            file = hf_hub_download(pretrained_model_name_or_path, MASKS_FILE, subfolder=subfolder, **download)
        except OSError as error:
            raise _no_masks(str(folder)) from error
        config.masks = MaskSet.load(file)
        return config


def _load_beside(folder: Path) -> MaskSet:
    if not (folder / MASKS_FILE).is_file():
        raise _no_masks(str(folder))
    return MaskSet.load(folder)


def _no_masks(place: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"The MaskLoRA adapter in '{place}' has no {MASKS_FILE}; without its masks it would be another model: copy "
        f"the file that was saved with it."
    )


class MaskLoraModel(LoraModel):
    """PEFT's LoraModel with masked layers; made by `get_peft_model`, seldom by hand."""

    prefix = "lora_"

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check the adapter's targets, then add its layers to the model in place.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: see `mask_lora_targets.prepare`.
        """
        prepare(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        lora_config: MaskLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        # an adapter added to a layer that is adapted already stays on that layer
        layer = next(
            layer
            for layer in (target, getattr(parent, target_name))
            if isinstance(layer, (MaskLoraLinear, MaskLoraExperts))
            and getattr(layer, "parameter_name", None) == parameter_name
            and adapter_name in layer.lora_A
        )
        name = canonical_name(current_key if parameter_name else f"{current_key}.weight")
        assert lora_config.masks is not None and lora_config.weights_digest is not None
        layer.set_mask(adapter_name, AdapterMask(name, lora_config.masks[name], lora_config.weights_digest))

    @staticmethod
    def _create_new_module(
        lora_config: MaskLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> LoraLayer:
        parameter_name = kwargs.pop("parameter_name", None)
        if parameter_name is None:
            return MaskLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        return MaskLoraExperts(target, adapter_name, parameter_name=parameter_name, config=lora_config, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for name, module in model.named_modules():
            if isinstance(module, AdapterMask) and name.endswith(f".{adapter_name}"):
                saved = remapped.get(f"{name}.fingerprint")
                problem = _NO_FINGERPRINT.format(module.name) if saved is None else module.mismatch(saved)
                if problem:
                    raise RuntimeError(problem)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is of no use to MaskLoRA: it never changes the base."
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError("MaskLoRA adapters cannot be combined by their factors; activate several with set_adapter.")


if MASKLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="masklora", config_cls=MaskLoraConfig, model_cls=MaskLoraModel, prefix="lora_")
