"""The shapes mergekit's documentation shows, from YAML to files, against the YAML worked out a second time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merging.checkpoints import merge, near, prepare, write
from merging.lora import write_lora
from merging.mergekit_reference import merged_by_hand, model_of
from torch import Tensor

from sparse_ft.merging.families import REFUSED

LAYERS, WIDTH, ROWS = 4, 16, 12

SHAPES = {
    "linear": """
merge_method: linear
models:
  - model: @math
    parameters:
      weight: 1.0
  - model: @code
    parameters:
      weight: [0.3, 0.1, 0.7]
dtype: float32
""",
    "linear, not normalized, weights by filter": """
models:
  - model: @math
  - model: @code
  - model: @chat
merge_method: linear
parameters:
  normalize: false
  weight:
    - filter: mlp
      value: 0.5
    - filter: self_attn
      value: [0.25, 0.5]
    - value: 0.125
""",
    "slerp of slices with gradients and filters": """
slices:
  - sources:
      - model: @math
        layer_range: [0, 4]
      - model: @code
        layer_range: [0, 4]
merge_method: slerp
base_model: @math
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "slerp of models": """
merge_method: slerp
base_model: @base
models:
  - model: @base
  - model: @far
parameters:
  t: [0, 0.4, 1]
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: @base
models:
  - model: @math
    parameters: {weight: 0.35}
  - model: @code
    parameters: {weight: -0.65}
parameters: {lambda: 0.9}
dtype: float32
""",
    "ties": """
models:
  - model: @base
    # the base needs no parameters
  - model: @math
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: @code
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: @chat
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: @base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
""",
    "ties of slices with a base in each": """
merge_method: ties
slices:
  - sources:
      - {model: @base, layer_range: [0, 2]}
      - {model: @math, layer_range: [0, 2], parameters: {weight: 1, density: 0.5}}
  - sources:
      - {model: @base, layer_range: [2, 4]}
      - {model: @code, layer_range: [2, 4]}
    parameters: {weight: 0.5, density: [0.2, 0.9]}
base_model: @base
""",
    "dare_ties": """
models:
  - model: @base
  - model: @math
    parameters: {density: 0.5, weight: 0.4}
  - model: @code
    parameters: {density: 0.5, weight: 0.3}
  - model: @chat
    parameters: {density: 0.5, weight: 0.3}
merge_method: dare_ties
base_model: @base
parameters:
  int8_mask: true
dtype: float32
""",
    "dare_linear": """
merge_method: dare_linear
base_model: @base
models:
  - model: @math
    parameters: {weight: [0.2, 0.8], density: 0.6}
  - model: @code
    parameters: {weight: 0.5, density: [0.9, 0.02]}
parameters: {normalize: true, lambda: 1.1}
seed: 4
""",
    "della": """
merge_method: della
base_model: @base
models:
  - model: @math
    parameters: {weight: 0.5, density: 0.5, epsilon: 0.1}
  - model: @code
    parameters: {weight: [0.2, 0.8], density: 0.6, epsilon: 0.05}
parameters: {normalize: true, lambda: 1.1, rescale: true}
seed: 42
""",
    "della_linear": """
merge_method: della_linear
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5, density: 0.7}}
  - {model: @code, parameters: {weight: 0.5, density: 0.5, epsilon: 0.3}}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5, density: 0.9, gamma: 0.01}}
  - {model: @code, parameters: {weight: 0.5, density: 0.7, gamma: [0, 0.2]}}
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.6, density: 0.8, gamma: 0.1}}
  - {model: @code, parameters: {weight: 0.5, density: 0.7, gamma: 0.05}}
""",
    "stacked layers": """
slices:
  - sources:
      - model: @math
        layer_range: [0, 3]
  - sources:
      - model: @code
        layer_range: [1, 4]
  - sources:
      - model: @math
        layer_range: [3, 4]
        parameters: {weight: 0.3}
      - model: @chat
        layer_range: [0, 1]
        parameters: {weight: 0.7}
merge_method: linear
parameters: {weight: 1}
dtype: float32
""",
    "modules": """
merge_method: task_arithmetic
base_model: @base
modules:
  model:
    models:
      - {model: @base}
      - {model: @math, parameters: {weight: [0.1, 0.9]}}
    parameters: {lambda: 0.5}
  lm_head:
    models:
      - {model: @base}
      - {model: @code, parameters: {weight: 0.4}}
""",
    "adapters": """
merge_method: ties
base_model: @base
models:
  - model: @base+@lora1
    parameters: {weight: 1, density: 0.5}
  - model: @math+@lora2
    parameters: {weight: 0.5, density: 0.4}
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes, an unrelated model and two adapters of different rank."""
    place = tmp_path_factory.mktemp("shapes")
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (ROWS, WIDTH),
    }
    for i in range(LAYERS):
        for rest in ("self_attn.q_proj", "self_attn.o_proj"):
            shapes[f"model.layers.{i}.{rest}.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (24, WIDTH)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = {name: near(base, seed, 1e-2) for seed, name in enumerate(("math", "code", "chat"), 1)}
    models |= {"base": base, "far": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}}
    for name, tensors in models.items():
        write(place / name, {key: tensor.bfloat16() for key, tensor in tensors.items()}, hidden_size=WIDTH)
    for i, rank in ((1, 2), (2, 3)):
        names = [f"model.layers.{j}.self_attn.q_proj.weight" for j in range(LAYERS)]
        factors = {
            name: (torch.randn(rank, WIDTH, generator=generator) / 9, torch.randn(WIDTH, rank, generator=generator) / 9)
            for name in names
        }
        write_lora(place / f"lora{i}", factors, alpha=4)
    return place


