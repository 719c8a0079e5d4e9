"""Files and folders that appear whole or not at all: temporary name, fsync, rename."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any

from megatron_deft.errors import UserError


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk. Errors: OSError naming it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # a full disk may be noticed here only
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A hidden sibling of `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def require_space(path: str | Path, needed: int) -> None:
    """Errors: UserError when the disk that `path` is to be written on has less than `needed` bytes.

    `path` need not exist, nor its parents.
    """
    path = Path(path).absolute()
    # Not of `path` itself: another writer may be replacing it.
    disk = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"{path} needs {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left: "
            "free some, or name a folder on another disk"
        )


def read_json(path: Path, missing: str, remedy: str) -> Any:
    """The JSON in a file. Errors: UserError `missing`; or that it is none, with the `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(missing) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number without end
        raise UserError(f"{path} is not readable JSON ({error}): {remedy}") from None


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` only when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_folder(
    temporary: Path, path: Path, overwrite: bool = False, marker: str | None = None
) -> None:
    """Flush everything below `temporary`, then give it its final name.

    What is to be replaced is moved aside first and deleted after, so that at every moment one of
    the two is whole under a name of its own. Several writers of one `path` take turns.

    Args:
        overwrite, marker: see atomic_folder.

    Errors: UserError when something has that name by now and is not to be replaced.
    """
    for entry in sorted(temporary.rglob("*")):
        fsync_path(entry)
    fsync_path(temporary)
    retired: list[Path] = []
    while not _renamed(temporary, path):
        if not (overwrite and _may_be_replaced(path, marker)):
            remedy = "" if overwrite else ", or pass --overwrite"
            raise UserError(
                f"{path} has appeared while it was being written here: it is left as it is, and "
                f"what was written is removed: choose another name{remedy}"
            )
        retired.append(_new_folder(path, "old"))
        with suppress(FileNotFoundError):  # another writer was faster
            os.rename(path, retired[-1])
    fsync_path(path.parent)
    for folder in retired:
        shutil.rmtree(folder, ignore_errors=True)  # the next call tries again


def _renamed(folder: Path, path: Path) -> bool:
    """Give `folder` the name `path` unless that is taken by more than an empty folder."""
    try:
        os.rename(folder, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _may_be_replaced(path: Path, marker: str | None) -> bool:
    return not path.exists() or marker is None or (path / marker).exists()


@contextmanager
def atomic_folder(
    path: str | Path, overwrite: bool = False, needs: int = 0, marker: str | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` only when the block succeeds.

    What earlier processes left behind when they were killed is removed first. A `path` that is a
    link stays one: all this happens where it leads.

    Args:
        path: the final name.
        overwrite: replace the folder of that name.
        needs: bytes that the block will write.
        marker: the file that a folder must have to be replaced at the end; None asks for none.

    Errors: UserError when `path` exists and `overwrite` is false, at the start or at the end, when
    it is a file, or when the disk is too full.
    """
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists already: remove it, choose another, or pass --overwrite")
    if Path(path).is_file():
        raise UserError(f"{path} is a file: remove it, or choose another name")
    path = Path(os.path.realpath(path))
    remove_abandoned(path, "tmp")
    require_space(path, needs)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_folder(path, "tmp")
    held = os.open(temporary, os.O_RDONLY)
    try:
        lock(held)
        yield temporary
        publish_folder(temporary, path, overwrite, marker)
        remove_abandoned(path, "old")
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def _new_folder(path: Path, kind: str) -> Path:
    """Make a hidden sibling of `path` under a name that is free.

    On a shared disk that of our pid may be taken: each container counts its processes from 1.
    """
    for number in count():
        suffix = f"-{number}" if number else ""
        folder = path.with_name(f".{path.name}.{kind}-{os.getpid()}{suffix}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there is always a next number")


def lock(descriptor: int) -> bool | None:
    """Whether this process got hold of the open folder, until it closes it or dies.

    False: another process holds it. None: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def hold_folder(folder: str | Path, key: str, patience: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder, made if absent, until the block ends or we die.

    By a lock of the process on a file in it, which names us. Processes that are forked meanwhile,
    and may outlive this one by seconds, do not have it. Where the file system knows no locks nobody
    is kept out.

    patience: seconds to wait for another that is about to end

    Errors: UserError when another process holds it, naming `key`.
    """
    path = Path(folder) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with open(path, "a+", encoding="utf-8") as handle:
        while _is_held(handle):
            if time.monotonic() >= deadline:
                handle.seek(0)
                who = handle.read().strip() or "another process"
                raise UserError(
                    f"{key}={folder} is written by {who} at this moment: wait for it, or end it, "
                    f"or choose another {key}"
                )
            time.sleep(0.5)
        with suppress(OSError):  # a full disk
            handle.truncate(0)
            os.write(handle.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _is_held(handle: IO[Any]) -> bool:
    """Whether another process has the lock of an open file; we have it now if not."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def remove_abandoned(path: Path, kind: str) -> None:
    """Remove the `kind` ("tmp", "old") folders of `path` whose process was killed.

    Two signs are asked for, as each alone can deceive: the process may run on another machine that
    shares the disk, and a file system may know no locks. Our own pid is no sign: who has it is
    another container, or was.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{kind}-(\d+)(-\d+)?")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(entry.name)
        if match and entry.is_dir() and not _is_another(int(match[1])) and _unlocked(entry):
            shutil.rmtree(entry, ignore_errors=True)


def _unlocked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # another user's, or just removed
        return False
    try:
        return lock(descriptor) is True
    finally:
        os.close(descriptor)


def _is_another(pid: int) -> bool:
    """Whether another process of this machine has that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
