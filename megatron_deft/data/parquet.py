"""Parquet files: row groups cut into tasks by rows."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_deft.data.jsonl import slices
from megatron_deft.data.task import Items, RowError, Task, one_line, stamp
from megatron_deft.errors import UserError

_ROWS_AT_ONCE = 512


class Parquet:
    """A parquet file."""

    unit, first = "row", 0

    @staticmethod
    def columns(path: Path) -> list[str]:
        """Its columns. Errors: UserError when the file is damaged or has no rows."""
        with _open(path) as file:
            if file.metadata.num_rows == 0:
                raise UserError(f"{path}: the file has no rows")
            return list(file.schema_arrow.names)

    @staticmethod
    def cut(path: Path, columns: Sequence[str] = ()) -> list[Task]:
        """Tasks of rows of one row group each; of about TASK_BYTES in `columns` (() is all)."""
        tasks: list[Task] = []
        with _open(path) as file:
            first = 0
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                size = _size(group, columns)
                tasks += slices(str(path), group.num_rows, size, first=first, group=index)
                first += group.num_rows
        return tasks

    @staticmethod
    def rows(task: Task, columns: Sequence[str]) -> Items:
        """The rows of the task, with those of `columns` that the file has."""
        table = read_group(task.file, stamp(task.file), task.group, tuple(columns))
        count = task.stop - task.start
        for start in range(0, count, _ROWS_AT_ONCE):
            yield from _read(table.slice(task.skip + start, min(_ROWS_AT_ONCE, count - start)))

    @staticmethod
    def count(task: Task) -> int:
        """Rows of the task."""
        return task.stop - task.start

    @staticmethod
    def before(task: Task) -> int:
        """Rows of the file before the task."""
        return task.start


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: not a whole parquet file ({one_line(error)}): make it again"
        ) from error


def _size(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """Uncompressed bytes of `columns` in a row group, of all when there are none."""
    stored = [group.column(index) for index in range(group.num_columns)]
    return sum(
        column.total_uncompressed_size
        for column in stored
        if not columns or column.path_in_schema.split(".")[0] in columns
    )


@lru_cache(maxsize=1)  # tasks come in order, so a worker mostly stays in its row group
def read_group(file: str, stamp: tuple[int, int], group: int, columns: tuple[str, ...]) -> pa.Table:
    """A row group's `columns`. Errors: UserError when it cannot be read."""
    del stamp  # a file that has changed is read again
    with _open(Path(file)) as source:
        present = [name for name in source.schema_arrow.names if name in columns]
        try:
            return source.read_row_group(group, columns=present or None)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{file} row group {group}: not readable ({one_line(error)}): write the file "
                "again, with small row groups"
            ) from error


def _read(block: pa.Table) -> list[dict[str, Any] | RowError]:
    try:
        return list(block.to_pylist())
    except UnicodeDecodeError:  # which row?
        return [_read_one(block.slice(index, 1)) for index in range(len(block))]


def _read_one(row: pa.Table) -> dict[str, Any] | RowError:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 ({one_line(error)}): write the file again", "invalid UTF-8")
