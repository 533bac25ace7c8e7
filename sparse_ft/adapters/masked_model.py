"""The tuner of all masked adapters: PEFT's LoraModel with masked layers, and every check before the first change."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_ft.adapters.combining import combined_config
from sparse_ft.adapters.masked_config import MaskedLoraConfig
from sparse_ft.adapters.masked_layer import AdapterMask, MaskedExperts, MaskedLayer, PlainLinear
from sparse_ft.adapters.quantised import (
    QuantisedLinear,
    QuantisedPlainLinear,
    cannot_merge,
    guard_layers,
    is_quantised,
)
from sparse_ft.adapters.targets import prepare
from sparse_ft.models import canonical_name

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NO_FINGERPRINT = (
    "The adapter's tensors for '{}' were not saved by {}, for they have no fingerprint of mask and base; load a "
    "directory that save_pretrained wrote."
)


class MaskedLoraModel(LoraModel):
    """Base of the tuners. A method names its layers."""

    prefix = "lora_"
    combinations: tuple[str, ...] = ("cat", "linear", "svd")
    linear_layer: type[MaskedLayer]
    quantised_layer: type[QuantisedLinear]
    experts_layer: type[MaskedExperts]
    dense_layer: type[MaskedLayer] = PlainLinear

    @classmethod
    def layer_for(cls, module: nn.Module, weight: Tensor, *, dense: bool) -> type[MaskedLayer] | None:
        """The class of layer that adapts this weight of a plain module, or None if there is none.

        Args:
            module: `nn.Linear`, quantised or not, Conv1D or fused experts.
            weight: the parameter to adapt; a stack of experts has three dimensions.
            dense: the module is one of `dense_modules`.
        """
        if is_quantised(module):
            return QuantisedPlainLinear if dense else cls.quantised_layer
        if weight.dtype not in _FLOATS:
            return None
        if weight.ndim == 3:
            return None if dense else cls.experts_layer
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            return None
        return cls.dense_layer if dense else cls.linear_layer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check the adapter's targets, then add its layers to the model in place.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: see `targets.prepare` and `quantised.guard_layers`.
        """
        guard_layers(model)
        prepare(self.peft_config[adapter_name], model, self.layer_for)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        lora_config: MaskedLoraConfig,
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
            if isinstance(layer, MaskedLayer)
            and getattr(layer, "parameter_name", None) == parameter_name
            and adapter_name in layer.lora_A
        )
        name = canonical_name(current_key if parameter_name else f"{current_key}.weight")
        layer.set_mask(adapter_name, AdapterMask(name, *lora_config.packed_mask(name), lora_config.made_for()))

    def _create_new_module(
        self, lora_config: MaskedLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> LoraLayer:
        parameter_name = kwargs.pop("parameter_name", None)
        if parameter_name is not None:
            kwargs["parameter_name"] = parameter_name
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        weight = getattr(base, parameter_name or "weight")
        dense = lora_config.is_dense(canonical_name(f"{kwargs['target_name']}.weight"))
        layer = self.layer_for(base, weight, dense=dense)
        assert layer is not None, "prepare() refuses these"
        return layer(target, adapter_name, config=lora_config, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MaskedLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        for name, module in model.named_modules():
            if isinstance(module, AdapterMask) and name.endswith(f".{adapter_name}"):
                saved = remapped.get(f"{name}.fingerprint")
                problem = (
                    _NO_FINGERPRINT.format(module.name, config.METHOD) if saved is None else module.mismatch(saved)
                )
                if problem:
                    raise RuntimeError(problem)
        return remapped

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: nn.Module, peft_config: MaskedLoraConfig, *args: Any
    ) -> dict[str, Tensor]:
        raise ValueError(
            f"path_initial_model_for_weight_conversion is of no use to {peft_config.METHOD}: it never changes the base."
        )

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self.modules():
            if isinstance(layer, QuantisedLinear):
                raise ValueError(cannot_merge(layer.method))

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights; with `safe_merge` all of them or, if one is broken, none.

        Raises:
            ValueError: with `safe_merge`, if a merged weight is not finite.
        """
        self._check_finite(adapter_names, safe_merge)
        super().merge_adapter(adapter_names)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_finite(adapter_names, merge and safe_merge)
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, adapter_names=adapter_names)
        return model

    def _check_finite(self, adapter_names: list[str] | None, wanted: bool) -> None:
        for layer in self.modules() if wanted else ():
            if isinstance(layer, MaskedLayer):
                layer.check_finite(adapter_names)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add an adapter that is the weighted sum of others with the same masks.

        Args:
            adapters: names.
            weights: one for each.
            adapter_name: of the new adapter; it is neither active nor trained yet.
            combination_type: "cat" is exact and has the sum of the ranks; ScaleLoRA knows only this one, and adds 1 to
                the rank. "svd" is the best approximation of rank `svd_rank` of the sum before masking. "linear" adds up
                the factors of adapters of equal rank: small, and a rough approximation.
            svd_rank: by default the largest rank among the adapters.

        Raises:
            ValueError: if names, weights, masks or ranks do not go together.
        """
        chosen = self._check_combination(adapters, weights, adapter_name, combination_type)
        layers: dict[str, MaskedLayer] = {}
        for layer in (module for module in self.modules() if isinstance(module, MaskedLayer)):
            layers.update({str(layer.lora_mask[name].name): layer for name in chosen if name in layer.lora_A})
        new = {name: layer.combination(chosen, combination_type, svd_rank) for name, layer in layers.items()}
        ranks = {name: factors.A.shape[1] for name, factors in new.items()}
        self.peft_config[adapter_name] = combined_config([self.peft_config[name] for name in chosen], ranks)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for name, layer in layers.items():
            layer.set_factors(adapter_name, new[name])
            for factor in (layer.lora_A, layer.lora_B):
                factor[adapter_name].requires_grad_(False)

    def _check_combination(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str
    ) -> dict[str, float]:
        """Weight by adapter."""
        missing = [name for name in adapters if name not in self.peft_config]
        if missing or not adapters:
            raise ValueError(f"No adapters {missing} to combine; there are {sorted(self.peft_config)}.")
        if len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            raise ValueError(f"Give each adapter once and one weight for each, got {adapters} and {weights}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter '{adapter_name}' already; choose another name, or delete it.")
        if combination_type not in self.combinations:
            method = self.peft_config[adapters[0]].METHOD
            raise ValueError(
                f"{method} does not support combination_type={combination_type!r}, only {', '.join(self.combinations)}."
            )
        return dict(zip(adapters, weights, strict=True))
