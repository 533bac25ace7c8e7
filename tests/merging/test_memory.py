"""The memory a report announces against the memory merges take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from merging.checkpoints import near, prepare, write
from merging.lora import write_lora

from sparse_ft.merging import memory
from sparse_ft.merging.memory import peak_bytes

UP, WIDE = "model.layers.0.mlp.up_proj.weight", 2048
TEXT = "merge_method: %s\nbase_model: @base\nmodels:\n"
MODEL = "- {model: @%s, parameters: {weight: 1, density: %g, epsilon: 0.1}}\n"

# Peaks of merges in one process, counted from what is there before each: printed as (before, report, most), in bytes.
MEASURE = """
import sys
from pathlib import Path
from sparse_ft.merging.merge import merge_checkpoints, prepare_merge
from sparse_ft.merging.memory import resident_bytes
for number, file in enumerate(sys.argv[1:]):
    prepared = prepare_merge(file, threads=2)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    merge_checkpoints(prepared, f"{file}.out", threads=2, progress=False)
    status = Path("/proc/self/status").read_text()
    print(before, prepared.report.peak_bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def place_of(tmp_path: Path, width: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    base = {
        UP: torch.randn(width, width, generator=generator),
        "lm_head.weight": torch.randn(9, 4, generator=generator),
    }
    for seed, name in enumerate(("base", "a", "b")):
        write(tmp_path / name, {n: t.bfloat16() for n, t in (near(base, seed) if seed else base).items()})
    for name, rank in (("one", 2), ("two", 5)):
        factors = (torch.randn(rank, width, generator=generator), torch.randn(width, rank, generator=generator))
        write_lora(tmp_path / name, {UP: factors})
    return tmp_path


def estimate(place: Path, text: str, threads: int = 2) -> int:
    prepared = prepare(place, text)
    return peak_bytes(prepared.planned.plan, prepared.models, threads) - memory.resident_bytes()


def test_the_estimate_follows_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    place, numel = place_of(tmp_path, 512), 512 * 512
    plain = estimate(place, TEXT % "dare_ties" + MODEL % ("a", 0.5))
    assert estimate(place, TEXT % "dare_ties" + MODEL % ("a", 0.5), threads=4) > plain, "each thread has its buffers"
    assert estimate(place, TEXT % "della" + MODEL % ("a", 0.5)) > plain, "rows are ranked"
    assert estimate(place, TEXT % "ties" + MODEL % ("a", 0.5)) > plain, "values near the cut are collected"
    one = estimate(place, TEXT % "dare_ties" + MODEL % ("base+@one", 0.5))
    both = estimate(place, TEXT % "dare_ties" + MODEL % ("base+@one", 0.5) + MODEL % ("base+@two", 0.5))
    assert (one - plain, both - one) == (4 * numel, 4 * numel), "an adapter's product is formed whole, in fp32"


def test_it_does_not_grow_with_the_number_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)
    found = []
    for layers in (1, 9):
        base = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(32, 32) for i in range(layers)}
        for seed, name in enumerate(("base", "a")):
            write(tmp_path / name, near(base, seed))
        found.append(estimate(tmp_path, TEXT % "ties" + MODEL % ("a", 0.5), threads=1))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_merges_take_about_what_is_announced(tmp_path: Path) -> None:
    """Within a factor of two, of all memory and, where products of adapters are formed, of what comes on top."""
    place = place_of(tmp_path, WIDE)
    texts = {
        "first": TEXT % "task_arithmetic" + MODEL % ("a", 1),
        "ties": TEXT % "ties" + MODEL % ("a", 0.5) + MODEL % ("b", 0.2),
        "adapters": TEXT % "task_arithmetic" + MODEL % ("base+@one", 1) + MODEL % ("base+@two", 1),
    }
    files = []
    for name, text in texts.items():
        files.append(str(place / f"{name}.yaml"))
        Path(files[-1]).write_text(text.replace("@", f"{place}/"))
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not measure peaks")
    assert done.returncode == 0, done.stderr
    measured = dict(zip(texts, (map(int, line.split()) for line in done.stdout.splitlines()), strict=True))
    for before, announced, most in (found := {name: tuple(numbers) for name, numbers in measured.items()}).values():
        assert announced / 2 < most < 2 * announced and before < announced
    before, announced, most = found["adapters"]
    products = 2 * 4 * WIDE * WIDE
    assert products * 0.9 < most - before < 2 * (announced - before) and announced - before < 2 * (most - before) + 80e6


# What masks of one large tensor take beside what was there, in bytes, not counting pages of files.
MEASURE_MASKS = """
import sys, threading, time
from pathlib import Path
from sparse_ft.checkpoints import CheckpointReader
from sparse_ft.masks import MaskSet
from sparse_ft.merging.imposing import Stored, impose, largest_of_groups, largest_of_tensor
def taken():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
def watch():
    while not ended.is_set():
        most[0] = max(most[0], taken())
        time.sleep(0.0005)
name, (file, info) = "w", CheckpointReader(sys.argv[1]).place("w")
opened = open(file, "rb")
works = {
    "n:m": lambda: largest_of_groups(Stored(opened.fileno(), info, "x"), 1, 2, 4),
    "unstructured": lambda: largest_of_tensor(Stored(opened.fileno(), info, "x"), 0.5),
    "imposed": lambda: impose(Path(sys.argv[1]), masks),
}
masks = MaskSet.from_packed({"w": works["n:m"]()}, {"w": info.shape}, pattern="2:4")
for work in works.values():
    work()  # loads and compiles what is loaded once
    ended, most, before = threading.Event(), [0], taken()
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    ended.set()
    thread.join()
    print(most[0] - before)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_masks_of_a_wide_tensor_are_made_and_imposed_in_a_fraction_of_it(tmp_path: Path) -> None:
    shape = (1024, 16384)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    write(tmp_path, {"w": weight})
    # Freed memory goes back at once, so that what the first call left does not hide what the second takes.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEASURE_MASKS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = dict(zip(("n:m", "unstructured", "imposed"), map(int, done.stdout.split()), strict=True))
    assert max(found.values()) < weight.nbytes / 2, found
