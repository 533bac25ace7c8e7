"""Writing: byte for byte what the library and transformers write, in any order, with the memory of one tensor."""

from __future__ import annotations

import json
import random
import resource
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from checkpoints.files import tensors, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import TINY

from sparse_ft.checkpoints import CheckpointReader, CheckpointWriter
from sparse_ft.checkpoints.header import DTYPE_NAMES

DTYPES = list(DTYPE_NAMES)
Shards = list[tuple[str, dict[str, torch.Tensor]]]


def plan_of(shards: Shards) -> list[tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]]:
    return [(file, {n: (t.dtype, tuple(t.shape)) for n, t in part.items()}) for file, part in shards]


def write_all(directory: Path, shards: Shards, order: random.Random | None = None) -> None:
    directory.mkdir(exist_ok=True)
    items = [item for _, part in shards for item in part.items()]
    if order is not None:
        order.shuffle(items)
    with CheckpointWriter(directory, plan_of(shards)) as writer:
        for name, tensor in items:
            writer.write(name, tensor)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bytes are a valid value of every dtype but bool."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def test_the_dtypes_that_matter_are_supported() -> None:
    wanted = {torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int32, torch.int8, torch.uint8}
    assert {*wanted, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2} <= set(DTYPES)


def test_one_file_with_every_dtype_equals_the_librarys(tmp_path: Path) -> None:
    given_ = {f"t.{dtype}": random_tensor(dtype, (3, 2), i) for i, dtype in enumerate(DTYPES)}
    write_all(tmp_path / "ours", [("model.safetensors", given_)])
    save_file(given_, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
ENTRIES = st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=ENTRIES, parts=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_save_load_save_is_byte_equal(
    tmp_path_factory: pytest.TempPathFactory,
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    parts: int,
    seed: int,
) -> None:
    tmp_path = tmp_path_factory.mktemp("round_trip")
    made = {name: random_tensor(dtype, shape, seed + i) for i, (name, (dtype, shape)) in enumerate(entries.items())}
    shards: Shards = [(f"part-{i}.safetensors", {n: made[n] for n in list(made)[i::parts]}) for i in range(parts)]
    write_all(tmp_path / "first", shards, random.Random(seed))
    for file, part in shards:
        save_file(part, tmp_path / "library.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    if not made:
        return
    reader = CheckpointReader(tmp_path / "first")
    again: Shards = [(file, {name: reader.get(name) for name in names}) for file, names in reader.shards]
    # An index does not name files without tensors, so they cannot be found again.
    write_all(tmp_path / "second", again, random.Random(seed + 1))
    first = {name: content for name, content in tree(tmp_path / "first").items() if name in tree(tmp_path / "second")}
    assert first == tree(tmp_path / "second")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_directory_equals_save_pretrained(tmp_path: Path, family: str, size: str) -> None:
    TINY[family]().save_pretrained(tmp_path / "theirs", max_shard_size=size)
    reader = CheckpointReader(tmp_path / "theirs")
    plan = [(file, {n: (reader.dtype(n), reader.shape(n)) for n in names}) for file, names in reader.shards]
    (tmp_path / "ours").mkdir()
    with CheckpointWriter(tmp_path / "ours", plan) as writer:
        for name in sorted(reader, reverse=True):
            writer.write(name, reader.get(name))
    assert len(plan) > 1 or size == "1GB"
    ours, theirs = tree(tmp_path / "ours"), tree(tmp_path / "theirs")
    assert ours == {name: theirs[name] for name in theirs if "safetensors" in name}


def test_tensors_may_be_strided_views_with_gradients(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6).requires_grad_()
    given_ = {"t": base.t(), "part": base[1:, ::2], "scalar": base[0, 1]}
    write_all(tmp_path / "out", [("model.safetensors", given_)])
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in given_.items())


def test_index_is_written_unless_the_one_file_has_the_plain_name(tmp_path: Path) -> None:
    write_all(tmp_path / "one", [("model.safetensors", tensors())])
    assert set(tree(tmp_path / "one")) == {"model.safetensors"}
    write_all(tmp_path / "other", [("model-00001-of-00001.safetensors", tensors())])
    index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    assert list(index["weight_map"]) == sorted(tensors())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    each, count = 4_000_000, 20
    tracemalloc.start()
    try:
        plan = [("model.safetensors", {f"t{i}": (torch.float32, (each // 4,)) for i in range(count)})]
        before = peak_resident()
        with CheckpointWriter(tmp_path, plan) as writer:
            for i in reversed(range(count)):
                writer.write(f"t{i}", torch.full((each // 4,), float(i)))
        assert tracemalloc.get_traced_memory()[1] < each / 4
        assert peak_resident() - before < 6 * each
    finally:
        tracemalloc.stop()
    assert float(CheckpointReader(tmp_path).get("t7")[-1]) == 7


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    f32 = (torch.float32, (2,))
    with pytest.raises(ValueError, match=r"'a' is planned for both 'x\.safetensors' and 'y\.safetensors'"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"a": f32}), ("y.safetensors", {"a": f32})])
    with pytest.raises(ValueError, match="planned twice"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"a": f32}), ("x.safetensors", {"b": f32})])
    for name in ("../x.safetensors", "sub/x.safetensors", "x.bin"):
        with pytest.raises(ValueError, match="no plain file name"):
            CheckpointWriter(tmp_path, [(name, {"a": f32})])
    with pytest.raises(ValueError, match="complex128"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"a": (torch.complex128, (2,))})])
    with pytest.raises(ValueError, match="__metadata__"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"__metadata__": f32})])
    assert not tree(tmp_path)
    writer = CheckpointWriter(tmp_path, [("x.safetensors", {"a": f32, "b": f32})])
    with pytest.raises(ValueError, match=r"planned as torch.float32 \(2,\) but is torch.float64"):
        writer.write("a", torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"but is torch.float32 \(1, 2\)"):
        writer.write("a", torch.ones(1, 2))
    with pytest.raises(ValueError, match="'c' is not among the 2 planned"):
        writer.write("c", torch.ones(2))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="already written"):
        writer.write("a", torch.ones(2))
    with pytest.raises(RuntimeError, match=r"1 of 2 tensors were not written.*'b'"):
        writer.close()
    with pytest.raises(FileExistsError, match="exists already"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"a": f32})])


def test_a_checkpoint_larger_than_the_disk_is_refused_before_any_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"GB free and the checkpoint needs 4000000\.00 GB"):
        CheckpointWriter(tmp_path, [("x.safetensors", {"a": (torch.float32, (10**15,))})])
    assert not tree(tmp_path)
