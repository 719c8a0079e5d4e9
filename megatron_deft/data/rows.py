"""Rows of parquet and JSON files: which columns there are, which format they have, each row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megatron_deft.data.jsonl import Array, Lines, is_array, read_array
from megatron_deft.data.parquet import Parquet, read_group
from megatron_deft.data.task import Items, RowError, Task
from megatron_deft.errors import UserError

Row = tuple[str, Mapping[str, Any]]  # where it stands ("FILE row 7"), and its columns
Source = type[Lines] | type[Array] | type[Parquet]
_ENDINGS = (".parquet", ".jsonl", ".json")
_PACKED = {".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}


class Columns(Protocol):
    """The settings that say which columns are read; of a configuration, or RowSettings."""

    @property
    def format(self) -> str: ...  # noqa: D102
    @property
    def prompt_key(self) -> str: ...  # noqa: D102
    @property
    def response_key(self) -> str: ...  # noqa: D102
    @property
    def messages_key(self) -> str: ...  # noqa: D102
    @property
    def use_original_prompt(self) -> bool: ...  # noqa: D102


def option(name: str) -> str:
    """A setting as it is written in a configuration and on the command line."""
    return f"data.{name} (--{name.replace('_', '-')})"


def detect_format(cfg: Columns, files: Sequence[str]) -> str:
    """One of "columns", "messages", "text": cfg.format, or for "auto" what the first file fits.

    "auto" never means "text". A JSON file's columns are those of its first 100 rows.

    Errors: UserError when a file is missing, empty or lacks a column (naming those it has), and for
    "auto" when both formats fit, since a guess could train on another prompt than the one meant.
    """
    wanted = {"columns": {cfg.prompt_key, cfg.response_key}, "messages": {cfg.messages_key}}
    keys = {
        "columns": f"{option('prompt_key')} and {option('response_key')}",
        "messages": option("messages_key"),
    }
    if cfg.format == "text":
        wanted, keys = {"text": {getattr(cfg, "text_key", "text")}}, {"text": option("text_key")}
    present = {file: _source(file).columns(Path(file)) for file in files}
    form = _guess(cfg, files[0], present[files[0]], wanted) if cfg.format == "auto" else cfg.format
    for file, columns in present.items():
        missing = sorted(wanted[form] - set(columns))
        if missing:
            other = "" if form == "text" else f", or {option('format')}"
            raise UserError(
                f"{file}: no column {', '.join(missing)}, it has {', '.join(columns)}: set "
                f"{keys[form]}{other}"
            )
    return form


def _guess(cfg: Columns, file: str, present: Sequence[str], wanted: Mapping[str, set[str]]) -> str:
    fits = [name for name, keys in wanted.items() if keys <= set(present)]
    if cfg.use_original_prompt:  # only columns have an original prompt
        fits = [name for name in fits if name == "columns"]
    if len(fits) != 1:
        problem = "columns of both formats fit" if fits else "no format fits"
        raise UserError(
            f"{file}: {problem}, it has {', '.join(present)}: set {option('format')} to columns "
            f"(reads {', '.join(sorted(wanted['columns']))}) or messages (reads "
            f"{cfg.messages_key}), or the key{'s' if fits else ''} that name yours: "
            f"{option('prompt_key')}, {option('response_key')}, {option('messages_key')}"
        )
    return fits[0]


def cut(files: Iterable[str], columns: Sequence[str] = (), limit: int | None = None) -> list[Task]:
    """The tasks of all files, in order; together they have every row, or the first `limit`.

    columns: those that will be read, by whose size parquet files are cut; () is all.

    Errors: UserError for a file that is missing, of an unknown kind, or damaged.
    """
    tasks = [task for file in files for task in _source(file).cut(Path(file), columns)]
    if limit is None:
        return tasks
    kept: list[Task] = []
    for task in tasks:
        if limit <= 0:
            break
        kept.append(replace(task, limit=limit))
        limit -= _source(task.file).count(task)
    return kept


def read_task(task: Task, columns: Iterable[str], optional: Iterable[str] = ()) -> Items:
    """Each row of a task, a RowError in place of one that cannot be used, None for an empty line.

    A row without one of `columns` is such an error; `optional` columns are read where they are.
    """
    needed = sorted(set(columns))
    left = task.limit
    for item in _source(task.file).rows(task, [*needed, *optional]):
        if left is not None and item is not None:
            if not left:
                return
            left -= 1
        if isinstance(item, Mapping):
            missing = [column for column in needed if column not in item]
            if missing:
                lacks = ", ".join(missing)
                has = ", ".join(item) or "none"
                item = RowError(f"no {lacks}, it has {has}", f"no column {lacks}")
        yield item


def place(task: Task, index: int, before: int | None = None) -> str:
    """Where the task's row of that number stands, such as "FILE line 7"; lines are numbered from 1.

    before: rows or lines of the file before the task, counted by reading them unless given.
    """
    source = _source(task.file)
    return _place(source, task.file, index + (source.before(task) if before is None else before))


def _place(source: Source, file: str, index: int) -> str:
    return f"{file} {source.unit} {source.first + index}"


def read_rows(files: Iterable[str], columns: Iterable[str]) -> Iterator[Row]:
    """Every row of `files` in order, with at least `columns`.

    Errors: UserError for the first row that cannot be read or lacks a column, naming its place.
    """
    needed = list(columns)
    for file in files:
        source, index = _source(file), -1
        for item in (
            item for task in source.cut(Path(file), needed) for item in read_task(task, needed)
        ):
            index += 1
            if isinstance(item, RowError):
                raise UserError(f"{_place(source, file, index)}: {item}") from item
            if item is not None:
                yield _place(source, file, index), item


def _source(file: str) -> Source:
    path = Path(file)
    if path.is_dir():
        raise UserError(f"{file} is a folder: name its files, such as {path / '*.parquet'}")
    if path.suffix in _PACKED:
        raise UserError(
            f"{file} is packed: unpack it first ({_PACKED[path.suffix]} {file}), since files are "
            "read in parts"
        )
    if path.suffix not in _ENDINGS:
        raise UserError(f"{file}: the name must end in one of {', '.join(_ENDINGS)}")
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    if path.suffix == ".parquet":
        return Parquet
    return Array if path.suffix == ".json" and is_array(path) else Lines


def release() -> None:
    """Let go of the file that was read last, of which a good part may be in memory."""
    read_array.cache_clear()
    read_group.cache_clear()


def strings(value: Any) -> Iterator[str]:
    """Every string inside a column's value, such as the contents and roles of `messages`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
