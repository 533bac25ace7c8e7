"""`prune_checkpoint` gives the bits of `prune`, block by block, and leaves everything else as it was stored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import TINY, tiny_batch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.models import find_targets, load_model
from sparse_ft.pruning import METHODS, prune, prune_checkpoint
from sparse_ft.pruning import streaming as streaming_module

RECIPES: dict[str, dict[str, Any]] = {
    "magnitude": dict(sparsity=0.55, allocation="global"),
    "random": dict(sparsity=0.55, allocation="erk", seed=5),
    "wanda": dict(pattern="2:4"),
    "sparsegpt": dict(sparsity=0.55),
}


def batches() -> list[dict[str, Tensor]]:
    return [tiny_batch(None, batch=6, seed=seed) for seed in range(3)]  # type: ignore[arg-type]


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same_bits(left: Tensor, right: Tensor) -> bool:
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def save(model: nn.Module, directory: Path, shard: str = "60KB") -> Path:
    model.save_pretrained(directory, max_shard_size=shard)  # type: ignore[operator]
    return directory


CASES = [(name, method, torch.float32) for name in TINY for method in METHODS]
CASES += [(name, "sparsegpt", torch.bfloat16) for name in ("llama", "gpt2", "mixtral", "t5")]


@pytest.mark.parametrize(("name", "method", "dtype"), CASES)
def test_equals_pruning_the_loaded_model(name: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(TINY[name]().to(dtype), tmp_path / "source")
    arguments = dict(method=method, calibration=batches(), progress=False, **RECIPES[method])
    masks = prune_checkpoint(source, tmp_path / "out", **arguments)
    model = load_model(source)
    assert masks == prune(model, **arguments)

    ours, theirs = stored(tmp_path / "out"), stored(save(model, tmp_path / "saved"))
    assert set(ours) == set(theirs)
    assert all(same_bits(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_files_shards_and_unpruned_tensors_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    source = save(TINY[name](), tmp_path / "source")
    prune_checkpoint(
        source, tmp_path / "out", pattern="2:4", exclude=["q_proj" if name != "t5" else "q"], progress=False
    )
    files = {path.name for path in source.glob("model*")}
    assert len(files) > 1, "the test wants several shards"
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    index = "model.safetensors.index.json"
    maps = [json.loads((place / index).read_text())["weight_map"] for place in (source, tmp_path / "out")]
    assert maps[0] == maps[1]
    before, after = stored(source), stored(tmp_path / "out")
    changed = {key for key in before if not same_bits(before[key], after[key])}
    assert changed and all(".q" not in key and "embed" not in key and "norm" not in key for key in changed)
    for file in files - {index}:
        with safe_open(source / file, "pt") as old, safe_open(tmp_path / "out" / file, "pt") as new:
            assert old.metadata() == new.metadata() and set(old.keys()) == set(new.keys())


def test_the_result_loads_and_its_masks_verify(tmp_path: Path) -> None:
    source = save(TINY["mixtral"](), tmp_path / "source")
    masks = prune_checkpoint(
        source, tmp_path / "out", pattern="2:4", method="wanda", calibration=batches(), progress=False
    )
    (tmp_path / "out" / "config.json").write_text((source / "config.json").read_text())
    model = load_model(tmp_path / "out")
    masks.verify(model)
    assert masks.sparsity() == 0.5 and list(masks) == [target.name for target in find_targets(model)]


def test_stored_in_another_dtype_than_the_model_runs_in(tmp_path: Path) -> None:
    """fp32 files whose config says bfloat16: computed in bfloat16, written as fp32, unpruned tensors not rounded."""
    source = save(TINY["llama"](), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    arguments = dict(sparsity=0.5, method="wanda", calibration=batches(), progress=False)
    masks = prune_checkpoint(source, tmp_path / "out", **arguments)
    model = load_model(source)
    assert model.dtype == torch.bfloat16 and masks == prune(model, **arguments)
    before, after = stored(source), stored(tmp_path / "out")
    for key, tensor in after.items():
        assert tensor.dtype == torch.float32
        if key in masks:
            assert torch.equal(tensor, model.get_parameter(key).float())
        else:
            assert same_bits(tensor, before[key])


def test_weights_that_transformers_keeps_in_fp32_are_calibrated_in_fp32_and_stored_as_they_were(tmp_path: Path) -> None:
    """T5's `wo` is loaded in fp32 whatever the checkpoint's dtype."""
    source = save(TINY["t5"]().to(torch.float16), tmp_path / "source")
    arguments = dict(sparsity=0.5, method="sparsegpt", calibration=batches(), progress=False)
    masks = prune_checkpoint(source, tmp_path / "out", **arguments)
    model = load_model(source)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
    assert masks == prune(model, **arguments)
    after = stored(tmp_path / "out")
    assert all(same_bits(after[name], model.get_parameter(name).detach().half()) for name in masks)


def test_tensors_the_model_does_not_know_are_copied(tmp_path: Path) -> None:
    source = save(TINY["llama"](), tmp_path / "source", shard="1GB")
    extra = torch.arange(5.0)
    save_file(stored(source) | {"model.layers.0.self_attn.rotary_emb.inv_freq": extra}, source / "model.safetensors")
    prune_checkpoint(source, tmp_path / "out", sparsity=0.5, method="wanda", calibration=batches(), progress=False)
    assert same_bits(stored(tmp_path / "out")["model.layers.0.self_attn.rotary_emb.inv_freq"], extra)


def test_a_checkpoint_of_the_bare_model_keeps_its_shorter_names(tmp_path: Path) -> None:
    """GPT-2's own files name tensors `h.0…` where the causal model has `transformer.h.0…`."""
    model = TINY["gpt2"]()
    source = save(model, tmp_path / "source", shard="1GB")
    shorter = {key.removeprefix("transformer."): tensor for key, tensor in stored(source).items()}
    save_file(shorter, source / "model.safetensors", metadata={"format": "pt"})
    arguments = dict(sparsity=0.5, method="wanda", calibration=batches(), progress=False)
    masks = prune_checkpoint(source, tmp_path / "out", **arguments)
    assert masks == prune(model, **arguments)
    after = stored(tmp_path / "out")
    assert set(after) == set(shorter)
    assert same_bits(after["h.1.mlp.c_fc.weight"], model.get_parameter("transformer.h.1.mlp.c_fc.weight").detach())