def with_files_in_float32(text: str) -> str:
    """So that the comparison sees the arithmetic and not the last rounding."""
    return text if "dtype" in text else text + "dtype: float32\n"


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_what_the_yaml_says(name: str, compat: str, place: Path) -> None:
    text = with_files_in_float32(SHAPES[name]) + f"compat: {compat}\n"
    found, expected = merge(place, text), merged_by_hand(place, text)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key].double(), tensor, rtol=2e-5, atol=2e-6, msg=lambda m, key=key: f"{key} {m}"
        )
    layers = {int(key.split(".")[2]) for key in expected if ".layers." in key}
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers) == (7 if name == "stacked layers" else LAYERS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_only_rounding_is_the_last(dtype: str, place: Path) -> None:
    text = SHAPES["task_arithmetic"].replace("float32", dtype)
    found = merge(place, text)
    for key, tensor in merged_by_hand(place, text).items():
        step = tensor.abs() * (2**-8 if dtype == "bfloat16" else 2**-11) + 1e-6
        assert found[key].dtype == getattr(torch, dtype) and bool(((found[key].double() - tensor).abs() <= step).all())


# -- vocabularies ------------------------------------------------------------------------------------------------------

IDS = {
    "base": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4},
    "math": {"<s>": 0, "</s>": 1, "a": 2, "c": 3, "x": 4, "y": 5},
    "code": {"<s>": 0, "</s>": 1, "b": 2, "a": 3, "x": 4},
}
VOCABULARIES = {
    "tokenizer_source: union": """
merge_method: task_arithmetic
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5}}
  - {model: @code, parameters: {weight: 0.25}}
tokenizer_source: union
""",
    "tokenizer_source: base": """
merge_method: task_arithmetic
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5}}
  - {model: @code, parameters: {weight: 0.25}}
tokenizer_source: base
""",
    "tokenizer_source: a model, linear": """
merge_method: linear
models:
  - {model: @base, parameters: {weight: 1}}
  - {model: @math, parameters: {weight: 3}}
tokenizer_source: @math
""",
    "tokenizer with tokens": """
merge_method: task_arithmetic
base_model: @base
models:
  - {model: @math, parameters: {weight: 0.5}}
  - {model: @code, parameters: {weight: 0.25}}
tokenizer:
  source: union
  tokens:
    x:
      source: @code
    "<s>":
      source: @math
      force: true
    y:
      source: {kind: model_token, model: @base, token: b}
    c:
      source: {kind: zero}
      force: true
  pad_to_multiple_of: 8
""",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models with vocabularies and orders of their own."""
    place = tmp_path_factory.mktemp("words")
    for seed, (name, ids) in enumerate(IDS.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(len(ids), 4, generator=generator)
            for key in ("model.embed_tokens.weight", "lm_head.weight")
        }
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(6, 4, generator=generator)
        write(place / name, tensors, {**ids})
        settings = json.loads((place / name / "tokenizer_config.json").read_text())
        settings["unk_token"] = "<s>"
        (place / name / "tokenizer_config.json").write_text(json.dumps(settings))
    return place


def row_of(token: str, label: str, tables: dict[str, Tensor], config: dict[str, Any], order: list[str]) -> Tensor:
    """The row one model takes for a token: its own unless one is forced, else the named, the base's, or the mean."""
    how = ((config.get("tokenizer") or {}).get("tokens") or {}).get(token)
    if how and (how.get("force") or token not in IDS[label]):
        source = how["source"]
        if isinstance(source, dict) and source.get("kind") == "zero":
            return torch.zeros(4, dtype=torch.float64)
        origin = Path(source["model"] if isinstance(source, dict) else source).name
        return tables[origin][IDS[origin][source["token"] if isinstance(source, dict) else token]]
    if token in IDS[label]:
        return tables[label][IDS[label][token]]
    base = config.get("base_model")
    if base and token in IDS[Path(base).name]:
        return tables[Path(base).name][IDS[Path(base).name][token]]
    having = [tables[other][IDS[other][token]] for other in order if token in IDS[other]]
    return torch.stack(having).mean(0)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_rows_of_every_token_are_what_the_yaml_says(name: str, words: Path) -> None:
    text = VOCABULARIES[name]
    config = yaml.safe_load(text.replace("@", f"{words}/"))
    out = merge(words, text)
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(words / "out").get_vocab()
    union = set().union(*(IDS[label] for label in IDS))
    assert set(ids) == (union if "union" in text else set(IDS["math" if "linear" in name else "base"]))
    others = [Path(source["model"]).name for source in config["models"]]
    weights = [source["parameters"]["weight"] for source in config["models"]]
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tables = {label: model_of(str(words / label))[key] for label in IDS}
        for token, place in ids.items():
            rows = [row_of(token, label, tables, config, others) for label in others]
            if config["merge_method"] == "linear":
                expected = sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)
            else:
                base = row_of(token, "base", tables, config, others)
                expected = base + sum(w * (row - base) for w, row in zip(weights, rows, strict=True))
            torch.testing.assert_close(out[key][place].double(), expected, rtol=1e-5, atol=1e-6)
        multiple = (config.get("tokenizer") or {}).get("pad_to_multiple_of", 1)
        assert len(out[key]) % multiple == 0 and len(out[key]) >= len(ids) and bool(out[key].isfinite().all())


# -- methods that are not here -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_refused_before_any_model_is_looked_for(method: str, tmp_path: Path) -> None:
    shape = SHAPES["stacked layers" if method == "passthrough" else "task_arithmetic"]
    wanted = str(yaml.safe_load(shape.replace("@", ""))["merge_method"])
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path, shape.replace(f"merge_method: {wanted}", f"merge_method: {method}"))
    message = str(caught.value)
    assert message.startswith(f"merge_method '{method}' is not supported; use ") and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["merge.yaml"]


def test_what_is_refused_is_all_that_mergekit_has_besides() -> None:
    others = "nuslerp multislerp karcher model_stock sce nearswap arcee_fusion ram ramplus_tl passthrough"
    assert set(REFUSED) == set(others.split())
