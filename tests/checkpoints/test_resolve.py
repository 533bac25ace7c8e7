"""From a name to a directory that can be read, and what a new directory takes over from an old one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints.files import make_sharded, make_single, tensors, tree
from safetensors.torch import save_file

from sparse_ft.checkpoints import CheckpointReader, copy_side_files, directories, resolve_checkpoint


def refused(kind: type[Exception], name: str | Path, **options: bool) -> str:
    with pytest.raises(kind) as caught:
        resolve_checkpoint(name, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_directories_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_single(tmp_path / "single")
    make_sharded(tmp_path / "sharded")
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(tmp_path / "single") == tmp_path / "single"
    assert resolve_checkpoint("sharded") == Path("sharded")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    assert "No directory" in refused(FileNotFoundError, tmp_path / "nowhere")
    assert "No directory" in refused(FileNotFoundError, str(tmp_path / "nowhere"))
    make_single(tmp_path / "model")
    assert "is a file" in refused(ValueError, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").unlink()
    assert "No config.json" in refused(FileNotFoundError, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    assert "adapter, not a model" in refused(ValueError, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").unlink()
    message = refused(FileNotFoundError, tmp_path / "model")
    assert "No weights" in message and "found adapter_config.json, config.json" in message
    assert resolve_checkpoint(tmp_path / "model", needs_weights=False) == tmp_path / "model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickles_need_permission(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save(tensors(), tmp_path / name)
    assert "--allow_pickle" in refused(ValueError, tmp_path)
    assert resolve_checkpoint(tmp_path, allow_pickle=True) == tmp_path
    save_file(tensors(), tmp_path / "model.safetensors")
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert CheckpointReader(tmp_path, allow_pickle=True).metadata == {}, "safetensors come before pickles"


def test_the_single_file_comes_before_the_index_as_in_transformers(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path).names() == ["only"]


@pytest.mark.parametrize(
    "name", ["owner/there-is-no-such-model", "nomodel", "a/b/c", "bad name!", "", "-/-", "~/nothing"]
)
def test_hub_names_that_cannot_be_had(name: str) -> None:
    if not name:
        # The empty path is the working directory.
        assert "No config.json" in refused(FileNotFoundError, name)
        return
    message = refused(FileNotFoundError, name)
    assert f"No directory '{name}'" in message


def test_a_cached_hub_model_is_found_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--tiny"
    (repository / "blobs").mkdir(parents=True)
    make_single(repository / "snapshots" / ("0" * 40))
    for file in list((repository / "snapshots" / ("0" * 40)).iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = resolve_checkpoint("owner/tiny")
    assert found == repository / "snapshots" / ("0" * 40)
    assert set(CheckpointReader(found)) == set(tensors())
    assert set(tree(tmp_path)) and copy_side_files(found, tmp_path) == ["config.json"]


def test_a_directory_set_aside_by_a_dead_process_is_found_again(tmp_path: Path) -> None:
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    make_single(tmp_path / f".model.old-{directories._host()}-{finished.pid}-5-0000aa")
    assert resolve_checkpoint(tmp_path / "model") == tmp_path / "model"
    assert os.listdir(tmp_path) == ["model"]


COPIED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json", "LICENSE",
    "modeling_custom.py", "qwen.tiktoken",
]  # fmt: skip
LEFT = [
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "sparse_masks.safetensors", "sparse_ft.json", "report.html", "report.json", "training_args.bin",
    "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_config.json", "all_results.json",
    "checkpoint-5/config.json", "onnx/tokenizer.json", "model.onnx", "tf_model.h5", "flax_model.msgpack", "x.gguf",
]  # fmt: skip


def test_side_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in [*COPIED, *LEFT]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"content of {name}")
    target.mkdir()
    assert copy_side_files(source, target) == sorted(COPIED)
    assert tree(target) == {name: f"content of {name}".encode() for name in COPIED}


def test_side_files_of_the_target_stay(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    assert copy_side_files(tmp_path / "source", tmp_path / "target") == []
    assert (tmp_path / "target" / "config.json").read_text() == "target"


def test_a_link_out_of_the_source_is_not_copied(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "a.json").write_text("{}")
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="outside the checkpoint"):
        copy_side_files(tmp_path / "source", tmp_path / "target")
    assert not tree(tmp_path / "target")