def deep_llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def most_weights_in_memory(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> int:
    """The largest number of parameters that are not on the meta device, looked at whenever a tensor is read."""
    source = save(deep_llama(layers), tmp_path / f"source{layers}")
    modules: list[nn.Module] = []
    most = [0]
    read, build = CheckpointReader.get, streaming_module.load_skeleton

    def spy_on_skeleton(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        modules.extend(model.modules())
        return model

    def spy(self: CheckpointReader, name: str, **options: Any) -> Tensor:
        # module by module: blocks that are not running hang outside the model
        parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
        most[0] = max(most[0], sum(p.numel() for p in parameters if not p.is_meta))
        return read(self, name, **options)

    monkeypatch.setattr(streaming_module, "load_skeleton", spy_on_skeleton)
    monkeypatch.setattr(CheckpointReader, "get", spy)
    prune_checkpoint(source, tmp_path / f"out{layers}", progress=False, **arguments)
    monkeypatch.undo()
    return most[0]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_memory_does_not_grow_with_depth(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = dict(sparsity=0.5, method=method, calibration=batches())
    shallow = most_weights_in_memory(2, tmp_path, monkeypatch, **arguments)
    deep = most_weights_in_memory(9, tmp_path, monkeypatch, **arguments)
    block = sum(p.numel() for p in deep_llama(1).model.layers[0].parameters())  # type: ignore[union-attr]
    embedding_and_final_norm = 96 * 32 + 32
    assert deep == shallow
    assert block / 2 < deep <= block + embedding_and_final_norm, "one block at a time, and never the head"


def test_nothing_is_left_on_the_reader_or_the_default_dtype(tmp_path: Path) -> None:
    source = save(TINY["llama"]().to(torch.bfloat16), tmp_path / "source")
    prune_checkpoint(source, tmp_path / "out", sparsity=0.5, method="wanda", calibration=batches(), progress=False)
    assert torch.get_default_dtype() == torch.float32


def test_loading_everything_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    source = save(TINY["mixtral"](), tmp_path / "source")
    arguments = dict(sparsity=0.5, method="wanda", calibration=batches(), progress=False)
    masks = prune_checkpoint(source, tmp_path / "streamed", **arguments)

    monkeypatch.setattr(streaming_module, "StoredWeights", refuse_to_stream)
    assert prune_checkpoint(source, tmp_path / "whole", **arguments) == masks
    assert "these pieces cannot be taken apart" in caplog.text
    for file in (tmp_path / "streamed").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def without(source: Path, name: str) -> Path:
    tensors = {key: tensor for key, tensor in stored(source).items() if key != name}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def reshaped(source: Path, name: str) -> Path:
    tensors = stored(source)
    save_file(tensors | {name: tensors[name][:-1].clone()}, source / "model.safetensors", metadata={"format": "pt"})
    return source


def poisoned(source: Path, name: str) -> Path:
    tensors = stored(source)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("damage", [without, reshaped, poisoned])
def test_damaged_checkpoints_are_refused_before_anything_is_written(method: str, damage: Any, tmp_path: Path) -> None:
    source = damage(save(TINY["llama"](), tmp_path / "source", shard="1GB"), NAME)
    with pytest.raises(ValueError, match=NAME.replace(".", r"\.")) as caught:
        prune_checkpoint(source, tmp_path / "out", sparsity=0.5, method=method, calibration=batches(), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_weights_that_are_no_numbers_are_found_where_nothing_is_pruned(
    name: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = poisoned(save(TINY["llama"](), tmp_path / "source", shard="1GB"), name)
    if whole:
        monkeypatch.setattr(streaming_module, "StoredWeights", refuse_to_stream)
    with pytest.raises(ValueError, match=f"'{name}' in .*source' contains NaN"):
        prune_checkpoint(source, tmp_path / "out", sparsity=0.5, exclude=["k_proj"], progress=False)
    assert not (tmp_path / "out").exists()


def refuse_to_stream(*args: Any) -> None:
    raise streaming_module.CannotStream("these pieces cannot be taken apart")


def test_what_is_no_parameter_may_be_infinite(tmp_path: Path) -> None:
    source = save(TINY["llama"](), tmp_path / "source", shard="1GB")
    mask = torch.full((4, 4), -math.inf).triu(1)
    save_file({**stored(source), "causal_mask": mask}, source / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(source, tmp_path / "out", sparsity=0.5, progress=False)
    assert same_bits(stored(tmp_path / "out")["causal_mask"], mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(method="sparsgpt", sparsity=0.5), "sparsegpt"),
        (dict(method="wanda", sparsity=0.5), "needs calibration"),
        (dict(method="wanda", sparsity=0.5, calibration=[torch.tensor([[96]])]), "96"),
        (dict(pattern="2:5"), "5"),
        (dict(sparsity=0.5, exclude=["nothing"]), "nothing"),
        (dict(sparsity=0.995, allocation="global", min_keep=0.05), "min_keep"),
    ],
)
def test_bad_arguments_write_nothing(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(TINY["llama"](), tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        prune_checkpoint(source, tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = save(TINY["llama"](), tmp_path / "source")
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(ValueError, match="is also the source"):
        prune_checkpoint(source, source / ".." / "source", sparsity=0.5, progress=False)
    assert before == {path: path.read_bytes() for path in source.iterdir()}


def test_an_absent_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prune_checkpoint(tmp_path / "nowhere", tmp_path / "out", sparsity=0.5)
