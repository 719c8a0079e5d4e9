"""JSON files: lines cut into tasks by bytes, or one array of objects."""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_deft.data.task import TASK_BYTES, TASK_ROWS, Items, RowError, Task, one_line, stamp
from megatron_deft.errors import UserError

_ARRAY_LIMIT = 1 << 30  # bytes of a file that has to be read whole
_LOOKED_AT = 100  # lines whose columns count as the file's
_BOM = b"\xef\xbb\xbf"
_ONE_PER_LINE = "one object per line is expected, or one array of them in a .json file"


class Lines:
    """A file of one JSON object per line."""

    unit, first = "line", 1

    @staticmethod
    def columns(path: Path) -> list[str]:
        """Columns of the first lines. Errors: UserError when there are none that can be read."""
        found: dict[str, None] = {}
        fault: UserError | None = None
        lines = (item for task in Lines.cut(path) for item in Lines.rows(task, ()))
        for number, item in enumerate(islice(lines, _LOOKED_AT), 1):
            if isinstance(item, RowError):
                fault = fault or UserError(f"{path} line {number}: {item}")
            elif item is not None:
                found |= dict.fromkeys(item)
        if not found:
            raise fault or UserError(f"{path}: the file has no rows")
        return list(found)

    @staticmethod
    def cut(path: Path, columns: Sequence[str] = ()) -> list[Task]:
        """Tasks of about TASK_BYTES."""
        del columns  # a line is parsed whole
        size = path.stat().st_size
        stops = [*range(TASK_BYTES, size, TASK_BYTES), size]
        starts = [0, *stops[:-1]]
        return [Task(str(path), a, b, b - a) for a, b in zip(starts, stops, strict=True)]

    @staticmethod
    def rows(task: Task, columns: Sequence[str]) -> Items:
        """The lines that start in the task."""
        del columns
        return map(_parsed, _lines_of(task))

    @staticmethod
    def count(task: Task) -> int:
        """Rows of the task."""
        return sum(bool(line.strip()) for line in _lines_of(task))

    @staticmethod
    def before(task: Task) -> int:
        """Lines of the file that start before the task."""
        count, left = min(task.start, 1), task.start - 1
        with open(task.file, "rb") as file:
            while left > 0 and (block := file.read(min(left, TASK_BYTES))):
                count += block.count(b"\n")
                left -= len(block)
        return count


def _lines_of(task: Task) -> Iterator[bytes]:
    with open(task.file, "rb") as file:
        position = task.start
        if position:  # a line that started before is another task's
            file.seek(position - 1)
            position += len(file.readline()) - 1
        while position < task.stop and (line := file.readline()):
            yield line if position else line.removeprefix(_BOM)
            position += len(line)


def _parsed(line: bytes) -> dict[str, Any] | RowError | None:
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 ({one_line(error)}): write the file again", "invalid UTF-8")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON ({one_line(error)}): {_ONE_PER_LINE}", "not JSON")
    return _checked(row)


def _checked(row: Any) -> dict[str, Any] | RowError:
    if isinstance(row, dict):
        return row
    kind = type(row).__name__
    return RowError(f"expected a JSON object, got {kind}: {_ONE_PER_LINE}", "not a JSON object")


class Array:
    """A file that is one JSON array of objects. It is read whole, once by each worker."""

    unit, first = "item", 0

    @staticmethod
    def columns(path: Path) -> list[str]:
        """Columns of the first items. Errors: UserError when the file is no array of objects."""
        rows = [_checked(row) for row in _array(str(path))[:_LOOKED_AT]]
        found = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
        if not found:
            raise UserError(f"{path}: the file has no rows")
        return list(found)

    @staticmethod
    def cut(path: Path, columns: Sequence[str] = ()) -> list[Task]:
        """Tasks of about TASK_BYTES, and TASK_ROWS at the most."""
        del columns
        count, size = len(_array(str(path))), path.stat().st_size
        return slices(str(path), count, size)

    @staticmethod
    def rows(task: Task, columns: Sequence[str]) -> Items:
        """The items of the task."""
        del columns
        return map(_checked, _array(task.file)[task.start : task.stop])

    @staticmethod
    def count(task: Task) -> int:
        """Rows of the task."""
        return task.stop - task.start

    @staticmethod
    def before(task: Task) -> int:
        """Items of the file before the task."""
        return task.start


def slices(
    file: str, count: int, size: int, *, first: int = 0, group: int = 0, most: int = TASK_ROWS
) -> list[Task]:
    """Tasks for `count` rows of `size` bytes in all; `first` rows of the file come before."""
    step = max(1, min(most, TASK_BYTES * count // max(size, 1)))
    return [
        Task(
            file,
            first + start,
            first + min(start + step, count),
            size * (min(start + step, count) - start) // count,
            group=group,
            skip=start,
        )
        for start in range(0, count, step)
    ]


def is_array(path: Path) -> bool:
    """Whether the first character of a file, white space aside, opens an array."""
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["


def _array(file: str) -> list[Any]:
    return read_array(file, stamp(file))


@lru_cache(maxsize=1)
def read_array(file: str, stamp: tuple[int, int]) -> list[Any]:
    """The items of a file that is one array. Errors: UserError when it is too large or none."""
    size = stamp[0]
    if size > _ARRAY_LIMIT:
        raise UserError(
            f"{file}: one array of {size / 1e9:.1f} GB, and each worker would read it whole: make "
            f"it lines first (jq -c '.[]' {file} > {Path(file).with_suffix('.jsonl')})"
        )
    try:
        found = json.loads(Path(file).read_bytes().removeprefix(_BOM).decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8
        raise UserError(f"{file}: not a JSON array ({one_line(error)}): mend the file") from error
    assert isinstance(found, list)
    return found
