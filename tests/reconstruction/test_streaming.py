"""`reconstruct_checkpoint` gives the bits of `reconstruct`, holds one block of each model, and writes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reconstruction.pairs import FAMILIES, QUICK, pair, texts
from safetensors.torch import load_file
from tiny_models import TINY
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.masks import MaskSet
from sparse_ft.models import find_targets, load_model, named_weights
from sparse_ft.pruning import streaming as pruning_streaming
from sparse_ft.reconstruction import reconstruct, reconstruct_checkpoint
from sparse_ft.reconstruction import streaming as streaming_module

pytestmark = pytest.mark.filterwarnings("ignore:.*blocks run attention and MLP:UserWarning")


def stored(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name != "sparse_masks.safetensors":
            found.update(load_file(file))
    return found


def same_bits(left: Tensor, right: Tensor) -> bool:
    same_kind = left.dtype == right.dtype and left.shape == right.shape
    return same_kind and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def save_pair(place: Path, name: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path, MaskSet]:
    """Directories of the sparse and the dense model, sharded; masks lie beside the sparse one."""
    model, masks, dense = pair(name, dtype=dtype)
    for directory, one in (("sparse", model), ("dense", dense)):
        one.save_pretrained(place / directory, max_shard_size="60KB")
    masks.save(place / "sparse")
    return place / "sparse", place / "dense", masks


CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [(name, torch.float32, {}) for name in FAMILIES]
CASES += [(name, torch.bfloat16, {}) for name in ("llama", "mixtral", "t5")]
CASES += [("llama", torch.float32, dict(stream="dense")), ("t5", torch.float32, dict(stream="sparse_to_dense"))]
CASES += [("mixtral", torch.float32, dict(train="mask_lora+norms")), ("qwen", torch.float32, dict(granularity="block"))]


@pytest.mark.parametrize(("name", "dtype", "options"), CASES)
def test_equals_reconstructing_the_loaded_model(
    name: str, dtype: torch.dtype, options: dict[str, Any], tmp_path: Path
) -> None:
    sparse, dense, masks = save_pair(tmp_path, name, dtype)
    result = reconstruct_checkpoint(sparse, dense, tmp_path / "out", calibration=texts(), **options, **QUICK)
    model = load_model(sparse)
    assert result == reconstruct(model, masks, load_model(dense), calibration=texts(), **options, **QUICK)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    before, ours, theirs = stored(sparse), stored(tmp_path / "out"), stored(tmp_path / "saved")
    assert set(ours) == set(theirs) == set(before)
    # of T5 in bfloat16 transformers holds some weights in fp32, and saves them so
    assert all(same_bits(tensor, theirs[key].to(tensor.dtype)) for key, tensor in ours.items())
    assert any(not same_bits(tensor, before[key]) for key, tensor in ours.items())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in sparse.glob("model*.safetensors*")
    }
    if dtype == torch.float32:
        (tmp_path / "out" / "config.json").write_text((sparse / "config.json").read_text())
        masks.verify(load_model(tmp_path / "out"))


def test_tensors_that_are_not_trained_are_the_same_bytes(tmp_path: Path) -> None:
    sparse, dense, masks = save_pair(tmp_path)
    reconstruct_checkpoint(sparse, dense, tmp_path / "out", calibration=texts(), **QUICK)
    before, after = stored(sparse), stored(tmp_path / "out")
    assert {key for key in before if not same_bits(before[key], after[key])} == set(masks)


def deep_pair(place: Path, layers: int) -> tuple[Path, Path]:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(place / "dense")
    weights = named_weights(model)
    masks = MaskSet.from_scores({t.name: weights[t.name].detach().abs() for t in find_targets(model)}, sparsity=0.5)
    masks.apply_(model)
    model.save_pretrained(place / "sparse")
    masks.save(place / "sparse")
    return place / "sparse", place / "dense"


def most_weights_in_memory(layers: int, place: Path, monkeypatch: pytest.MonkeyPatch, stream: str) -> int:
    """The largest number of parameters of both models that are not on the meta device, seen whenever one is read."""
    sparse, dense = deep_pair(place, layers)
    modules: list[nn.Module] = []
    most = [0]
    read, build = CheckpointReader.get, pruning_streaming.load_skeleton

    def spy_on_skeleton(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        modules.extend(model.modules())
        return model

    def spy(self: CheckpointReader, name: str, **options: Any) -> Tensor:
        parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
        tensor = read(self, name, **options)
        # what is read now counts too: else the peak would depend on which tensor of a block comes last
        most[0] = max(most[0], tensor.numel() + sum(p.numel() for p in parameters if not p.is_meta))
        return tensor

    monkeypatch.setattr(pruning_streaming, "load_skeleton", spy_on_skeleton)
    monkeypatch.setattr(CheckpointReader, "get", spy)
    reconstruct_checkpoint(sparse, dense, place / "out", calibration=texts(rows=2), stream=stream, **QUICK)
    monkeypatch.undo()
    return most[0]


@pytest.mark.parametrize("stream", ["sparse", "dense", "sparse_to_dense"])
def test_memory_does_not_grow_with_depth(stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = most_weights_in_memory(3, tmp_path / "3", monkeypatch, stream)  # with a block between first and last
    deep = most_weights_in_memory(7, tmp_path / "7", monkeypatch, stream)
    block = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    embedding_and_final_norm = (96 * 32 + 32) * (2 if stream == "sparse_to_dense" else 1)
    assert deep == shallow
    assert block < deep <= 2 * block + embedding_and_final_norm, "one block of each model, and never the head"


def test_activations_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of activations between blocks no more are held for a deep model than for a shallow one."""
    import weakref

    most = {}
    for layers in (2, 6):
        sparse, dense = deep_pair(tmp_path / str(layers), layers)
        alive: list[weakref.ref[Tensor]] = []
        peak = [0]

        def keep(tensor: Tensor, alive: Any = alive, peak: Any = peak) -> Tensor:
            kept = tensor.clone()
            alive.append(weakref.ref(kept))
            peak[0] = max(peak[0], sum(one.numel() for ref in alive if (one := ref()) is not None))
            return kept

        monkeypatch.setattr(streaming_module, "keeper", lambda *args, keep=keep: keep)
        reconstruct_checkpoint(sparse, dense, tmp_path / f"out{layers}", calibration=texts(rows=4), **QUICK)
        most[layers] = peak[0]
    between_two_blocks, cosines_sines_positions = 4 * 12 * 32, 2 * 12 * 8 + 12  # these once for all batches
    assert most[2] == most[6] <= 4 * between_two_blocks + cosines_sines_positions


