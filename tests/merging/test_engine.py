"""The engine on files: the methods' results, whatever the files, threads and interruptions."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import merge_formulas as formulas
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.deltas import random_keep
from sparse_ft.deltas.random_mask import random_uniform
from sparse_ft.merging import chunks
from sparse_ft.merging.breadcrumbs import breadcrumbs
from sparse_ft.merging.dare import dare_linear, dare_ties, darex_q
from sparse_ft.merging.della import della
from sparse_ft.merging.engine import execute
from sparse_ft.merging.linear import linear
from sparse_ft.merging.methods import METHODS
from sparse_ft.merging.plan import MergeInput, MergePlan, Source, TensorPlan
from sparse_ft.merging.slerp import slerp
from sparse_ft.merging.task_arithmetic import task_arithmetic
from sparse_ft.merging.ties import ties

SHAPES = {"embed": (50, 16), "a.weight": (40, 24), "b.weight": (24, 100), "norm": (24,), "one": (1,)}
PARAMETERS = {"weight": 0.75, "density": 0.4, "gamma": 0.05, "epsilon": 0.2, "q": 0.5}
LABELS = ("base", "math", "code", "chat")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunks, "CHUNK", 500)
    yield


def tensors_of(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    own = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=own) * 0.1 * (seed > 0) for name, shape in SHAPES.items()}
    return {name: (base[name] + noise[name]).to(dtype) for name in SHAPES} | {"steps": torch.tensor([2**40 + seed])}


def save(directory: Path, tensors: Mapping[str, Tensor], files: int = 1) -> Path:
    """A checkpoint whose tensors are dealt out to a number of files."""
    directory.mkdir(parents=True)
    names = list(tensors)
    parts = [names[i::files] for i in range(files)]
    shards = [f"model-{i:05d}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    for shard, part in zip(shards, parts, strict=True):
        save_file({name: tensors[name] for name in part}, directory / shard)
    if files > 1:
        weight_map = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """Three models and their base under `tmp_path/in`, in one, two or three files each."""
    models = {label: tensors_of(k, torch.bfloat16) for k, label in enumerate(LABELS)}
    for k, (label, tensors) in enumerate(models.items()):
        save(tmp_path / "in" / label, tensors, 1 + k % 3)
    return models


def make_plan(
    folder: Path, method: str, *, dtype: torch.dtype = torch.float32, files: int = 2, **more: Any
) -> MergePlan:
    used = LABELS[: 2 if method == "slerp" else 4]
    tensors = [
        TensorPlan(
            name, shape, dtype, None if method == "linear" else Source(0, name),
            tuple(Source(k, name, PARAMETERS) for k in range(1, len(used))), {"t": 0.3},
        )
        for name, shape in SHAPES.items()
    ]  # fmt: skip
    tensors.append(TensorPlan("steps", (1,), torch.int64, None, (), copy=Source(0, "steps")))
    names = [tensor.name for tensor in tensors]
    shards = tuple((f"model-{i}.safetensors", tuple(names[i::files])) for i in range(files))
    models = tuple(MergeInput(label, folder / label) for label in used)
    return MergePlan(method, models, tuple(tensors), shards, seed=3, **more)


def read(directory: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(directory)
    return {name: reader.get(name, copy=True) for name in reader}


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def expected(method: str, name: str, models: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """The public function of the method on whole tensors."""
    base, others = models["base"][name], [models[label][name] for label in LABELS[1:]]
    weights, densities, n = [0.75] * 3, [0.4] * 3, base.numel()
    masks = [torch.from_numpy(random_keep(n, 0.4, seed=3, name=name, role=label)) for label in LABELS[1:]]
    masks = [mask.view(base.shape) for mask in masks]
    uniforms = [torch.from_numpy(random_uniform(n, seed=3, name=name, role=label)) for label in LABELS[1:]]
    window = (base, others, weights, densities, [0.2] * 3, uniforms)
    crumbs = (base, others, weights, densities, [0.05] * 3)
    results = {
        "linear": lambda: linear(others, weights),
        "slerp": lambda: slerp(base, others[0], 0.3),
        "task_arithmetic": lambda: task_arithmetic(base, others, weights),
        "ties": lambda: ties(base, others, weights, densities),
        "dare_linear": lambda: dare_linear(base, others, weights, densities, masks),
        "dare_ties": lambda: dare_ties(base, others, weights, densities, masks),
        "darex_q": lambda: darex_q(base, others, weights, densities, masks, [0.5] * 3),
        "della": lambda: della(*window),
        "della_linear": lambda: della(*window, elect=False, normalize=False),
        "breadcrumbs": lambda: breadcrumbs(*crumbs),
        "breadcrumbs_ties": lambda: breadcrumbs(*crumbs, elect=True),
    }
    return results[method]()


@pytest.mark.parametrize("method", METHODS)
def test_files_give_what_the_functions_give(
    method: str, checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    report = execute(make_plan(tmp_path / "in", method), tmp_path / "out", threads=2, progress=False)
    found = read(tmp_path / "out")
    assert (report.merged, report.copied, report.files, report.resumed) == (5, 1, 2, 0)
    assert torch.equal(found["steps"], checkpoints["base"]["steps"]), "integers never pass through a float"
    for name in SHAPES:
        assert torch.equal(found[name], expected(method, name, checkpoints)), name
    assert not list(tmp_path.glob(".out*")), "nothing is left beside the output"


@pytest.mark.parametrize("method", ["dare_ties", "ties"])
def test_same_bytes_for_any_threads_and_any_input_files(
    method: str, checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    for label, tensors in checkpoints.items():
        save(tmp_path / "other" / label, dict(reversed(tensors.items())), 4)
    results = []
    for folder, threads in (("in", 1), ("in", 3), ("other", 2)):
        plan = make_plan(tmp_path / folder, method, dtype=torch.bfloat16)
        execute(plan, tmp_path / f"out_{folder}{threads}", threads=threads, progress=False)
        results.append(bytes_of(tmp_path / f"out_{folder}{threads}"))
    assert results[0] == results[1] == results[2]


def test_one_cast_at_the_end(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        plan = make_plan(tmp_path / "in", "task_arithmetic", dtype=dtype)
        execute(plan, tmp_path / str(dtype), progress=False)
        found = read(tmp_path / str(dtype))
        for name in SHAPES:
            assert torch.equal(found[name], expected("task_arithmetic", name, checkpoints).to(dtype))


def test_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    for label in LABELS:
        save(tmp_path / "in" / label, {"a": torch.full((4,), 60000.0)})
    tensor = TensorPlan("a", (4,), torch.float16, None, (Source(0, "a", {"weight": 2.0}),), {"normalize": False})
    plan = MergePlan("linear", (MergeInput("x", tmp_path / "in/base"),), (tensor,), (("model.safetensors", ("a",)),))
    with pytest.raises(ValueError, match="65504"):
        execute(plan, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"], "nothing is written"


def test_rows_of_another_vocabulary(tmp_path: Path) -> None:
    """Each row comes from where the plan says; a missing one from the fallbacks, the base, or those that have it."""
    base, one, two = (torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows)) for rows in (5, 6, 8))
    for label, tensor in zip(LABELS, (base, one, two), strict=False):
        save(tmp_path / "in" / label, {"embed": tensor.bfloat16()})
    base, one, two = (tensor.bfloat16().float() for tensor in (base, one, two))
    rows = {
        "base": [4, 3, 2, 1, 0, -1, -1, -1, 0],
        "one": [0, 1, -1, 3, -1, 5, 4, -1, -2],
        "two": [7, 6, 5, -1, -1, -1, 3, -1, 1],
    }
    arrays = {label: np.array(values, dtype=np.int64) for label, values in rows.items()}
    table = {"base": base, "one": one, "two": two}

    def row(label: str, r: int) -> Tensor:
        have = {key: int(arrays[key][r]) for key in table}
        if have[label] >= 0:
            return table[label][have[label]]
        if have[label] == -2:
            return torch.zeros(7)
        if have["base"] >= 0:
            return base[have["base"]]
        others = [table[key][have[key]] for key in ("one", "two") if have[key] >= 0]
        return sum(others, torch.zeros(7)) / max(len(others), 1)

    full = {label: torch.stack([row(label, r) for r in range(9)]) for label in table}
    models = tuple(MergeInput(label, tmp_path / "in" / label) for label in LABELS[:3])
    sources = tuple(Source(k, "embed", {"weight": 0.5}, arrays[label]) for k, label in enumerate(("one", "two"), 1))
    tensor = TensorPlan("embed", (9, 7), torch.float32, Source(0, "embed", {}, arrays["base"]), sources)
    plan = MergePlan("task_arithmetic", models, (tensor,), (("model.safetensors", ("embed",)),))
    execute(plan, tmp_path / "out", progress=False)
    wanted = task_arithmetic(full["base"], [full["one"], full["two"]], [0.5, 0.5])
    assert torch.equal(read(tmp_path / "out")["embed"], wanted)
    # A fallback comes before the base: row 5 of everybody without it is row 7 of `two`.
    fallback = Source(2, "embed", {}, np.array([-1] * 5 + [7] + [-1] * 3, dtype=np.int64))
    plan = replace(plan, tensors=(replace(tensor, fallbacks=(fallback,)),))
    execute(plan, tmp_path / "out2", progress=False)
    changed = read(tmp_path / "out2")["embed"]
    full_one = full["one"][5]
    assert torch.equal(changed[5], task_arithmetic(two[7], [full_one, two[7]], [0.5, 0.5]))
    assert torch.equal(changed[[0, 1, 2, 3, 4, 6, 7, 8]], wanted[[0, 1, 2, 3, 4, 6, 7, 8]])


def test_adapters_of_different_rank_stand_in_for_models(
    checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(4)
    products = {}
    for label, rank in (("small", 2), ("large", 5)):
        a, b = torch.randn(rank, 24, generator=generator), torch.randn(40, rank, generator=generator)
        products[label] = 16 / rank * b @ a
        directory = tmp_path / label
        directory.mkdir()
        key = "base_model.model.a.lora_{}.weight"
        save_file({key.format("A"): a, key.format("B"): b}, directory / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["a"]}
        (directory / "adapter_config.json").write_text(json.dumps(config))
    base = checkpoints["base"]["a.weight"]
    folder = tmp_path / "in" / "base"
    models = (MergeInput("base", folder), *(MergeInput(label, folder, tmp_path / label) for label in products))
    tensors = [
        TensorPlan(n, SHAPES[n], torch.float32, Source(0, n), tuple(Source(k, n, {"weight": 0.5}) for k in (1, 2)))
        for n in ("a.weight", "norm")
    ]
    plan = MergePlan("task_arithmetic", models, tuple(tensors), (("model.safetensors", ("a.weight", "norm")),))
    execute(plan, tmp_path / "out", progress=False)
    found = read(tmp_path / "out")
    torch.testing.assert_close(found["a.weight"], base.float() + sum(0.5 * p for p in products.values()))
    assert torch.equal(found["norm"], checkpoints["base"]["norm"].float())


def test_equal_to_the_formulas_in_mergekits_form(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    execute(make_plan(tmp_path / "in", "ties", compatibility="mergekit"), tmp_path / "out", progress=False)
    for name, found in read(tmp_path / "out").items():
        if name in SHAPES:
            base = checkpoints["base"][name]
            deltas = formulas.deltas_of(base, [checkpoints[label][name] for label in LABELS[1:]])
            kept = [formulas.top(delta, max(1, int(0.4 * delta.numel()))) for delta in deltas]
            wanted = formulas.elected(base, kept, [0.75] * 3, True, 1.0, True)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_refusals(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path / "in", "ties")
    with pytest.raises(ValueError, match="also an input"):
        execute(plan, tmp_path / "in" / "math", overwrite=True, progress=False)
    with pytest.raises(ValueError, match="Unknown merge method 'tie'"):
        execute(replace(plan, method="tie"), tmp_path / "out", progress=False)
    other = replace(plan.tensors[1], shape=(40, 25))
    with pytest.raises(ValueError, match="different architectures"):
        execute(replace(plan, tensors=(other,), shards=(("m.safetensors", (other.name,)),)), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        execute(plan, tmp_path / "full", progress=False)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("sparse_ft.checkpoints.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match="free some space"):
        execute(plan, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_nan_names_tensor_and_model(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    broken = dict(checkpoints["code"])
    broken["a.weight"] = broken["a.weight"].clone().index_fill_(0, torch.tensor([3]), float("nan"))
    for path in (tmp_path / "in" / "code").iterdir():
        path.unlink()
    (tmp_path / "in" / "code").rmdir()
    save(tmp_path / "in" / "code", broken)
    with pytest.raises(ValueError, match=r"'a.weight' of 'code'.*NaN"):
        execute(make_plan(tmp_path / "in", "dare_linear"), tmp_path / "out", threads=2, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


# -- interruptions -----------------------------------------------------------------------------------------------------

# Tells its parent of every chunk written: the parent kills it after a share of the work, not after a time.
TALKING_RUN = """
import sys, time, pickle
from sparse_ft.merging import chunks, engine
chunks.CHUNK = 100  # some fifty writes
write = engine.OutputFiles.write
def talk(self, *args):
    write(self, *args)
    print("wrote", flush=True)
    time.sleep(0.002)
