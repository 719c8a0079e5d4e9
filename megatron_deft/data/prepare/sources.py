"""Where the rows of a data set come from: local parquet and JSONL files, or the Hugging Face Hub.

Local files need neither a network nor `datasets`. A data set of the Hub is asked for once, with a
short time limit, before `datasets` is: that retries for half a minute where there is no network.
What it has in its cache is used without one.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_deft.data.rows import Found, columns_of_file, find_rows
from megatron_deft.errors import UserError

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_ENDINGS = (".parquet", ".jsonl", ".json")
_FOLDER_ENDINGS = (".parquet", ".jsonl")  # a .json in a folder is rather a description of it
_SECONDS_TO_REACH = 10
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Source:
    """Rows that are read as a stream, from the beginning with every call of `rows`.

    `rows(needed, optional)`: each with its place, or a RowError for one that lacks a needed column.

    `name` is the Hub's id, or None for local files. `columns` of each file, `total` rows, and
    `origin` for info.json: what exactly was read.
    """

    name: str | None
    columns: Mapping[str, Sequence[str]]
    total: int
    origin: list[dict[str, Any]]
    rows: Callable[[Sequence[str], Sequence[str]], Iterator[Found]]

    def has(self, column: str) -> bool:
        """Whether the first file has it."""
        return column in next(iter(self.columns.values()))

    def require(self, layouts: Mapping[str, Sequence[str]]) -> str:
        """The first of `layouts` (name -> columns) that every file has.

        Errors: UserError naming the columns there are and those needed.
        """
        for name, needed in layouts.items():
            if all(set(needed) <= set(columns) for columns in self.columns.values()):
                return name
        wanted = ", or ".join(", ".join(needed) for needed in layouts.values())
        fits = [set(needed) for needed in layouts.values()]
        for file, columns in self.columns.items():
            if not any(needed <= set(columns) for needed in fits):
                raise UserError(
                    f"{file}: it has the columns {', '.join(columns)}; needed: {wanted}"
                )
        raise UserError(
            f"{', '.join(self.columns)}: not all have the same columns; needed: {wanted}"
        )


def open_source(names: Sequence[str], command: str) -> Source:
    """Open local files and folders, or one data set of the Hub (its split `train`).

    Of a folder, as of a copy of a Hub repository, the parquet and JSONL files directly in it are
    read, or else those in its folder `data`; if some are called train*, only those.

    Args:
        names: files, folders, or one Hub id.
        command: for messages, such as "prepare math OUT".

    Errors: UserError for a file that is missing, empty or damaged, an id that is mixed with others
    or unknown, `datasets` missing, and no network; the last two name the local option.
    """
    there = [Path(name).exists() for name in names]
    if not any(there) and len(names) == 1 and _is_hub_id(names[0]):
        return _hub(names[0], f"megatron-deft {command} --source FILE...")
    for name, found in zip(names, there, strict=True):
        if not found:
            alone = (
                ", and a data set of the Hub must be the only source" if _is_hub_id(name) else ""
            )
            raise UserError(f"--source {name}: no such file or folder{alone}")
    return _local([file for name in names for file in _files(Path(name))])


def _is_hub_id(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_ENDINGS)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for folder in (path, path / "data"):
        found = sorted(
            file
            for file in (folder.iterdir() if folder.is_dir() else ())
            if file.suffix in _FOLDER_ENDINGS and not file.name.startswith(".")
        )
        if found:
            return [file for file in found if file.name.startswith("train")] or found
    raise UserError(
        f"{path}: no parquet or JSONL file in it, nor in a folder data below: name files"
    )


def _local(files: Sequence[Path]) -> Source:
    names = [str(file) for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--source {twice[0]}: named twice")
    rows = {name: _count(file) for name, file in zip(names, files, strict=True)}
    return Source(
        name=None,
        columns={name: columns_of_file(name) for name in names},
        total=sum(rows.values()),
        origin=[
            {"file": name, "bytes": file.stat().st_size, "rows": rows[name]}
            for name, file in zip(names, files, strict=True)
        ],
        rows=lambda needed, optional: find_rows(names, needed, optional),
    )


def _count(file: Path) -> int:
    """Rows of a file; the lines of JSONL are not parsed, a .json may be anything."""
    if file.suffix not in _ENDINGS:
        raise UserError(f"{file}: the name must end in one of {', '.join(_ENDINGS)}")
    if file.suffix == ".parquet":
        try:
            rows = int(pq.read_metadata(file).num_rows)
        except pa.ArrowException as error:
            raise UserError(f"{file}: not a whole parquet file ({_line(error)})") from error
    elif file.suffix == ".jsonl":
        with open(file, "rb") as handle:
            rows = sum(not line.isspace() for line in handle)
    else:
        rows = sum(1 for _ in find_rows([str(file)], []))
    if not rows:
        raise UserError(f"{file}: the file has no rows")
    return rows


def _hub(name: str, local: str) -> Source:
    """The split `train` of a data set of the Hub, memory-mapped from its cache."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name} comes from the Hugging Face Hub through datasets, which is not installed: "
            f"pip install datasets, or download the files yourself: {local}"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:  # they run the scripts of a data set
        raise UserError(
            f"{name}: datasets {datasets.__version__} may run code of the data set: pip install "
            f"'datasets>=4', or download the files yourself: {local}"
        )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    problem = "the Hub is set offline" if datasets.config.HF_HUB_OFFLINE else _unreachable(name)
    try:
        with _offline(datasets.config, problem is not None):
            table = datasets.load_dataset(name, split="train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{name}: no such file or folder here, not in the cache of datasets, and not to be had "
            f"from the Hugging Face Hub ({problem or _line(error)}): download its files where "
            f"there is a network, then {local}"
        ) from error
    if problem is not None:
        _LOG.info("%s: %s: what is in the cache of datasets is used", name, problem)
    # The cache has a folder for every revision.
    revision = next((Path(file["filename"]).parent.name for file in table.cache_files), None)
    return Source(
        name=name,
        columns={name: list(table.column_names)},
        total=len(table),
        origin=[{"hub": name, "revision": revision, "split": "train", "rows": len(table)}],
        rows=lambda needed, optional: _table_rows(name, table, [*needed, *optional]),
    )


def _table_rows(name: str, table: Any, columns: Sequence[str]) -> Iterator[Found]:
    number = 0
    for block in table.select_columns(list(columns)).with_format("arrow").iter(_ROWS_AT_ONCE):
        for row in block.to_pylist():
            yield f"{name} row {number}", row
            number += 1


def _unreachable(name: str) -> str | None:
    """Why the Hub cannot be asked for that data set, without trying again; None if it can."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=_SECONDS_TO_REACH)
    except Exception as error:  # of the HTTP library, which differs from version to version
        response = getattr(error, "response", None)
        if response is None:
            return f"no network: {_line(error)}"
        raise UserError(
            f"{name}: no such file or folder here, and the Hugging Face Hub does not give such a "
            f"data set (it answers {response.status_code}): check the name, or log in if it is "
            "private (hf auth login)"
        ) from error
    return None


@contextmanager
def _offline(config: Any, wanted: bool) -> Iterator[None]:
    """Let `datasets` look into its cache alone; its setting can be changed only like this."""
    kept = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = kept or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = kept


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
