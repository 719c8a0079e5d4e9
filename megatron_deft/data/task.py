"""A piece of a source file that one worker reads at a time, and a row that cannot be used."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_deft.errors import UserError

TASK_BYTES = 1 << 21  # about how much of a file a task has; a part of the work, and of memory
TASK_ROWS = 2048


@dataclass(frozen=True)
class Task:
    """Rows of `file`: lines that start at bytes [start, stop), or rows [start, stop).

    Tasks depend on the file alone, never on how many workers share them.

    bytes: about how much is read. limit: only so many rows. group, skip: of parquet, the row group
    and the rows of it before `start`.
    """

    file: str
    start: int
    stop: int
    bytes: int
    limit: int | None = None
    group: int = 0
    skip: int = 0


class RowError(UserError):
    """A row that cannot be used. `reason` is what rows of the same fault have in common."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


# Each row of a task, or why it cannot be read; None for a line that is empty.
Item = Mapping[str, Any] | RowError | None
Items = Iterator[Item]


def stamp(file: str) -> tuple[int, int]:
    """Size and time of the last change of a file: another one, and it is another file."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def one_line(error: BaseException) -> str:
    """The text of an error without line ends."""
    return " ".join(str(error).split())
