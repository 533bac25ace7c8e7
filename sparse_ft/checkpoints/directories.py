"""Write directories and files so that a crash, a full disk or `kill -9` never leaves half of one.

A directory is written beside its target under a hidden name, flushed to disk, then moved to its name in one step of the
file system. Where the target exists, Linux exchanges the two (`renameat2`); elsewhere the old one is first set aside,
and put back by the next call if the process died between the two moves.

    with atomic_directory("out", overwrite=True) as directory:
        model.save_pretrained(directory)

The hidden name says which process made it (host, process id, start time), and the process holds a lock on it: what a
dead process left behind is removed by the next call for the same target, what a live one is writing never is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import socket
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends without an error.

    Args:
        target: the directory to make. It may exist if it is empty. A link is followed, and its target replaced.
        overwrite: replace a directory that is not empty, as a whole: nothing of the old one stays. Until the block
            has ended the old one is untouched, and at every moment one of the two is whole at `target`.

    Yields:
        The directory to write into, on the same file system as the target.

    Raises:
        FileExistsError: if the target is a file, or not empty without `overwrite`.
        RuntimeError: if the disk is full; the target is as it was.
    """
    target = Path(os.path.realpath(target))
    recover_directory(target)
    _check_replaceable(target, overwrite)
    made_parents = _make_parents(target.parent)
    temporary = _hidden_name(target, "partial")
    published = False
    try:
        temporary.mkdir()
        with _locked(temporary), _one_sentence_if_full(target):
            yield temporary
            _flush_tree(temporary)
            _publish(temporary, target, overwrite)
            published = True
    finally:
        # After an exchange this name holds the old directory; after a failure, what was written so far.
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in [] if published else made_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write a whole file, so that `path` holds either its old content or the new one.

    Args:
        path: the file; its directory must exist. A link is followed.
        content: bytes, or text written as UTF-8.

    Raises:
        RuntimeError: if the disk is full or the directory cannot be written to; the file is as it was.
    """
    path = Path(os.path.realpath(path))
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK | os.X_OK):
        raise RuntimeError(
            f"No permission to write '{path.name}' in '{path.parent}'; copy the directory, or make it writable."
        )
    _remove_leftovers(path)
    temporary = _hidden_name(path, "partial")
    try:
        with _one_sentence_if_full(path):
            with open(temporary, "xb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_dir(
    output_dir: str | Path | None, *, inputs: Sequence[str | Path] = (), overwrite: bool = False
) -> Path:
    """Refuse, before any work, a place where a result cannot or should not be written. Nothing is created.

    Args:
        output_dir: where the result will go.
        inputs: directories the command reads; Hub names among them are ignored.
        overwrite: a directory that is not empty may be replaced.

    Returns:
        `output_dir` as a Path.

    Raises:
        ValueError: if none is given, it is one of the inputs, replacing it would delete an input, or it holds the
            working directory or the home directory.
        FileExistsError: if it is a file, or not empty without `overwrite`.
        RuntimeError: if it cannot be written to.
    """
    if output_dir is None or not str(output_dir).strip():
        raise ValueError("No output directory was given; name one with --output_dir.")
    path = Path(output_dir)
    real = Path(os.path.realpath(path))
    for source in inputs:
        read = Path(os.path.realpath(source))
        if not os.path.exists(source):
            continue
        if real == read:
            raise ValueError(f"The output directory '{path}' is also an input; give another --output_dir.")
        if real in read.parents and overwrite:
            raise ValueError(f"Overwriting '{path}' would delete the input '{source}' inside it; give another one.")
    _check_replaceable(real, overwrite)
    existing = next(place for place in real.parents if place.exists())
    if not existing.is_dir():
        raise FileExistsError(f"'{path}' cannot be made because '{existing}' is a file; give another --output_dir.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RuntimeError(f"No permission to write in '{existing}'; give another --output_dir.")
    return path


def recover_directory(target: str | Path) -> None:
    """Clear what dead processes left beside `target`, after putting back an old directory that one of them had set
    aside and not yet replaced."""
    target = Path(os.path.realpath(target))
    for aside in _leftovers(target, "old"):
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                os.rename(aside, target)
    _remove_leftovers(target)


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"The output '{target}' is a file; give a directory.")
    if os.path.ismount(target):
        raise ValueError(_mount_message(target))
    if target == Path.cwd():
        raise ValueError(f"'{target}' is the working directory and cannot be replaced; give a directory inside it.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"The output directory '{target}' is not empty; give another one, or pass --overwrite to replace it."
        )
    for name, precious in (("working", Path.cwd()), ("home", Path.home())):
        if target == precious or target in precious.parents:
            raise ValueError(f"Overwriting '{target}' would delete your {name} directory; give another --output_dir.")


def _mount_message(target: Path) -> str:
    return f"'{target}' is a mount point and cannot be replaced as a whole; give a directory inside it."


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the finished directory its name."""
    try:
        os.rename(temporary, target)  # also replaces an empty directory
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EXDEV):  # a bind mount looks like any directory until now
            raise ValueError(_mount_message(target)) from None
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not overwrite:
            raise FileExistsError(
                f"'{target}' was filled by someone else in the meantime; give another --output_dir."
            ) from None
        if not _exchange(temporary, target):
            _replace_in_two_steps(temporary, target)
    _flush(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one step; False where the system or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    """Set the old directory aside, then move the new one in. `recover_directory` repairs a death in between."""
    aside = _hidden_name(target, "old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _make_parents(directory: Path) -> list[Path]:
    """Create a directory and its parents; the ones that were made, innermost first."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _hidden_name(target: Path, role: str) -> Path:
    pid = os.getpid()
    token = os.urandom(3).hex()  # two threads of one process may write to the same target
    return target.with_name(f".{target.name}.{role}-{_host()}-{pid}-{_start_time(pid) or 0}-{token}")


def _leftovers(target: Path, role: str) -> list[Path]:
    """What dead processes left beside the target in this role."""
    pattern = re.compile(re.escape(f".{target.name}.{role}-") + r"([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{6}")
    try:
        paths = [target.with_name(name) for name in sorted(os.listdir(target.parent))]
    except OSError:
        return []
    return [path for path in paths if (match := pattern.fullmatch(path.name)) and _is_dead(path, *match.groups())]


def _is_dead(path: Path, host: str, pid: str, start_time: str) -> bool:
    return host == _host() and not _alive(int(pid), int(start_time)) and not _is_locked(path)


def _remove_leftovers(target: Path) -> None:
    for role in ("partial", "old"):
        for leftover in _leftovers(target, role):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(pid: int, start_time: int) -> bool:
    """Whether the process that started at `start_time` still runs; process ids are used again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = _start_time(pid)
    return now is None or start_time == 0 or now == start_time


def _start_time(pid: int) -> int | None:
    """Clock ticks between boot and the start of a process; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory that ends with the process. It protects the directory from processes that cannot see
    ours (another container on the same volume); where the file system has no locks the process id alone decides."""
    descriptor = _lock(directory)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: str | Path) -> int | None:
    """A locked file descriptor; None if another process holds the lock or locks are not to be had here."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_locked(path: str | Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _flush_tree(directory: Path) -> None:
    """Force every file and directory below, and the directory itself, to disk, readable as any new file is.

    safetensors writes files that only their owner can read.
    """
    mode = 0o666 & ~_umask()
    for parent, _, files in os.walk(directory):
        for name in files:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(path.stat().st_mode | mode)
                _flush(path)
        _flush(Path(parent))


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a directory; a real write error has another number.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_sentence_if_full(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise RuntimeError(_full_message(target, os.strerror(error.errno))) from error
    except SafetensorError as error:
        # The library writes from Rust and reports the system's number in its text only.
        code = re.search(r"os error (\d+)", str(error))
        if code is None or int(code[1]) not in _NO_SPACE:
            raise
        raise RuntimeError(_full_message(target, os.strerror(int(code[1])))) from error


def _full_message(target: Path, reason: str) -> str:
    free = shutil.disk_usage(target.parent).free
    return (
        f"Could not write '{target}': {reason} ({free / 1e9:.2f} GB free); "
        f"nothing was changed there, so free some space and run it again."
    )
