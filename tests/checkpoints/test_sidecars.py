"""Masks, record and weights belong together, and anything else is refused by name of the two digests."""

from __future__ import annotations

import json
import math
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.files import tree
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.checkpoints import (
    RECORD_FILE,
    CheckpointReader,
    check_weights,
    make_record,
    read_sidecars,
    versions,
    write_sidecars,
)
from sparse_ft.checkpoints.record import Record
from sparse_ft.masks import MASKS_FILE, MaskSet
from sparse_ft.models import find_targets


def sparse(family: str = "llama", sparsity: float = 0.5, seed: int = 0) -> tuple[torch.nn.Module, MaskSet]:
    model, targets = TINY[family](), find_targets(TINY[family]())
    generator = torch.Generator().manual_seed(seed)
    scores = {target.name: torch.rand(target.shape, generator=generator) for target in targets}
    dims = {target.name: target.input_dim for target in targets}
    return model, MaskSet.from_scores(scores, sparsity=sparsity, input_dims=dims).apply_(model)


def saved(directory: Path, **options: Any) -> tuple[torch.nn.Module, MaskSet, Record]:
    model, masks = sparse(**options)
    model.save_pretrained(directory)
    record = make_record(masks, model, command="prune", arguments={"sparsity": 0.5})
    write_sidecars(directory, masks, record)
    return model, masks, record


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_written_is_read_back(tmp_path: Path, family: str) -> None:
    model, masks, record = saved(tmp_path, family=family)
    read_masks, read_record = read_sidecars(tmp_path)
    assert read_masks == masks and read_record == record
    check_weights(read_masks, read_record, model)
    check_weights(read_masks, read_record, CheckpointReader(tmp_path))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_the_record_tells_the_truth(tmp_path: Path) -> None:
    _, masks, _ = saved(tmp_path)
    content = json.loads((tmp_path / RECORD_FILE).read_text())
    weights = load_file(tmp_path / "model.safetensors")
    assert content["command"] == "prune" and content["arguments"] == {"sparsity": 0.5}
    assert content["pattern"] == "unstructured" and content["masks_digest"] == masks.digest()
    assert [row["name"] for row in content["tensors"]] == list(masks)
    for row in content["tensors"]:
        weight = weights[row["name"]]
        assert row["shape"] == list(weight.shape) and row["total"] == weight.numel()
        assert row["kept"] == int((weight != 0).sum())
        assert row["sparsity"] == pytest.approx(1 - row["kept"] / row["total"])
    kept, total = (sum(row[key] for row in content["tensors"]) for key in ("kept", "total"))
    assert content["sparsity"] == pytest.approx(1 - kept / total)
    assert content["versions"]["torch"] == metadata.version("torch") and "python" in content["versions"]


def test_digest_does_not_depend_on_how_the_weights_are_held(tmp_path: Path) -> None:
    model, masks = sparse()
    from_model = make_record(masks, model, command="prune", arguments={})
    model.save_pretrained(tmp_path / "one", max_shard_size="1GB")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    for name in ("one", "many"):
        record = make_record(masks, CheckpointReader(tmp_path / name), command="prune", arguments={})
        assert record.weights_digest == from_model.weights_digest


