"""Directories and files appear whole or not at all: through errors, kill -9, a full disk and rival processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints.files import tree
from safetensors.torch import save_file

from sparse_ft.checkpoints import atomic_directory, atomic_write, check_output_dir, directories, recover_directory

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork, /proc and renameat2")


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of flushes to a real disk take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{HERE}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )  # fmt: skip


def run(*arguments: str) -> str:
    process = start(*arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def allowed_by_mode(path: str | Path, mode: int, **_: object) -> bool:
    """`os.access` as the owner has it, also where the tests run as root."""
    return os.stat(path).st_mode >> 6 & mode == mode


def make_old(target: Path) -> dict[str, bytes]:
    target.mkdir()
    (target / "old.txt").write_text("old")
    return tree(target)


def hidden(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if name.startswith(".")]


def test_the_directory_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "down" / "out"
    with atomic_directory(target) as directory:
        assert directory.parent == target.parent
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("x")
        assert not target.exists()
    assert tree(target) == {"sub/x": b"x"}
    assert os.listdir(target.parent) == ["out"]
    assert (target.stat().st_mode & 0o777) == (target.parent.stat().st_mode & 0o777)


def test_files_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    """safetensors makes its files private to their owner; a published checkpoint is not."""
    (tmp_path / "ordinary").write_text("x")
    with atomic_directory(tmp_path / "out") as directory:
        save_file({"a": torch.zeros(2)}, directory / "model.safetensors")
        (directory / "run.sh").write_text("x")
        (directory / "run.sh").chmod(0o755)
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "out/run.sh").stat().st_mode & 0o111 == 0o111


def test_replacing_leaves_nothing_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    old = make_old(target)
    with atomic_directory(target, overwrite=True) as directory:
        (directory / "new.txt").write_text("new")
        assert tree(target) == old
    assert tree(target) == {"new.txt": b"new"} and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_error_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, error: BaseException
) -> None:
    if not exchange:
        monkeypatch.setattr(directories, "_exchange", lambda first, second: False)
    old = make_old(tmp_path / "out")
    for target in (tmp_path / "out", tmp_path / "new" / "parents" / "out"):
        with pytest.raises(type(error)), atomic_directory(target, overwrite=True) as directory:
            (directory / "new.txt").write_text("new")
            raise error
    assert tree(tmp_path) == {f"out/{name}": content for name, content in old.items()}
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    make_old(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link", overwrite=True) as directory:
        (directory / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path / "real") == {"new.txt": b"new"}


def test_existing_targets(tmp_path: Path) -> None:
    make_old(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = tree(tmp_path)
    for name, overwrite, reason in (("full", False, "not empty"), ("file", False, "a file"), ("file", True, "a file")):
        with pytest.raises(FileExistsError, match=reason), atomic_directory(tmp_path / name, overwrite=overwrite):
            raise AssertionError("the block must not run")
    assert tree(tmp_path) == before and not hidden(tmp_path)
    with atomic_directory(tmp_path / "empty") as directory:
        (directory / "x").write_text("x")
    assert tree(tmp_path / "empty") == {"x": b"x"}


def test_a_target_filled_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="in the meantime"), atomic_directory(tmp_path / "out") as directory:
        (directory / "ours").write_text("x")
        make_old(tmp_path / "out")
    assert tree(tmp_path) == {"out/old.txt": b"old"} and not hidden(tmp_path)


@linux_only
@pytest.mark.parametrize("mode", ["exchange", "two_steps", "new", "file"])
def test_kill_at_every_line_leaves_the_old_or_the_new(fast_disk: Path, mode: str) -> None:
    killed = int(run(str(HERE / "killed_writer.py"), str(fast_disk), mode))
    assert killed > (25 if mode == "file" else 80), "the kills did not cover the code"


@linux_only
def test_kill_at_any_time_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """The same from outside, at moments that fall between and inside system calls."""
    loop = (
        "import sys, itertools\nfrom pathlib import Path\nfrom light import load_directories\n"
        "atomic_directory = load_directories().atomic_directory\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    with atomic_directory(sys.argv[1], overwrite=True) as d:\n"
        "        for name in 'abc': (d / name).write_text(str(i) * 50_000)\n"
    )
    target, delays = tmp_path / "out", random.Random(0)
    for _ in range(4):
        process = start("-c", loop, str(target))
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        while not target.exists():
            time.sleep(0.001)
        time.sleep(delays.uniform(0.01, 0.15))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        contents = set(tree(target).values())
        assert set(tree(target)) == set("abc") and len(contents) == 1
        assert len(contents.pop()) % 50_000 == 0
    recover_directory(target)
    assert os.listdir(tmp_path) == ["out"]


@linux_only
def test_what_a_live_process_writes_is_left_alone_and_a_dead_ones_removed(tmp_path: Path) -> None:
    hold = (
        "import sys\nfrom light import load_directories\n"
        "atomic_directory = load_directories().atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as d:\n"
        "    (d / 'x').write_text('x'); print(d.name, flush=True); sys.stdin.read()\n"
    )
    process = start("-c", hold, str(tmp_path / "out"), stdin=subprocess.PIPE)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "y").write_text("y")
    assert tree(tmp_path / name) == {"x": b"x"}
    process.kill()
    process.communicate()
    assert (tmp_path / name).exists()
    recover_directory(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and tree(tmp_path / "out") == {"y": b"y"}


@linux_only
def test_who_counts_as_dead(tmp_path: Path) -> None:
    target, mine = tmp_path / "out", os.getpid()
    started = directories._start_time(mine)
    host = directories._host()
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()

    def leave(host: str, pid: int, start_time: int | None, name: str = "out") -> Path:
        path = tmp_path / f".{name}.partial-{host}-{pid}-{start_time}-00ff00"
        path.mkdir()
        (path / "x").write_text("x")
        return path

    dead = [leave(host, finished.pid, 5), leave(host, mine, 5)]
    kept = [leave(host, mine, started), leave("00000000", finished.pid, 5), leave(host, finished.pid, 5, "outer")]
    kept += [leave(host, finished.pid, 5, "a.out")]
    locked = leave(host, finished.pid, 6)
    with directories._locked(locked):
        recover_directory(target)
        assert not any(path.exists() for path in dead)
        assert all(path.exists() for path in [*kept, locked])
    recover_directory(target)
    assert not locked.exists()


@linux_only
def test_a_full_disk_leaves_the_old_and_says_so_in_one_sentence(tmp_path: Path) -> None:
    old = make_old(tmp_path / "out")
    lines = run(str(HERE / "full_disk.py"), str(tmp_path / "out")).splitlines()
    assert [line.split(":")[0] for line in lines] == ["writer", "plain", "library", "file"]
    for line in lines:
        assert f"Could not write '{tmp_path / 'out'}" in line and "File too large" in line and "GB free" in line
    assert tree(tmp_path / "out") == old and os.listdir(tmp_path) == ["out"] and not hidden(tmp_path / "out")


@linux_only
def test_a_really_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        old = make_old(small / "out")
        with pytest.raises(RuntimeError, match="No space left on device") as caught:
            with atomic_directory(small / "out", overwrite=True) as directory:
                (directory / "big").write_bytes(bytes(2_000_000))
        assert "\n" not in str(caught.value)
        assert tree(small / "out") == old and os.listdir(small) == ["out"]
        for call in (check_output_dir, lambda path, **_: atomic_directory(path).__enter__()):
            with pytest.raises(ValueError, match="mount point"):
                call(small, overwrite=True)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_everything_is_on_disk_before_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, os.rename

    def spy_flush(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        flush(descriptor)

    def spy_rename(source: Path, target: Path) -> None:
        events.append("RENAME")
        rename(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", spy_flush)
    monkeypatch.setattr(os, "rename", spy_rename)
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("x")
    before, after = events[: events.index("RENAME")], events[events.index("RENAME") + 1 :]
    assert {"x", "sub", directory.name} <= set(before) and after == [tmp_path.name]


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    atomic_write(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(tmp_path) == ["file.json"]
    with pytest.raises(IsADirectoryError):
        (tmp_path / "d").mkdir()
        atomic_write(tmp_path / "d", "x")
    assert sorted(os.listdir(tmp_path)) == ["d", "file.json"]


def test_a_file_in_a_directory_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the mode bits, which root may ignore: nothing may be written beside the file either."""
    (tmp_path / "file.json").write_text("old")
    tmp_path.chmod(0o500)
    monkeypatch.setattr(os, "access", allowed_by_mode)
    with pytest.raises(RuntimeError, match=r"No permission to write 'file\.json' in '.*'; .* make it writable\.$"):
        atomic_write(tmp_path / "file.json", "new")
    tmp_path.chmod(0o700)
    assert tree(tmp_path) == {"file.json": b"old"}
    atomic_write(tmp_path / "file.json", "new")
    assert tree(tmp_path) == {"file.json": b"new"}


