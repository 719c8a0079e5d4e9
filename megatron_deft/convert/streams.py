"""Tensors to and from plain files, a block at a time: nothing is mapped, nothing is copied.

A memory-mapped file was rejected: every page of it that was touched counts as resident memory until
the file is unmapped, so a model of 16 GB would seem to need 16 GB.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_deft.errors import UserError

BLOCK = 16 * 2**20  # bytes of one system call
AHEAD = 256 * 2**20  # bytes the disk is asked for while what was read is worked on

# What is told about a file: its path, and up to which byte it was read or written.
Reached = Callable[[Path, int], None]


def nothing_follows(path: Path, end: int) -> None:
    """A `Reached` for files that nobody follows."""


def progress_bar(what: str, total: int, shown: bool = True) -> "tqdm[None]":
    """A bar of `total` bytes on a terminal; nothing elsewhere."""
    disable = None if shown else True
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=disable, leave=False)


class Sized(Protocol):
    """Something that becomes part of a file."""

    @property
    def bytes(self) -> int:
        """How much of it."""


T = TypeVar("T", bound=Sized)


def by_file(items: Sequence[T], limit: int) -> list[list[T]]:
    """`items` in their order, file by file of at most `limit` bytes; a larger one has its own."""
    files: list[list[T]] = [[]]
    size = 0
    for item in items:
        if files[-1] and size + item.bytes > limit:
            files.append([])
            size = 0
        files[-1].append(item)
        size += item.bytes
    return files


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, for reading and writing.

    torch.uint8 stands between, as neither numpy nor Python know bf16.
    """
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def read_into(tensor: Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous `tensor` with the bytes of `path` from `offset` on.

    Errors: UserError when the file ends before the tensor does.
    """
    if not tensor.numel():
        return
    data, done = bytes_of(tensor), 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while done < len(data):
            count = os.preadv(descriptor, [data[done : done + BLOCK]], offset + done)
            if not count:
                raise UserError(
                    f"{path} ends at byte {offset + done}, {len(data) - done} bytes too early: "
                    "it is damaged, get it again"
                )
            done += count
        if hasattr(os, "posix_fadvise"):  # what lies next is mostly what is wanted next
            os.posix_fadvise(descriptor, offset + done, AHEAD, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


class Output:
    """A new file that is written front to back, whose followers are told how far it is.

    Has the `write` that torch.save wants, which answers its errors with one of its own: `error` is
    the first. Errors: OSError naming the file, such as a full disk.
    """

    def __init__(self, path: Path, reached: Reached, bar: "tqdm[None]") -> None:
        self.path, self._reached, self._bar = path, reached, bar
        self._handle = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self.end = 0
        self.error: BaseException | None = None

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def write(self, data: bytes | memoryview) -> int:
        """Append `data` without copying it."""
        try:
            for start in range(0, len(data), BLOCK):
                self._append(memoryview(data)[start : start + BLOCK])
        except BaseException as error:
            self.error = error
            raise
        return len(data)

    def _append(self, block: memoryview) -> None:
        while block:
            try:
                count = self._handle.write(block)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            block = block[count:]
            self.end += count
            self._bar.update(count)
        self._reached(self.path, self.end)

    def flush(self) -> None:
        """Nothing is kept back; torch.save asks all the same."""


class Section(io.RawIOBase):
    """The `length` bytes of an open file from `start` on, as a file of their own, to be read.

    torch.distributed.checkpoint's own view was rejected: it seeks past the end when asked to seek
    backwards from it, which is how a zip file is opened.
    """

    def __init__(self, handle: BinaryIO, start: int, length: int) -> None:
        self._handle, self._start, self._length = handle, start, length
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The new position, bytes from the section's start."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} lies before the section")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """The position, bytes from the section's start."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the front of `buffer`; the number of bytes read, 0 at the end."""
        room = max(0, min(len(buffer), self._length - self._at))
        self._handle.seek(self._start + self._at)
        count = self._handle.readinto(memoryview(buffer)[:room])  # type: ignore[attr-defined]
        self._at += count
        return int(count)