def refused(directory: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        read_sidecars(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_masks_of_another_model_or_revision_are_refused(tmp_path: Path) -> None:
    _, masks, _ = saved(tmp_path / "a")
    _, others, _ = saved(tmp_path / "b", seed=1)
    others.save(tmp_path / "a")
    message = refused(tmp_path / "a")
    assert masks.digest()[:12] in message and others.digest()[:12] in message and "copy" in message


def test_weights_of_another_revision_are_refused(tmp_path: Path) -> None:
    model, masks, record = saved(tmp_path)
    name = next(iter(masks))
    weight = dict(model.named_parameters())[name]
    place = torch.nonzero(masks[name])[0]
    with torch.no_grad():
        weight[tuple(place)] *= 1.0001
    with pytest.raises(ValueError, match=record.weights_digest[:12]) as caught:
        check_weights(masks, record, model)
    assert masks.weights_digest(model)[:12] in str(caught.value) and "MaskSet.from_zeros" in str(caught.value)
    assert "\n" not in str(caught.value)
    check_weights(masks, record, CheckpointReader(tmp_path))


def test_weights_that_are_not_masked_do_not_matter(tmp_path: Path) -> None:
    model, masks, record = saved(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    check_weights(masks, record, model)


def test_edited_files_are_refused(tmp_path: Path) -> None:
    _, _, record = saved(tmp_path)
    masks_file, record_file = tmp_path / MASKS_FILE, tmp_path / RECORD_FILE
    whole, text = masks_file.read_bytes(), record_file.read_text()
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    masks_file.write_bytes(bytes(flipped))
    assert MASKS_FILE in refused(tmp_path)
    masks_file.write_bytes(whole[:-3])
    assert MASKS_FILE in refused(tmp_path)
    masks_file.write_bytes(whole)
    record_file.write_text(text.replace(record.masks_digest, "0" * 64))
    assert "000000000000" in refused(tmp_path)
    record_file.write_text(text[:-20])
    assert "not valid JSON" in refused(tmp_path)
    record_file.write_text("[]")
    assert "not an object" in refused(tmp_path)
    record_file.write_text(text)
    read_sidecars(tmp_path)


@pytest.mark.parametrize("name", [MASKS_FILE, RECORD_FILE])
def test_a_missing_sidecar_is_named(tmp_path: Path, name: str) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    assert f"No {name} in" in refused(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("name", [MASKS_FILE, RECORD_FILE])
def test_a_sidecar_may_not_be_a_link_out_of_the_directory(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / "outside")
    (tmp_path / "a" / name).symlink_to(tmp_path / "outside")
    assert "is a link to" in refused(tmp_path / "a")


def test_a_record_of_other_masks_is_not_written(tmp_path: Path) -> None:
    model, masks = sparse()
    _, others = sparse(seed=1)
    record = make_record(masks, model, command="prune", arguments={})
    with pytest.raises(ValueError, match=others.digest()[:12]):
        write_sidecars(tmp_path, others, record)
    assert not tree(tmp_path)


@pytest.mark.parametrize("field", [*Record.__dataclass_fields__])
@pytest.mark.parametrize("value", ["absent", "null", "wrong"])
def test_records_with_a_field_missing_or_wrong_are_refused(tmp_path: Path, field: str, value: str) -> None:
    _, _, record = saved(tmp_path)
    content = json.loads(record.to_json())
    if value == "absent":
        del content[field]
    else:
        content[field] = None if value == "null" else {"sparsity": "0.5"}.get(field, 17)
    (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    if (field, value) == ("training", "absent"):
        assert read_sidecars(tmp_path)[1] == record, "a record without it is of a checkpoint that was not trained"
        return
    message = refused(tmp_path)
    assert ("format" if field == "format_version" else f"'{field}'") in message and RECORD_FILE in message


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    _, _, record = saved(tmp_path)
    (tmp_path / RECORD_FILE).write_text(record.to_json().replace('"format_version": 1', '"format_version": 2'))
    assert "has format 2, this version reads 1; upgrade" in refused(tmp_path)


def test_history_holds_every_earlier_step_once(tmp_path: Path) -> None:
    model, masks = sparse()
    record = None
    for command in ("prune", "retrain", "merge"):
        training = {"logs": {command: [{"step": 1, "loss": 2.0}]}} if command == "retrain" else None
        record = make_record(
            masks, model, command=command, arguments={"step": command}, previous=record, training=training
        )
    assert record is not None and [step["command"] for step in record.history] == ["prune", "retrain"]
    assert [step["arguments"] for step in record.history] == [{"step": "prune"}, {"step": "retrain"}]
    assert all("history" not in step and "tensors" not in step for step in record.history)
    assert [step["training"] for step in record.history] == [{}, {"logs": {"retrain": [{"step": 1, "loss": 2.0}]}}]
    assert Record.from_json(record.to_json()) == record


def test_anything_in_arguments_and_results_becomes_strict_json() -> None:
    model, masks = sparse()
    arguments = {
        "path": Path("a/b"),
        "dtype": torch.bfloat16,
        "names": {"y", "x"},
        3: (1, None),
        "hub_token": "hf_SECRET",
    }
    evaluation = [{"perplexity": math.inf, "nll": math.nan, "tokens": 7}]
    text = make_record(masks, model, command="prune", arguments=arguments, evaluation=evaluation).to_json()

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads(text, parse_constant=no_constants)
    assert content["arguments"] == {"path": "a/b", "dtype": "torch.bfloat16", "names": ["x", "y"], "3": [1, None]}
    assert content["evaluation"] == [{"perplexity": "inf", "nll": "nan", "tokens": 7}]
    assert float(content["evaluation"][0]["perplexity"]) == math.inf
    assert "SECRET" not in text


def test_versions_are_read_without_importing() -> None:
    found = versions()
    assert {"python", "torch", "transformers", "safetensors"} <= set(found)
    assert found["safetensors"] == metadata.version("safetensors")


def test_masks_for_tensors_the_checkpoint_lacks_are_refused(tmp_path: Path) -> None:
    _, masks, record = saved(tmp_path)
    name = next(iter(masks))
    weights = load_file(tmp_path / "model.safetensors")
    shorter = {key: weight for key, weight in weights.items() if key != name}
    save_file(shorter, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        check_weights(masks, record, CheckpointReader(tmp_path))
    save_file({**weights, name: weights[name].t().contiguous()[:3]}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has shape"):
        check_weights(masks, record, CheckpointReader(tmp_path))
