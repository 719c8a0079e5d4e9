"""Files and folders that appear whole or not at all: temporary name, fsync, rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_deft.errors import UserError


def fsync_path(path: Path) -> None:
    """Flush one file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_beside(path: Path) -> Path:
    """A hidden sibling of `path`, on the same file system so that a rename is atomic."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


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


def publish_folder(temporary: Path, path: Path) -> None:
    """Flush everything below `temporary`, then give it its final name.

    An existing `path` is moved aside first and deleted after, so that at every moment one of the
    two is whole under a name of its own.
    """
    for entry in sorted(temporary.rglob("*")):
        fsync_path(entry)
    fsync_path(temporary)
    retired = None
    if path.exists():
        retired = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, retired)
    os.rename(temporary, path)
    fsync_path(path.parent)
    if retired is not None:
        shutil.rmtree(retired)


@contextmanager
def atomic_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` only when the block succeeds.

    Errors: UserError when `path` exists and `overwrite` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: remove it, choose another, or pass --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        publish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
