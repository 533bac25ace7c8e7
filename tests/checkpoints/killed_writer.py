"""Run as a program: replace a directory over and over, killed with SIGKILL at every line in turn.

    python killed_writer.py ROOT (exchange | two_steps | new | file)

Each round forks a child that replaces ROOT/target and dies at its k-th executed line of the library's code (or of the
`shutil` code it calls). The parent then checks that the target is whole, old or new, and that the next call repairs and
cleans up. It ends when a child gets through alive, and prints how many children were killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from light import load_directories

directories = load_directories()
TRACED = {directories.__file__, shutil.__file__, __file__}


def fill(directory: Path, version: str) -> None:
    (directory / "sub").mkdir()
    for name in ("a.bin", "b.bin", "sub/c.bin"):
        (directory / name).write_bytes(version.encode() * 2000)


def version_of(target: Path) -> str | None:
    """Which version is at the target; fails when it is a mixture or a part of one."""
    if not target.exists():
        return None
    files = [target] if target.is_file() else [target / name for name in ("a.bin", "b.bin", "sub/c.bin")]
    contents = {file.read_bytes() for file in files}
    assert len(contents) == 1, f"mixture at {target}"
    content = contents.pop().decode()
    version = content[:3]
    assert content == version * 2000, f"part of a file at {target}"
    return version


def replace(target: Path, mode: str, version: str) -> None:
    if mode == "file":
        directories.atomic_write(target, version * 2000)
        return
    with directories.atomic_directory(target, overwrite=True) as directory:
        fill(directory, version)


def die_at_line(count: int) -> None:
    """Send ourselves SIGKILL when the `count`-th line is about to run."""
    left = count

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in TRACED else None

    sys.settrace(tracer)


def killed_at(target: Path, mode: str, line: int) -> bool:
    """Whether a child replacing the target by "new" was killed at that line."""
    child = os.fork()
    if child == 0:
        die_at_line(line)
        replace(target, mode, "new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def main(root: Path, mode: str) -> None:
    target = root / "target"
    if mode == "two_steps":
        directories._exchange = lambda first, second: False
    seen: set[str | None] = set()
    line = 0
    while True:
        line += 1
        if mode != "new":
            replace(target, mode, "old")
        alive = not killed_at(target, mode, line)
        if mode == "two_steps":
            directories.recover_directory(target)
        seen.add(version_of(target))
        allowed = {None, "new"} if mode == "new" else {"old", "new"}
        assert version_of(target) in ({"new"} if alive else allowed), f"{version_of(target)} after line {line}"
        replace(target, mode, "end")
        assert os.listdir(root) == ["target"] and version_of(target) == "end", f"left behind: {os.listdir(root)}"
        if alive:
            break
        if mode == "new":
            shutil.rmtree(target)
    assert seen == allowed, "the kills did not fall on both sides of the switch"
    print(line - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
