"""Rows of parquet and JSONL files: which columns there are, which format they have, each row."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.config import DataConfig

Row = tuple[str, Mapping[str, Any]]  # where it stands ("FILE row 7"), and its columns
_ROWS_AT_ONCE = 1024


def detect_format(cfg: "DataConfig", files: Sequence[str]) -> str:
    """Either "columns" or "messages": cfg.format, or for "auto" what the first file fits.

    Errors: UserError when a file is missing, empty or lacks a column (naming those it has), and for
    "auto" when both formats fit, since a guess could train on another prompt than the one meant.
    """
    wanted = {"columns": {cfg.prompt_key, cfg.response_key}, "messages": {cfg.messages_key}}
    present = {file: _reader(file).columns(Path(file)) for file in files}
    first = files[0]
    form: str = cfg.format
    if form == "auto":
        fits = [name for name, keys in wanted.items() if keys <= set(present[first])]
        if cfg.use_original_prompt:  # only columns have an original prompt
            fits = [name for name in fits if name == "columns"]
        if len(fits) != 1:
            problem = "columns of both formats fit" if fits else "no format fits"
            raise UserError(
                f"{first}: {problem}, it has {', '.join(present[first])}: set data.format to "
                f"columns (reads {', '.join(sorted(wanted['columns']))}) or messages (reads "
                f"{cfg.messages_key}), or the data.*_key that name{'s' if fits else ''} yours"
            )
        form = fits[0]
    keys = {"columns": "data.prompt_key and data.response_key", "messages": "data.messages_key"}
    for file, columns in present.items():
        missing = sorted(wanted[form] - set(columns))
        if missing:
            raise UserError(
                f"{file}: no column {', '.join(missing)}, it has {', '.join(columns)}: set "
                f"{keys[form]}, or data.format"
            )
    return form


def read_rows(files: Iterable[str], columns: Iterable[str]) -> Iterator[Row]:
    """Every row of `files` in order, with at least `columns` (a row without one is a UserError)."""
    needed = sorted(set(columns))
    for file in files:
        for where, row in _reader(file).rows(Path(file), needed):
            for column in needed:
                if column not in row:
                    raise UserError(f"{where}: no {column}, it has {', '.join(row)}")
            yield where, row


class _Reader(NamedTuple):
    columns: Callable[[Path], list[str]]
    rows: Callable[[Path, list[str]], Iterator[Row]]


def _parquet_columns(path: Path) -> list[str]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise UserError(
            f"{path}: not a whole parquet file ({_line(error)}): make it again"
        ) from error
    with file:
        if file.metadata.num_rows == 0:
            raise UserError(f"{path}: the file has no rows")
        return list(file.schema_arrow.names)


def _parquet_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    number = 0
    with pq.ParquetFile(path) as file:
        for block in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            for row in block.to_pylist():
                yield f"{path} row {number}", row
                number += 1


def _jsonl_columns(path: Path) -> list[str]:
    for _, row in _jsonl_rows(path, []):
        return list(row)
    raise UserError(f"{path}: the file has no rows")


def _jsonl_rows(path: Path, columns: list[str]) -> Iterator[Row]:
    del columns  # a line is parsed whole
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # bad JSON, bad UTF-8
                raise UserError(
                    f"{where}: not JSON ({_line(error)}): one object per line"
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            yield where, row


_JSONL = _Reader(_jsonl_columns, _jsonl_rows)
_READERS = {
    ".parquet": _Reader(_parquet_columns, _parquet_rows),
    ".jsonl": _JSONL,
    ".json": _JSONL,
}


def _reader(file: str) -> _Reader:
    path = Path(file)
    if path.suffix not in _READERS:
        raise UserError(f"{file}: the name must end in one of {', '.join(_READERS)}")
    if not path.is_file():
        raise UserError(f"{file}: no such file: check data.train_files and data.val_files")
    return _READERS[path.suffix]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def strings(value: Any) -> Iterator[str]:
    """Every string inside a column's value, such as the contents and roles of `messages`."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
