"""mergekit's YAML: everything its schema has is read, and what is wrong is named with the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_ft.merging.config import MergeConfig, parse_config
from sparse_ft.merging.families import FAMILIES, REFUSED
from sparse_ft.merging.methods import METHODS
from sparse_ft.merging.preserving import PreserveMasks
from sparse_ft.merging.references import ModelRef
from sparse_ft.merging.settings import evaluate
from sparse_ft.merging.token_config import TokenSource
from sparse_ft.merging.yaml_text import read_yaml, read_yaml_file

TIES = """
merge_method: ties
base_model: org/base
models:
  - model: org/math
    parameters: {density: [0.9, 0.5, 0.3], weight: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.4}]}
  - model: org/code@v2+org/lora@main
    parameters: {density: 0.5, weight: 0.4}
parameters: {normalize: true, int8_mask: true, lambda: 1.0}
dtype: float32
out_dtype: bfloat16
"""


def read(text: str) -> MergeConfig:
    return parse_config(read_yaml(text, "'x.yaml'"))


def test_methods_and_families_are_the_same() -> None:
    assert set(METHODS) == set(FAMILIES) and not set(FAMILIES) & set(REFUSED)


def test_a_whole_configuration() -> None:
    config = read(TIES)
    assert (config.method, config.dtype, config.out_dtype) == ("ties", torch.float32, torch.bfloat16)
    assert (config.compat, config.seed, config.preserve_masks) == ("paper", 0, PreserveMasks("auto"))
    first, second = config.modules[0].models
    assert second.model == ModelRef("org/code@v2+org/lora@main", "org/code", "v2", "org/lora", "main")
    assert evaluate(first.parameters["weight"], "mlp.up", 0.25) == 0.25
    assert evaluate(config.parameters["normalize"], "x", 0.0) is True
    assert [ref.text for ref in config.references()] == ["org/base", "org/math", "org/code@v2+org/lora@main"]


def test_our_keys_stand_at_the_top() -> None:
    config = read(TIES + "compat: mergekit\nseed: 7\npreserve_masks: {pattern: 2:4}\n")
    assert (config.compat, config.seed) == ("mergekit", 7)
    assert config.preserve_masks == PreserveMasks("reprune", "2:4"), "2:4 is a pattern, not 124"
    assert read(TIES + "preserve_masks: off").preserve_masks.policy == "off"


def test_slices_and_modules() -> None:
    slices = "[{sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}, {model: b, layer_range: [3, 5]}]}]"
    config = read(f"merge_method: linear\nslices: {slices}")
    (part,) = config.modules[0].slices
    assert [source.layers for source in part.sources] == [(0, 2), (3, 5)] and not config.modules[0].whole
    text = f"merge_method: linear\nmodules: {{encoder: {{models: [{{model: a}}]}}, decoder: {{slices: {slices}}}}}"
    assert [module.name for module in read(text).modules] == ["encoder", "decoder"]


def test_tokenizer_in_detail() -> None:
    tokens = (
        "{'<a>': {source: m, force: true}, '<b>': {source: {kind: zero}},"
        " '<c>': {source: {kind: model_token, model: m, token_id: 3}}}"
    )
    how = read(TIES + f"tokenizer: {{source: union, pad_to_multiple_of: 8, tokens: {tokens}}}").tokenizer
    assert how is not None and how.source == "union" and how.pad_to_multiple_of == 8
    m = ModelRef("m", "m")
    assert how.tokens == {"<a>": TokenSource(m, None, True), "<b>": TokenSource(None), "<c>": TokenSource(m, 3)}
    source = read(TIES + "tokenizer_source: org/math").tokenizer
    assert source is not None and isinstance(source.source, ModelRef)


def test_a_model_may_be_a_mapping_or_a_directory_with_a_plus(tmp_path: Path) -> None:
    ref = ModelRef.parse({"model": {"path": "a", "revision": "r"}, "lora": {"path": "l"}})
    assert ref == ModelRef("a@r+l", "a", "r", "l", None)
    odd = tmp_path / "a+b@c"
    odd.mkdir()
    assert ModelRef.parse(str(odd)).model == str(odd)


def test_residual_weight_changes_nothing_and_is_noted() -> None:
    text = "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}]"
    assert "residual_weight" in read(text).notes[0]


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_are_not_here_are_refused_by_name_with_another(method: str) -> None:
    with pytest.raises(ValueError, match=f"'{method}' is not supported; use ({'|'.join(FAMILIES)})"):
        read(f"merge_method: {method}\nmodels: [{{model: a}}]")


A = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
BAD = [
    ("modelz: []\n" + A, "unknown key 'modelz'. Did you mean 'models'"),
    (A + "paramters: {}", "Did you mean 'parameters'"),
    ("merge_method: tie\nmodels: [{model: a}]", "Did you mean 'ties'"),
    ("models: [{model: a}]", "no 'merge_method'"),
    ("merge_method: linear", "Exactly one of 'models', 'slices' and 'modules' is needed, got none"),
    (A + "slices: [{sources: []}]", "got models and slices"),
    ("merge_method: ties\nmodels: [{model: a}]", "'ties' works on differences to a base"),
    ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "lists the model 'a' 2 times"),
    ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "it is a parameter, put it under 'parameters:'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", "Did you mean 'weight'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "weight is nan"),
    ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "names no model"),
    ("merge_method: linear\nmodels: []", "at least one entry"),
    ("merge_method: linear\nmodels: {model: a}", "must be a list"),
    ("merge_method: linear\nmodels: [{model: a+b+c}]", "more than one adapter"),
    ("merge_method: linear\nmodels: [{model: 'a+'}]", "nothing on one side"),
    ("merge_method: linear\nmodels: [{model: {path: a}}]", "unknown key 'path'"),
    ("merge_method: slerp\nbase_model: a\nmodels: [{model: b}, {model: c}]", "1 other model, got 2"),
    ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", "no model to merge besides the base"),
    (A + "dtype: bfloat61", "Did you mean 'bfloat16'"),
    (A + "compat: mergekt", "Unknown compat"),
    (A + "seed: 1.5", "'seed' must be a whole number"),
    (A + "preserve_masks: unoin", "Did you mean 'union'"),
    (A + "preserve_masks: {pattern: unstructured}", "sparsity"),
    (A + "preserve_masks: {patern: 2:4}", "Did you mean 'pattern'"),
    (A + "tokenizer_source: union\ntokenizer: {source: base}", "keep one of the two"),
    (A + "tokenizer: {sorce: base}", "Did you mean 'source'"),
    (A + "tokenizer: {source: base, pad_to_multiple_of: 0}", "above 0"),
    (A + "tokenizer: {source: base, tokens: {x: {source: {kind: one}}}}", "known are 'zero' and 'model_token'"),
    (A + "tokenizer: {source: base, tokens: {x: {source: {kind: model_token, model: m}}}}", "needs 'model' and one of"),
    (A + "merge_method: ties", "'merge_method' stands twice in line 3"),
    ("- a", "must be a YAML mapping"),
    ("a: [", "not valid YAML"),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]", "below the second"),
    ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: 2}]}]", "must be two layer numbers"),
    (
        "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]",
        r"equally many layers, got 'a' \[0, 2\], 'b' \[0, 3\]",
    ),
    ("merge_method: linear\nmodules: {x: {}}", "needs exactly one of 'models' and 'slices'"),
]


@pytest.mark.parametrize(("text", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_what_is_wrong_is_said_in_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No merge configuration"):
        read_yaml_file(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="is a directory"):
        read_yaml_file(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_yaml_file(tmp_path / "b.yaml")