def test_loading_everything_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    sparse, dense, _ = save_pair(tmp_path, "mixtral")
    result = reconstruct_checkpoint(sparse, dense, tmp_path / "streamed", calibration=texts(), **QUICK)

    class Refusing(streaming_module.StoredWeights):
        def __init__(self, *args: Any) -> None:
            raise streaming_module.CannotStream("these pieces cannot be taken apart")

    monkeypatch.setattr(streaming_module, "StoredWeights", Refusing)
    assert reconstruct_checkpoint(sparse, dense, tmp_path / "whole", calibration=texts(), **QUICK) == result
    assert "these pieces cannot be taken apart" in caplog.text
    for file in (tmp_path / "streamed").iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def refused(place: Path, message: str, *directories: Path, kind: type[Exception] = ValueError, **options: Any) -> None:
    settings = dict(calibration=texts()) | options
    with pytest.raises(kind, match=message) as caught:
        reconstruct_checkpoint(*directories, place / "out", **settings, progress=False)
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()


def test_bad_checkpoints_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sparse, dense, masks = save_pair(tmp_path)
    TINY["qwen"]().save_pretrained(tmp_path / "other")
    refused(tmp_path, "both the sparse and the dense model", sparse, sparse)
    refused(tmp_path, "both the sparse and the dense model", sparse, tmp_path / "dense" / ".." / "sparse")
    refused(tmp_path, r"has a tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'", sparse, tmp_path / "other")
    refused(tmp_path, "No masks", dense, sparse, kind=FileNotFoundError)
    refused(tmp_path, "pruned weights .* are not zero", dense, sparse, kind=RuntimeError, masks=masks)
    refused(tmp_path, "7 calibration|batch takes 7", sparse, dense, batch_size=7)
    refused(tmp_path, "mask for it", sparse, dense, masks=pair("gpt2")[1])
    with pytest.raises(ValueError, match="is also an input"):
        reconstruct_checkpoint(sparse, dense, dense, calibration=texts())


def test_nothing_is_left_on_the_default_dtype(tmp_path: Path) -> None:
    sparse, dense, _ = save_pair(tmp_path, dtype=torch.bfloat16)
    reconstruct_checkpoint(sparse, dense, tmp_path / "out", calibration=texts(), **QUICK)
    assert torch.get_default_dtype() == torch.float32
