"""What the configs of all masked adapters share: the masks, what a saved adapter is bound to, and refused options.

A saved adapter is bound to its masks and its base: `adapter_config.json` holds digests of both, each layer's tensors a
fingerprint, and `sparse_masks.safetensors` beside them the masks. With a file missing, other masks or other weights,
loading fails.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, PeftType
from peft.config import CONFIG_NAME
from torch import Tensor

from sparse_ft.masks import MASKS_FILE, MaskSet, pack_bits

PRUNED = "pruned"

# option of LoraConfig -> why no masked adapter can have it
REFUSED = {
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

Config = TypeVar("Config", bound="MaskedLoraConfig")


def check_alpha(method: str, name: str, alpha: object) -> None:
    """Raise ValueError unless an alpha, called `name`, is a positive number: with 0 nothing would be learned."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{method} needs a positive finite alpha, got {name}={alpha!r}; give 2 r for c = 2.")


@dataclass
class MaskedLoraConfig(LoraConfig):
    """Base of the configs: LoraConfig's fields and the masks. Use that of a method, such as `MaskLoraConfig`.

    Args:
        r: rank of B A.
        lora_alpha: c = lora_alpha / r (/ sqrt(r) with `use_rslora`); None is 2 r, hence c = 2.
        target_modules: `"pruned"` for every tensor that has a mask, fused experts included, or names as in LoraConfig;
            each of them needs a mask.
        dense_modules: names of modules that are not pruned, such as `["lm_head"]`, to get an ordinary LoRA with c = 2,
            or lora_alpha / r, that is saved, loaded and merged with the adapter.
        masks: a `MaskSet`, or where to load one from. Held while the program runs; written beside the adapter.
        masks_digest: of the masks of the adapted tensors; written by PEFT, not by hand.
        weights_digest: of the adapted base weights; written by PEFT, not by hand.

    Raises:
        ValueError: for an option of LoraConfig that the method cannot honour.
    """

    METHOD: ClassVar[str]  # as messages call it
    TYPE: ClassVar[PeftType]
    REFUSED: ClassVar[Mapping[str, str]] = REFUSED
    INITS: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian")

    r: int = field(default=16, metadata={"help": "Rank of the update."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale c = alpha / r; default 2 r, so c = 2."})
    target_modules: list[str] | set[str] | str | None = field(
        default=PRUNED, metadata={"help": "'pruned' for every tensor that has a mask, or names as in LoraConfig."}
    )
    dense_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that are not pruned, such as lm_head, to get ordinary LoRA."}
    )
    masks_digest: str | None = field(default=None, metadata={"help": "Digest of the adapted tensors' masks."})
    weights_digest: str | None = field(default=None, metadata={"help": "Digest of the adapted base weights."})
    masks: InitVar[MaskSet | str | Path | None] = None

    def __post_init__(self, masks: MaskSet | str | Path | None) -> None:
        super().__post_init__()
        self.peft_type = self.TYPE
        self._refuse_unsupported()
        self._set_alpha()
        self.masks: MaskSet | None = MaskSet.load(masks) if isinstance(masks, (str, Path)) else masks
        saved = self.masks_digest is not None and self.weights_digest is not None
        self._saved_with = (str(self.masks_digest), str(self.weights_digest)) if saved else None

    def _refuse_unsupported(self) -> None:
        for name, reason in self.REFUSED.items():
            if getattr(self, name, None):
                raise ValueError(f"{self.METHOD} does not support {name}={getattr(self, name)!r}: {reason}.")
        if self.init_lora_weights not in self.INITS:
            *first, last = (repr(init) for init in self.INITS)
            raise ValueError(
                f"{self.METHOD} does not support init_lora_weights={self.init_lora_weights!r}, only "
                f"{', '.join(first)} or {last}: the others change the base weights, which revives pruned ones."
            )
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": r for key, r in self.rank_pattern.items()}}
        for name, r in ranks.items():
            if type(r) is not int or r <= 0:
                raise ValueError(f"{self.METHOD} needs an integer rank of at least 1, got {name}={r!r}.")
        if isinstance(self.dense_modules, str):
            raise ValueError(f"dense_modules is a list of names, got {self.dense_modules!r}; write ['lm_head'].")

    def _set_alpha(self) -> None:
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        patterns = {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in {"lora_alpha": self.lora_alpha, **patterns}.items():
            check_alpha(self.METHOD, name, alpha)

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

    def is_dense(self, name: str) -> bool:
        """Whether the parameter belongs to one of `dense_modules`."""
        return name.removesuffix(".weight") in (self.dense_modules or ())

    def packed_mask(self, name: str) -> tuple[Tensor, tuple[int, ...]]:
        """The parameter's mask as `MaskSet.packed` has it, and its shape; a single True for one of `dense_modules`."""
        assert self.masks is not None, "record() comes first"
        if self.is_dense(name):
            return pack_bits(torch.tensor(True)), ()
        return self.masks.packed(name), self.masks.shape(name)

    def made_for(self) -> str:
        """What an adapter's tensors depend on besides their mask: the method and the base."""
        return f"{self.METHOD}|{self.weights_digest}"

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
            raise ValueError(f"A {type(self).__name__} without masks cannot be saved; pass masks=... when making it.")
        os.makedirs(save_directory, exist_ok=True)
        self.masks.save(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Config], pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> Config:
        """Read a saved adapter's config together with its masks.

        Args:
            pretrained_model_name_or_path: directory or Hub repository of the adapter.
            subfolder: folder inside it.
            **kwargs: as in PEFT, for example `revision`, `token`, `cache_dir`.

        Raises:
            FileNotFoundError: if the masks are missing.
            ValueError: if there is no config, or the file of masks is damaged.
        """
        config: Config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG_NAME).is_file():
            if not (folder / MASKS_FILE).is_file():
                raise cls._no_masks(folder)
            config.masks = MaskSet.load(folder)
            return config
        download, _, _ = cls._split_kwargs(kwargs)
        try:
            file = hf_hub_download(pretrained_model_name_or_path, MASKS_FILE, subfolder=subfolder, **download)
        except OSError as error:
            raise cls._no_masks(folder) from error
        config.masks = MaskSet.load(file)
        return config

    @classmethod
    def _no_masks(cls, folder: Path) -> FileNotFoundError:
        return FileNotFoundError(
            f"The {cls.METHOD} adapter in '{folder}' has no {MASKS_FILE}; without its masks it would be another model: "
            f"copy the file that was saved with it."
        )
