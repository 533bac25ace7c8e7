"""`merge_into_base`, and the digest that says which base is the right one."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install sparse-ft[quant]")

from adapters.quantised_models import Stored, adapt, effective, factors, randomise, store
from adapters.sparse_models import CONFIGS, logits, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_ft import merge_into_base
from sparse_ft.adapters import prepare_perp, trainable_share
from sparse_ft.checkpoints import make_record, write_sidecars
from sparse_ft.models import named_weights

METHODS = pytest.mark.parametrize("method", list(CONFIGS))
TWO_KINDS = pytest.mark.parametrize("kind", ["nf4-double", "int8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return store(tmp_path_factory.mktemp("llama"))


def digest_of(model: PeftModel, adapter: str = "default") -> str:
    return str(model.peft_config[adapter].weights_digest)


def same(model: nn.Module, stored: Stored) -> bool:
    return all(torch.equal(weight, stored.weights[name]) for name, weight in named_weights(model).items())


# -- what is merged --------------------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize(
    "name, kind, dtype",
    [
        ("llama", "nf4-double", torch.float32),
        ("llama", "int8", torch.bfloat16),
        ("gpt2", "nf4", torch.bfloat16),
        ("opt", "nf4-double", torch.bfloat16),
        ("mixtral", "nf4-double", torch.float32),
        ("bert", "nf4", torch.float16),
        ("t5", "int8", torch.float32),
    ],
)
def test_merged_is_the_formula_on_the_original_weights(
    tmp_path: Path, method: str, name: str, kind: str, dtype: torch.dtype
) -> None:
    stored = store(tmp_path / "base", name, dtype=dtype, pattern="2:4")
    model = stored.adapted(method, kind)
    merged = merge_into_base(model, stored.path)
    weights = named_weights(merged)
    for key, weight in weights.items():
        expected = stored.weights[key]
        if key in stored.masks:
            A, B = factors(model, key)
            mask, transposed = stored.masks[key], name == "gpt2"
            expected = effective(method, expected.float(), mask, A, B, transposed=transposed, merged=True).to(dtype)
            assert not weight[~mask].any() and not torch.equal(weight, stored.weights[key])
        torch.testing.assert_close(weight, expected, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=1e-7)
        assert weight.dtype == dtype and weight.requires_grad
    stored.masks.verify(merged)
    for key in stored.masks:
        rows = weights[key].t() if name == "gpt2" else weights[key]
        assert (rows.reshape(-1, 4) != 0).sum(1).max() <= 2
    zeros = {key: int((weight == 0).sum()) for key, weight in weights.items() if key in stored.masks}
    assert zeros == {key: int((stored.weights[key] == 0).sum()) for key in zeros}
    model.save_pretrained(tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    for other in (
        merge_into_base(tmp_path / "adapter", stored.plain()),
        stored._replace(path=tmp_path / "merged").plain(),
    ):
        assert all(torch.equal(weight, weights[key]) for key, weight in named_weights(other).items())
        assert torch.equal(logits(other), logits(merged))


@METHODS
def test_merging_equals_training_on_the_plain_base(tmp_path: Path, llama: Stored, method: str) -> None:
    twin = adapt(llama.plain(), method, llama.masks).merge_and_unload()
    merged = merge_into_base(llama.adapted(method, "nf4"), llama.plain())
    assert all(torch.equal(weight, named_weights(twin)[name]) for name, weight in named_weights(merged).items())


@pytest.mark.parametrize("method", ["mask_lora+biases+norms+head", "scale_lora+norms+embeddings", "lora_prune+norms"])
@DTYPES
def test_trained_groups_are_merged_too(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    stored = store(tmp_path / "base", "opt", dtype=dtype)
    path = tmp_path / "untied"
    model = stored.plain()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(path)
    base = Stored(path, stored.masks, {n: w.detach().clone() for n, w in named_weights(model).items()})
    trained = prepare_perp(base.quantised("nf4"), method, base.masks, r=4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        train(trained, lr=1e-2)
    names = {name.partition(".lora_")[0] for name in trainable_share(trained).names}
    merged = merge_into_base(trained, path)
    for name, weight in named_weights(merged).items():
        moved = name in names or name.removesuffix(".weight") in names
        assert torch.equal(weight, base.weights[name]) != moved, name
        assert weight.dtype == dtype
    base.masks.verify(merged)
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = named_weights(merge_into_base(tmp_path / "adapter", path))
    assert all(torch.equal(weight, again[name]) for name, weight in named_weights(merged).items())


def test_one_of_several_adapters_is_chosen(tmp_path: Path, llama: Stored) -> None:
    model = llama.adapted("mask_lora", "nf4")
    expected = named_weights(merge_into_base(model, llama.plain()))
    model.add_adapter("other", CONFIGS["mask_lora"](r=2, masks=llama.masks))
    randomise(model, "mask_lora", adapter="other", seed=2)
    for chosen in (None, "default"):
        merged = named_weights(merge_into_base(model, llama.plain(), adapter_name=chosen))
        assert all(torch.equal(weight, expected[name]) for name, weight in merged.items())
    other = named_weights(merge_into_base(model, llama.plain(), adapter_name="other"))
    model.save_pretrained(tmp_path)
    saved = named_weights(merge_into_base(tmp_path, llama.plain(), adapter_name="other"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(other[name], saved[name]) and not torch.equal(other[name], expected[name])
    with pytest.raises(ValueError, match=r"no adapter 'third'; it has \['default', 'other'\]"):
        merge_into_base(model, llama.plain(), adapter_name="third")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="say which one"):
        merge_into_base(model, llama.plain())


# -- what is refused -------------------------------------------------------------------------------------------------


@METHODS
def test_a_base_of_other_weights_is_refused_and_left_alone(tmp_path: Path, llama: Stored, method: str) -> None:
    model = llama.adapted(method, "nf4")
    other = llama.plain()
    other.get_parameter("model.layers.1.mlp.up_proj.weight").data.mul_(2)
    before = {name: weight.detach().clone() for name, weight in named_weights(other).items()}
    model.save_pretrained(tmp_path)
    for adapter in (model, tmp_path):
        with pytest.raises(ValueError, match="trained on base weights"):
            merge_into_base(adapter, other)
    assert all(torch.equal(weight, before[name]) for name, weight in other.named_parameters())
    assert all(weight.requires_grad for weight in other.parameters())


def test_a_base_in_another_precision_is_refused(llama: Stored) -> None:
    model = llama.adapted("mask_lora", "nf4")
    with pytest.raises(ValueError, match="in the same precision"):
        merge_into_base(model, llama.plain(dtype=torch.bfloat16))


def test_a_quantised_or_adapted_base_is_refused(tmp_path: Path, llama: Stored) -> None:
    model = llama.adapted("mask_lora", "nf4")
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj' of the base is quantised \(Linear8bitLt\)"
    ):
        merge_into_base(model, llama.quantised("int8"))
    with pytest.raises(ValueError, match=r"of the base (is quantised|has an adapter)"):
        merge_into_base(model, model)
    with pytest.raises(ValueError, match="of the base has an adapter"):
        merge_into_base(model, adapt(llama.plain(), "mask_lora", llama.masks))
    llama.quantised("nf4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantised; give the checkpoint it was quantised from"):
        merge_into_base(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="No directory"):
        merge_into_base(model, tmp_path / "nothing")


def test_an_adapter_of_another_kind_is_refused(llama: Stored) -> None:
    model = get_peft_model(llama.quantised("nf4"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="A LORA adapter does not know its masks"):
        merge_into_base(model, llama.plain())


def test_damaged_adapters_are_refused_and_the_base_is_left_alone(tmp_path: Path, llama: Stored) -> None:
    llama.adapted("mask_lora", "nf4").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, base = load_file(file), llama.plain()
    key = next(key for key in tensors if "lora_B" in key)
    changed: list[tuple[dict[str, Any], str]] = [
        ({name: t for name, t in tensors.items() if name != key}, "lacks 1 tensors"),
        ({**tensors, key: torch.zeros(3, 4)}, r"has shape \(3, 4\) in the adapter"),
        ({name: t ^ 1 if "fingerprint" in name else t for name, t in tensors.items()}, "another mask or another base"),
    ]
    for damaged, message in changed:
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match=message):
            merge_into_base(tmp_path, base)
        assert same(base, llama) and all(weight.requires_grad for weight in base.parameters())
        assert not any("lora" in name for name, _ in base.named_modules())


# -- the digest ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name, kind", [("llama", "int8"), ("gpt2", "nf4-double"), ("mixtral", "nf4")])
def test_the_digest_is_that_of_the_weights_before_quantisation(
    tmp_path: Path, name: str, kind: str, dtype: torch.dtype
) -> None:
    stored = store(tmp_path, name, dtype=dtype)
    for options in ({}, {"exclude_modules": r".*(layers|h)\.1\..*"}):
        plain = adapt(stored.plain(), "mask_lora", stored.masks, **options)
        assert digest_of(stored.adapted("mask_lora", kind, **options)) == digest_of(plain)


def test_the_digest_counts_dense_modules_as_stored(tmp_path: Path) -> None:
    stored = store(tmp_path, dtype=torch.bfloat16)
    plain = adapt(stored.plain(), "mask_lora", stored.masks, dense_modules=["lm_head"])
    for options in ({}, {"dtype": torch.float32}):  # in which the head is loaded
        model = adapt(stored.quantised("nf4", **options), "mask_lora", stored.masks, dense_modules=["lm_head"])
        assert digest_of(model) == digest_of(plain)
    head = stored.plain()
    head.lm_head.weight.data.mul_(2)
    head.save_pretrained(tmp_path)
    assert digest_of(stored.adapted("mask_lora", "nf4", dense_modules=["lm_head"])) != digest_of(plain)


def test_the_record_of_a_sparse_checkpoint_is_taken_at_its_word(tmp_path: Path) -> None:
    stored = store(tmp_path)
    expected = digest_of(adapt(stored.plain(), "mask_lora", stored.masks))
    record = make_record(stored.masks, stored.weights, command="prune", arguments={})
    write_sidecars(tmp_path, stored.masks, record)
    models = [stored.quantised("nf4") for _ in range(3)]
    (tmp_path / "model.safetensors").unlink()  # so it is not read
    assert record.weights_digest == expected == digest_of(adapt(models[0], "mask_lora", stored.masks))
    with pytest.warns(UserWarning, match=r"weights before quantisation are not to be had: No weights in"):
        adapt(models[1], "mask_lora", stored.masks, exclude_modules=["q_proj"])
    stored.masks.save(tmp_path / "elsewhere")
    shutil.copy(tmp_path / "sparse_ft.json", tmp_path / "elsewhere")
    models[2].name_or_path = str(tmp_path / "elsewhere")
    assert digest_of(adapt(models[2], "mask_lora", stored.masks)) == expected


@TWO_KINDS
def test_without_the_unquantised_weights_the_adapter_is_bound_to_the_quantised_ones(tmp_path: Path, kind: str) -> None:
    stored = store(tmp_path / "base")
    stored.quantised(kind).save_pretrained(tmp_path / "packed")
    packed = stored._replace(path=tmp_path / "packed")
    with pytest.warns(UserWarning, match=r"merge_into_base will refuse it.* holds the weights quantised"):
        model = adapt(AutoModelForCausalLM.from_pretrained(packed.path), "mask_lora", stored.masks)
    assert digest_of(model).startswith("packed:")
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(packed.path), tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        other = stored.quantised("fp4" if kind == "int8" else "int8")
        other.name_or_path = ""
        with pytest.raises(ValueError, match=r"trained on base weights packed:\w+ but this model has packed:"):
            PeftModel.from_pretrained(other, tmp_path / "adapter")
    for adapter in (model, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=r"unquantised weights were not to be had \(packed:"):
            merge_into_base(adapter, stored.path)


def test_stored_weights_that_are_not_these_sparse_ones_do_not_count(tmp_path: Path) -> None:
    stored = store(tmp_path)
    model = stored.quantised("nf4")
    dense = stored.plain()
    dense.get_parameter("model.layers.0.mlp.up_proj.weight").data.fill_(1)
    dense.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="pruned weights in 1 tensors are not zero"):
        assert digest_of(adapt(model, "mask_lora", stored.masks)).startswith("packed:")
