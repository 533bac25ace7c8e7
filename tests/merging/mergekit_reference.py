"""A mergekit YAML worked out a second time: whole tensors in fp64, settings looked up as its documentation says.

Slow and plain, for tests only. The random numbers are the package's; everything else is written anew: which tensor is
made of which, at which position of a gradient, with which parameter, by which formula.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from merging import merge_formulas as formulas
from merging.checkpoints import read
from safetensors.torch import load_file
from torch import Tensor

from sparse_ft.deltas import random_keep
from sparse_ft.deltas.random_mask import random_uniform

NORMALIZED = {"linear", "ties", "della"}
RESCALED = {"dare_linear", "dare_ties", "della", "della_linear"}
ELECTING = {"ties", "dare_ties", "della", "breadcrumbs_ties"}
NO_BASE = {"linear"}
Tensors = dict[str, Tensor]


def merged_by_hand(place: Path, text: str) -> Tensors:
    """Every tensor of the output in fp64, for models of one vocabulary; `@name` stands for a model in `place`."""
    config = yaml.safe_load(text.replace("@", f"{place}/"))
    out: Tensors = {}
    for name, slice_, module, index, t in _outputs(config):
        out[name] = _one(config, name, slice_, module, index, t)
    return out


def model_of(label: str) -> Tensors:
    """A model as a label names it, in fp64, its adapter added."""
    path, _, adapter = label.partition("+")
    tensors = {name: tensor.double() for name, tensor in read(Path(path)).items()}
    if adapter:
        how = json.loads((Path(adapter) / "adapter_config.json").read_text())
        factors = load_file(Path(adapter) / "adapter_model.safetensors")
        for key in [key for key in factors if key.endswith("lora_A.weight")]:
            product = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            tensors[name] = tensors[name] + how["lora_alpha"] / how["r"] * product
    return tensors


def setting(raw: Any, tensor: str, t: float) -> Any:
    """A value of the YAML for one tensor: number, gradient, or the first case whose filter is in the name."""
    if isinstance(raw, dict):
        raw = [raw]
    if isinstance(raw, list) and raw and isinstance(raw[0], dict):
        fitting = [case["value"] for case in raw if case.get("filter") in (None, "*") or case["filter"] in tensor]
        return setting(fitting[0], tensor, t) if fitting else None
    if isinstance(raw, list):
        s = t * (len(raw) - 1)
        low, high = raw[int(s)], raw[min(int(s) + 1, len(raw) - 1)]
        return low + (high - low) * (s - int(s))
    return raw


def _outputs(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, int | None, float]]:
    """Name, slice, module, layer within the slice and position of every output tensor."""
    modules = config.get("modules") or {"": config}
    for part, module in modules.items():
        slices = module.get("slices") or [{"sources": module["models"]}]
        first = model_of(slices[0]["sources"][0]["model"])
        names = [name for name in first if not part or part in name.split(".")]
        inside = sorted({name.split(".", 3)[3] for name in names if ".layers." in name})
        layers = len({name.split(".")[2] for name in names if ".layers." in name})
        for name in names:
            if ".layers." not in name:
                yield name, slices[0] if "embed" in name else slices[-1], module, None, 0.0
        number = 0
        for slice_ in slices:
            low, high = slice_["sources"][0].get("layer_range", (0, layers))
            for i in range(high - low):
                t = i / (high - low - 1) if high - low > 1 else 1.0
                for rest in inside:
                    yield f"model.layers.{number}.{rest}", slice_, module, i, t
                number += 1


def _one(config: Mapping[str, Any], name: str, slice_: Any, module: Any, index: int | None, t: float) -> Tensor:
    method = config["merge_method"]
    base = slice_.get("base_model") or config.get("base_model")
    own: dict[str, str] = {}
    for source in slice_["sources"]:
        own[source["model"]] = _input_name(name, source, index)
    if base is not None and base not in own:
        own[base] = _input_name(name, slice_["sources"][0], index)
    levels = [slice_.get("parameters"), module.get("parameters"), config.get("parameters")]

    def get(parameter: str, default: Any, source: Any = None) -> Any:
        tensor = own[source["model"]] if source else name
        for level in [source.get("parameters") if source else None, *levels]:
            value = setting((level or {}).get(parameter), tensor, t)
            if value is not None:
                return value
        return default

    sources = [s for s in slice_["sources"] if method in NO_BASE or s["model"] != base]
    tensors = [model_of(s["model"])[own[s["model"]]] for s in sources]
    start = None if method in NO_BASE else model_of(base)[own[base]]
    weights = [get("weight", None, s) for s in sources]
    if method == "slerp":
        return formulas.arc(start, tensors[0], get("t", None))
    if start is None:
        total = sum(w * x for w, x in zip(weights, tensors, strict=True))
        return total / (sum(weights) if get("normalize", True) else 1.0)
    compat = config.get("compat") == "mergekit"
    normalize = get("normalize", method in NORMALIZED or (method == "dare_ties" and not compat))
    deltas = [
        _sparse(config, name, method, s["model"], x - start, lambda p, d, s=s: get(p, d, s), get)
        for s, x in zip(sources, tensors, strict=True)
    ]
    voting = [k for k, weight in enumerate(weights) if weight != 0]
    deltas, weights = [deltas[k] for k in voting], [weights[k] for k in voting]
    lam = get("lambda", 1.0)
    if not deltas:
        return start
    if method in ELECTING:
        return formulas.elected(start, deltas, weights, bool(normalize), lam, compat)
    return formulas.weighted_sum(start, deltas, weights, bool(normalize), lam)


def _sparse(
    config: Mapping[str, Any], name: str, method: str, label: str, delta: Tensor, of_model: Any, of_tensor: Any
) -> Tensor:
    """A delta after its method dropped entries and made up for them."""
    density, compat, n = of_model("density", 1.0), config.get("compat") == "mergekit", delta.numel()
    if density >= 1 or method == "task_arithmetic":
        return delta
    rescale, seed = of_tensor("rescale", method in RESCALED), config.get("seed", 0)
    if method == "ties":
        kept = formulas.top(delta, max(1, int(density * n)) if compat else round(density * n))
        return kept * formulas.l1_factor(delta, kept) if rescale else kept
    if method.startswith("breadcrumbs"):
        kept = formulas.middle(delta, density, of_model("gamma", 0.01))
        return kept * formulas.l1_factor(delta, kept) if rescale else kept
    if method.startswith("della"):
        rows = delta if delta.ndim > 1 else delta[None]
        pi = formulas.probabilities(rows.float(), density, of_model("epsilon", 0.15)).view(delta.shape)
        numbers = torch.from_numpy(random_uniform(n, seed=seed, name=name, role=label)).view(delta.shape)
        kept, each = delta * (numbers < pi), 1 / pi
    else:
        keep = random_keep(n, density, seed=seed, name=name, role=label)
        kept, each = delta * torch.from_numpy(keep).view(delta.shape), 1 / density
    if not rescale:
        return kept
    return kept * formulas.l1_factor(delta, kept) if compat else kept * each


def _input_name(name: str, source: Mapping[str, Any], index: int | None) -> str:
    if index is None:
        return name
    low = source.get("layer_range", (0, 0))[0]
    return f"model.layers.{low + index}.{name.split('.', 3)[3]}"
