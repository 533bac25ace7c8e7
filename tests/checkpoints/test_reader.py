"""Reading: the same tensors safetensors loads, little memory, and one sentence for every damaged or hostile file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints.files import F32, make_sharded, make_single, raw_file, tensors, write_index
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.checkpoints.header import read_header

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(path: Path, kind: type[Exception] = ValueError) -> str:
    """The message with which a reader refuses a path; it must be one line."""
    with pytest.raises(kind) as caught:
        CheckpointReader(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("make", [make_single, make_sharded])
def test_reads_what_was_saved(tmp_path: Path, make: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    expected = make(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert set(reader.names()) == set(expected) == set(reader) and len(reader) == len(expected)
    for name, tensor in expected.items():
        assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.get(name), tensor) and torch.equal(reader[name], tensor)
        assert torch.equal(reader.get(name, copy=True), tensor)
    assert reader.metadata == {"format": "pt"}
    assert sorted(name for _, names in reader.shards for name in names) == sorted(expected)
    for file, names in reader.shards:
        assert set(load_file(tmp_path / file)) == set(names)


def test_a_single_file_without_directory_can_be_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "any name.safetensors")
    assert set(CheckpointReader(tmp_path / "any name.safetensors")) == set(tensors())


def test_changing_a_tensor_never_changes_the_file(tmp_path: Path) -> None:
    make_single(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    reader = CheckpointReader(tmp_path)
    reader.get("model.norm.weight").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(reader.get("model.norm.weight"), torch.ones(4))


def test_mapped_tensors_outlive_a_replaced_directory_and_copies_a_changed_file(tmp_path: Path) -> None:
    make_single(tmp_path)
    reader = CheckpointReader(tmp_path)
    mapped, copied = reader.get("model.norm.weight"), reader.get("model.norm.weight", copy=True)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(mapped, torch.ones(4)) and torch.equal(copied, torch.ones(4))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_the_tensors_in_use(tmp_path: Path) -> None:
    each, count, warm_up = 8_000_000, 16, 4
    save_file({f"t{i}": torch.full((each // 4,), float(i)) for i in range(count)}, tmp_path / "model.safetensors")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    reader = CheckpointReader(tmp_path)
    used = []
    for i in range(count):
        tensor = reader.get(f"t{i}")
        assert [float(end) for end in tensor.aminmax()] == [i, i]  # touches every page, and allocates nothing
        used.append(resident())
        del tensor
    # The first ones load code of torch; from then on a tensor's pages must leave with it.
    growth = max(used[warm_up:]) - max(used[:warm_up])
    assert growth < 2 * each, f"{growth} bytes more after {count} tensors of {each}"


def test_missing_tensor_names_the_nearest(tmp_path: Path) -> None:
    make_single(tmp_path)
    reader = CheckpointReader(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor 'model\.norms\.weight' among its 4.*'model\.norm\.weight'"):
        reader.get("model.norms.weight")
    with pytest.raises(KeyError):
        reader["model.norms.weight"]
    assert "model.norms.weight" not in reader


def test_a_file_changed_after_opening_is_reported(tmp_path: Path) -> None:
    make_single(tmp_path)
    reader = CheckpointReader(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*was the file changed"):
        reader.get("model.norm.weight")


DAMAGED = {
    "empty": (b"", "0 bytes"),
    "three bytes": (b"abc", "3 bytes"),
    "header cut": (raw_file({"a": F32})[:30], "truncated"),
    "data cut": (raw_file({"a": F32}, bytes(5)), "truncated"),
    "trailing bytes": (raw_file({"a": F32}, bytes(20)), "12 bytes after its last tensor"),
    "header longer than file": (raw_file({"a": F32}, length=10_000), "truncated"),
    "huge header": (raw_file({"a": F32}, length=2**63), f"header of {2**63} bytes"),
    "not JSON": (raw_file(b"{nope"), "header"),
    "not UTF-8": (raw_file(b"\xff\xfe{}"), "header"),
    "nested": (raw_file(b"[" * 100_000), "header"),
    "huge number": (raw_file(b'{"a":' + b"9" * 10_000 + b"}"), "header"),
    "list": (raw_file([1]), "JSON object, got list"),
    "tensor is a number": (raw_file({"a": 3}), "'a'"),
    "no dtype": (raw_file({"a": {"shape": [2], "data_offsets": [0, 8]}}), "'a'"),
    "unknown dtype": (raw_file({"a": {**F32, "dtype": "F99"}}), "'F99'"),
    "dtype is a list": (raw_file({"a": {**F32, "dtype": ["F32"]}}), "dtype"),
    "negative size": (raw_file({"a": {**F32, "shape": [-2]}}), "[-2]"),
    "fractional size": (raw_file({"a": {**F32, "shape": [2.0]}}), "[2.0]"),
    "boolean size": (raw_file({"a": {**F32, "shape": [True, 2]}}), "[True, 2]"),
    "too many dimensions": (raw_file({"a": {**F32, "shape": [1] * 65 + [2]}}), "at most 64"),
    "overflowing shape": (raw_file({"a": {**F32, "shape": [2**40, 2**40]}}), "needs"),
    "wrong size": (raw_file({"a": {**F32, "shape": [3]}}), "needs 12 bytes"),
    "offsets reversed": (raw_file({"a": {**F32, "data_offsets": [8, 0]}}), "[8, 0]"),
    "three offsets": (raw_file({"a": {**F32, "data_offsets": [0, 4, 8]}}), "[0, 4, 8]"),
    "gap at the start": (raw_file({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "gap after the header"),
    "gap": (raw_file({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)), "gap after 'a'"),
    "overlap": (raw_file({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)), "overlaps 'a'"),
    "out of bounds": (raw_file({"a": {**F32, "shape": [99], "data_offsets": [0, 396]}}), "truncated"),
    "duplicate tensor": (raw_file(b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2)), "twice"),
    "metadata of numbers": (raw_file({"__metadata__": {"x": 1}, "a": F32}), "metadata"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_hostile_files_are_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    content, reason = DAMAGED[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    message = refusal(tmp_path)
    assert "model.safetensors" in message and reason in message


def _mutate(content: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for place, removed, inserted in cuts:
        place %= len(content) + 1
        content = content[:place] + inserted + content[place + removed :]
    return content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=3))
def test_whatever_is_accepted_opens_in_the_library_too(tmp_path: Path, cuts: list[tuple[int, int, bytes]]) -> None:
    whole = save({"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.int16), "c": torch.ones(0)}, {"format": "pt"})
    file = tmp_path / "model.safetensors"
    file.write_bytes(_mutate(whole, cuts))
    try:
        infos, _ = read_header(file)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    try:
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == set(infos)
            for name, info in infos.items():
                tensor = opened.get_tensor(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
    except SafetensorError as error:
        # The library wants the header's JSON to start with "{" and to hold no unknown escapes; it may be stricter.
        reader_error = refusal_when_read(tmp_path, infos)
        assert reader_error, error


def refusal_when_read(path: Path, infos: dict) -> bool:
    reader = CheckpointReader(path)
    with pytest.raises(ValueError, match="Cannot read tensor"):
        reader.get(next(iter(infos)))
    return True


OUTSIDE = ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "C:\\secret.safetensors",
           "..\\secret.safetensors", "\\\\host\\secret.safetensors", "x\0.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_may_not_leave_the_directory(tmp_path: Path, name: str) -> None:
    save_file(tensors(), tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    make_sharded(directory)
    write_index(directory, {"model.norm.weight": name})
    assert "outside the directory" in refusal(directory)


def test_links_out_of_the_directory_are_refused_and_links_inside_are_not(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    assert "is a link to" in refusal(directory)
    (directory / "model.safetensors").unlink()
    save_file(tensors(), directory / "weights.safetensors")
    (directory / "model.safetensors").symlink_to("weights.safetensors")
    assert len(CheckpointReader(directory)) == 4


def test_a_linked_directory_is_followed(tmp_path: Path) -> None:
    make_sharded(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert len(CheckpointReader(tmp_path / "link")) == 4


def test_the_hub_cache_and_only_its_own_blobs_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(tensors(), blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert len(CheckpointReader(snapshot)) == 4
    other = tmp_path / "models--owner--other" / "blobs"
    other.mkdir(parents=True)
    save_file(tensors(), other / "0123")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../models--owner--other/blobs/0123")
    assert "outside the checkpoint" in refusal(snapshot)


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    names = list(tensors())
    right = {**dict.fromkeys(names[:2], SHARD_1), **dict.fromkeys(names[2:], SHARD_2)}
    write_index(tmp_path, {**right, "model.extra.weight": SHARD_1})
    assert "'model.extra.weight'" in refusal(tmp_path) and SHARD_1 in refusal(tmp_path)
    write_index(tmp_path, {**right, names[0]: SHARD_2})
    assert names[0] in refusal(tmp_path)
    write_index(tmp_path, {**right, names[0]: "model-00003-of-00002.safetensors"})
    assert "lacks the file 'model-00003" in refusal(tmp_path, FileNotFoundError)
    write_index(tmp_path, {**right, names[0]: "weights.bin"})
    assert "weights.bin" in refusal(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 3}])
def test_malformed_index(tmp_path: Path, weight_map: object) -> None:
    make_sharded(tmp_path)
    write_index(tmp_path, weight_map)
    assert "index" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    save_file(tensors(), tmp_path / SHARD_2)
    message = refusal(tmp_path)
    assert "is in both" in message and SHARD_1 in message and SHARD_2 in message


def test_a_shard_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path)
    (tmp_path / SHARD_2).unlink()
    os.mkfifo(tmp_path / SHARD_2)
    assert "not a regular file" in refusal(tmp_path)


def test_pickles_are_read_only_on_request_and_without_running_code(tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert "--allow_pickle" in refusal(tmp_path)
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors().items())
    assert reader.shards[0][0] == "model.safetensors"
    torch.save({"w": torch.ones(1), "evil": Callable_}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than plain tensors") as caught:
        CheckpointReader(tmp_path, allow_pickle=True)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value), "not torch's way round it"


class Callable_:
    """Anything but a tensor."""


def test_pickled_shards_and_tied_tensors(tmp_path: Path) -> None:
    shared = torch.ones(3, 2)
    torch.save({"a": shared, "tied": shared}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {"a": 1, "tied": 1, "b": 2}
    weight_map = {name: f"pytorch_model-{number:05d}-of-00002.bin" for name, number in files.items()}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    reader = CheckpointReader(tmp_path, allow_pickle=True)
    assert reader.shards == [("model-00001-of-00002.safetensors", ["a"]), ("model-00002-of-00002.safetensors", ["b"])]
