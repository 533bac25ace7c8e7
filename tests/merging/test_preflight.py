"""The look before any work: what cannot be merged is refused, what is probably not meant warned of with its number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from merging.checkpoints import merge, near, prepare, read, tensors_of, write
from merging.lora import write_lora

from sparse_ft.merging.preflight import mean_delta, tokenizer_length

TASK = "merge_method: task_arithmetic\nbase_model: @base\nmodels: [{model: @a, parameters: {weight: 1}}]\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base and a fine-tune."""
    base = tensors_of()
    write(tmp_path / "base", base, {"<unk>": 0, "x": 9})
    write(tmp_path / "a", near(base, 1), {"<unk>": 0, "x": 9})
    return tmp_path


def test_the_report_counts_and_nothing_is_written(place: Path) -> None:
    prepared = prepare(place, TASK)
    base, a = prepared.report.models
    assert (base.layers, base.width, base.rows, base.tokens, base.delta) == (3, 4, 10, 10, None)
    assert base.architecture == "LlamaForCausalLM" and not base.tied
    assert prepared.report.output_bytes == base.bytes == sum(t.nbytes for t in read(place / "base").values())
    assert 5e-4 < (a.delta or 0) < 1e-3, "the mean of |normal| is 0.8 of its deviation"
    assert not prepared.report.warnings
    text = "\n".join(prepared.report.lines())
    assert "LlamaForCausalLM" in text and f"{a.delta:.2e}" in text and "output: 9 tensors (0 copied)" in text
    assert sorted(path.name for path in place.iterdir()) == ["a", "base", "merge.yaml"]


def test_a_wrong_base_is_a_warning_with_the_number(place: Path) -> None:
    write(place / "a", tensors_of(seed=5))
    prepared = prepare(place, TASK)
    (warning,) = prepared.report.warnings
    delta = prepared.report.models[1].delta
    assert delta is not None and delta > 0.5 and f"{delta:.3g}" in warning and "another base" in warning


def test_mean_delta_of_an_adapter_is_that_of_its_product(place: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    inside = {n: t.shape for n, t in read(place / "base").items() if ".layers." in n}
    factors = {n: (torch.ones(2, 4), torch.full((shape[0], 2), 0.5)) for n, shape in inside.items()}
    write_lora(place / "lora", factors, alpha=1, rank=2)
    prepared = prepare(place, TASK.replace("@a", "@base+@lora"))
    base, tuned = prepared.models.values()
    assert mean_delta(tuned, base) == pytest.approx(0.5)
    assert any("another base" in warning for warning in prepared.report.warnings)
    out = merge(place, TASK.replace("@a", "@base+@lora"))
    assert torch.allclose(out[name] - read(place / "base")[name], torch.full((4, 4), 0.5), atol=1e-6)


def test_an_adapter_alone_stands_on_the_base_it_names(place: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_lora(place / "lora", {name: (torch.ones(1, 4), torch.ones(6, 1))}, alpha=2, rank=1, base=place / "base")
    out = merge(place, TASK.replace("@a", "@lora"))
    assert torch.allclose(out[name] - read(place / "base")[name], torch.full((6, 4), 2.0), atol=1e-6)
    write_lora(place / "lora", {name: (torch.ones(1, 4), torch.ones(6, 1))}, alpha=2, rank=1)
    with pytest.raises(ValueError, match="is an adapter that names no base model"):
        prepare(place, TASK.replace("@a", "@lora"))


def test_an_adapter_of_another_base_is_refused(place: Path) -> None:
    write_lora(place / "lora", {"model.layers.0.mlp.up_proj.weight": (torch.ones(1, 5), torch.ones(6, 1))})
    with pytest.raises(ValueError, match=r"of shape \(6, 5\) but the model has \(6, 4\)"):
        prepare(place, TASK.replace("@a", "@base+@lora"))
    write_lora(place / "lora", {"model.layers.9.mlp.up_proj.weight": (torch.ones(1, 4), torch.ones(6, 1))})
    with pytest.raises(ValueError, match=r"layers\.9"):
        prepare(place, TASK.replace("@a", "@base+@lora"))


def test_other_architectures_and_sizes_are_refused_with_both_values(place: Path) -> None:
    base = read(place / "base")
    write(place / "a", base, model_type="qwen2")
    with pytest.raises(ValueError, match=r"another architecture than .*: model_type is 'qwen2', not 'llama'"):
        prepare(place, TASK)
    write(place / "a", base, hidden_size=8)
    with pytest.raises(ValueError, match=r"another size than .*: hidden_size is 8, not 4"):
        prepare(place, TASK)
    write(place / "a", {name.replace("model.", "transformer."): tensor for name, tensor in base.items()})
    with pytest.raises(ValueError, match="shares only 1 of its 9 tensor names"):
        prepare(place, TASK)


@pytest.mark.parametrize("how", ["config", "tensor", "dtype"])
def test_quantised_weights_are_refused(place: Path, how: str) -> None:
    tensors, config = read(place / "a"), {}
    if how == "config":
        config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    elif how == "tensor":
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    else:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    write(place / "a", tensors, **config)
    with pytest.raises(ValueError, match=r"is quantised .* and cannot be merged"):
        prepare(place, TASK)


def test_ids_beyond_the_embedding_and_a_config_that_disagrees_are_warnings(place: Path) -> None:
    write(place / "a", read(place / "a"), {"<unk>": 0, "x": 12}, vocab_size=11)
    first, second = prepare(place, TASK).report.warnings
    assert "has 10 embedding rows but its config says 11" in first
    assert "ids up to 12 but its embedding 10 rows" in second


def test_tied_flags_and_dtypes_that_differ_are_noted(place: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in read(place / "a").items() if name != "lm_head.weight"}
    write(place / "a", tensors, tie_word_embeddings=True)
    notes = "\n".join(prepare(place, TASK).report.notes)
    assert "differ in tied head" in notes and "differ in dtype" in notes


def test_damaged_inputs(place: Path) -> None:
    file = place / "a" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="is truncated"):
        prepare(place, TASK)
    file.unlink()
    (place / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../b.safetensors"}}))
    with pytest.raises(ValueError, match="outside the directory"):
        prepare(place, TASK)
    (place / "a" / "model.safetensors.index.json").unlink()
    (place / "a" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds only pickled weights"):
        prepare(place, TASK)
    (place / "a" / "config.json").write_text("{")
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"config.json' is not valid JSON"):
        prepare(place, TASK)
    shutil.rmtree(place / "a")
    with pytest.raises(FileNotFoundError, match="No directory"):
        prepare(place, TASK)


def test_length_of_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_length(tmp_path) is None
    content = {"model": {"vocab": [["a", 0.1], ["b", 0.2]]}, "added_tokens": [{"id": 7}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_length(tmp_path) == 8
    (tmp_path / "tokenizer.json").write_text("[]")
    assert tokenizer_length(tmp_path) is None