engine.OutputFiles.write = talk
plan = pickle.load(open(sys.argv[1], "rb"))
engine.execute(plan, sys.argv[2], threads=2, progress=False)
"""


def finished_files(out: Path) -> list[str]:
    note = out.with_name(f".{out.name}.unfinished") / ".resume" / "finished.json"
    return list(json.loads(note.read_text())) if note.exists() else []


@pytest.mark.distributed
def test_killed_at_random_moments_and_resumed_gives_the_same_bytes(
    checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    import pickle

    plan = make_plan(tmp_path / "in", "dare_ties", dtype=torch.bfloat16, files=6)
    execute(plan, tmp_path / "straight", progress=False)
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    command = [sys.executable, "-c", TALKING_RUN, str(tmp_path / "plan.pickle"), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    resumed_kills = 0
    seen: set[str] = set()
    while kills < 10:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        for _ in range(rng.randrange(30)):
            process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.004))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():  # finished before its moment came: right, then once more from the beginning
            assert bytes_of(out) == bytes_of(tmp_path / "straight")
            shutil.rmtree(out)
            seen = set()
            continue
        kills += 1
        now = set(finished_files(out))
        assert seen <= now, "what was finished stays finished"
        resumed_kills += bool(seen)
        seen = now
    assert resumed_kills, "some runs began where another was killed"
    report = execute(plan, out, progress=False)
    assert report.resumed == len(seen)
    assert bytes_of(out) == bytes_of(tmp_path / "straight")
    assert not list(tmp_path.glob(".out*"))


def test_resuming_keeps_finished_files_and_another_plan_begins_again(
    checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    plan = make_plan(tmp_path / "in", "ties", files=3)

    def fail(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        execute(plan, out, progress=False, finish=fail)
    assert not out.exists() and len(finished_files(out)) == 3
    assert execute(plan, out, progress=False).resumed == 3
    assert "config.json" not in bytes_of(out), "what an interrupted finish added is not kept"
    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "two", progress=False, finish=fail)
    report = execute(replace(plan, seed=4), tmp_path / "two", progress=False)
    assert report.resumed == 0
    assert bytes_of(tmp_path / "two") == bytes_of(out), "ties has nothing random"


def test_a_changed_input_begins_again(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "in", "linear")

    def fail(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(plan, tmp_path / "out", progress=False, finish=fail)
    file = next((tmp_path / "in" / "math").glob("*.safetensors"))
    tensors = {name: tensor * 2 for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file)
    assert execute(plan, tmp_path / "out", progress=False).resumed == 0


def test_two_runs_do_not_write_one_output(checkpoints: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "in", "linear")
    failures: Sequence[BaseException] = []

    def again(_: Path) -> None:
        with pytest.raises(RuntimeError, match="Another process"):
            execute(plan, tmp_path / "out", progress=False)

    execute(plan, tmp_path / "out", progress=False, finish=again)
    assert not failures


def test_the_engine_loads_no_framework() -> None:
    code = "import sys, sparse_ft.merging.engine; print(sorted({'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