def test_output_dir_refusals_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_old(tmp_path / "model")
    (tmp_path / "model" / "inner").mkdir()
    (tmp_path / "model" / "inner" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("model")
    before = sorted(map(str, tmp_path.rglob("*")))

    def refused(kind: type[Exception], reason: str, output: str | None, inputs: tuple[str, ...] = (), **options: bool):
        with pytest.raises(kind, match=reason) as caught:
            check_output_dir(output, inputs=inputs, **options)
        assert "\n" not in str(caught.value)

    for nothing in (None, "", "  "):
        refused(ValueError, "--output_dir", nothing)
    refused(FileExistsError, "is a file", "file")
    refused(FileExistsError, "is a file", "file", overwrite=True)
    refused(FileExistsError, "'.*file' is a file", "file/below")
    refused(FileExistsError, "not empty.*--overwrite", "model")
    for same in ("model", "./model", "link", str(tmp_path / "model"), "model/../model"):
        refused(ValueError, "also an input", same, ("owner/hub-name", "model"), overwrite=True)
        refused(ValueError, "also an input", same, ("model",))
    refused(ValueError, "delete the input", "model", ("model/inner",), overwrite=True)
    refused(ValueError, "working directory", ".", overwrite=True)
    refused(ValueError, "delete your working directory", str(tmp_path.parent), overwrite=True)
    monkeypatch.setenv("HOME", str(tmp_path / "model" / "inner"))
    refused(ValueError, "home", "model", overwrite=True)
    monkeypatch.delenv("HOME")
    assert check_output_dir("model", overwrite=True) == Path("model")
    assert check_output_dir("model/below", inputs=("model",)) == Path("model/below")
    assert check_output_dir("new/deep", inputs=("model", "owner/name")) == Path("new/deep")
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_output_dir_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", allowed_by_mode)
    tmp_path.chmod(0o500)
    with pytest.raises(RuntimeError, match="No permission"):
        check_output_dir(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_a_saved_model_replaces_the_old_one(tmp_path: Path) -> None:
    """What `save_pretrained` and `torch.save` write inside the block is moved with the rest."""
    for value in (1.0, 2.0):
        with atomic_directory(tmp_path / "out", overwrite=True) as directory:
            torch.save(torch.tensor(value), directory / "t.pt")
    assert torch.load(tmp_path / "out" / "t.pt").item() == 2.0
    shutil.rmtree(tmp_path / "out")
