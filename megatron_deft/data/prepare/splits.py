"""Writing a prepared data set: train.parquet, val.parquet and info.json, as a stream of rows.

As in the releases, validation is the first 128 rows and they stay in train too (their numbers of
steps count on it); `hold_out` takes them out of train.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_deft.data.prepare.sources import Source
from megatron_deft.data.rows import Found
from megatron_deft.data.task import RowError
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder

VAL_SIZE = 128
_ROWS_AT_ONCE = 2000  # of one row group
_COUNTED = ("split", "index")  # of extra_info, told anew
_INFO = "info.json"
_DECISIVE = ("limit", "val_size", "hold_out", "seed", "bad_rows")  # of a Choice
_PLACES = 5  # of what was dropped, named in info.json

_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))


@dataclass(frozen=True)
class Choice:
    """Which rows to write, and how.

    Attributes:
        limit: first so many rows of the source; None is all.
        val_size: rows of val.parquet; 0 writes none.
        hold_out: leave the rows of val.parquet out of train.parquet.
        seed: draw the rows of `limit` and of val at random, instead of the first; None does not.
            They stand in the source's order either way: training shuffles.
        bad_rows: "error" or "drop" (counted).
        overwrite: replace the folder.
        reuse: leave the folder as it is where the same choice of the same sources made it.
        progress: show a bar on a terminal.
    """

    limit: int | None = None
    val_size: int = VAL_SIZE
    hold_out: bool = False
    seed: int | None = None
    bad_rows: str = "error"
    overwrite: bool = False
    reuse: bool = False
    progress: bool = True


class DropRow(Exception):  # noqa: N818 - not an error
    """Raised to leave a row out, for a reason that info.json counts."""


@dataclass
class _Tally:
    counts: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.places.setdefault(reason, [])
        if len(self.places[reason]) < _PLACES:
            self.places[reason].append(where)

    def to_json(self) -> dict[str, Any]:
        return {
            reason: {"count": count, "first": self.places[reason]}
            for reason, count in self.counts.items()
        }


Columns = tuple[Sequence[str], Sequence[str]]  # that a row must have, and may have
Make = Callable[[int, Mapping[str, Any]], dict[str, Any]]  # number in the source, row -> row


def schema(extra: Sequence[str], more: Sequence[str] = ()) -> pa.Schema:
    """The released trainers' columns, with text columns `extra` in extra_info and `more` beside."""
    return pa.schema(
        [
            ("data_source", _TEXT),
            ("prompt", _MESSAGES),
            ("ability", _TEXT),
            ("reward_model", pa.struct([("style", _TEXT), ("ground_truth", _TEXT)])),
            (
                "extra_info",
                pa.struct(
                    [("split", _TEXT), ("index", pa.int64()), *((name, _TEXT) for name in extra)]
                ),
            ),
            *((name, _TEXT) for name in more),
            ("messages", _MESSAGES),
        ]
    )


def text(row: Mapping[str, Any], key: str) -> str:
    """row[key], which must be text with something in it. Errors: UserError."""
    value = optional_text(row, key)
    if value is None or not value.strip():
        raise UserError(f"{key}: expected text, got {'null' if value is None else 'none'}")
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str | None:
    """row[key], which may be null or absent. Errors: UserError when it is anything but text."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{key}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{key}: half of a surrogate pair, which is no text") from error
    return value


def given_columns(source: Source, known: Sequence[str]) -> list[str]:
    """The texts that extra_info of the first row of `source` has beside those `known`."""
    rows = (row for _, row in source.rows(["extra_info"], ()) if not isinstance(row, RowError))
    first = next(rows, None)
    extra = None if first is None else first["extra_info"]
    given = extra if isinstance(extra, Mapping) else {}
    return [name for name, value in given.items() if isinstance(value, str)
            and name not in known and name not in _COUNTED]  # fmt: skip


def keep_given(
    made: dict[str, Any], given: Mapping[str, Any], left_out: list[str]
) -> dict[str, Any]:
    """`made`, with the texts that `given` has under the same names instead.

    Other names of `given` are added to `left_out`, for info.json.
    """
    for name in given:
        if name not in made and name not in (*_COUNTED, *left_out):
            left_out.append(name)
    return {
        name: value if (own := optional_text(given, name)) is None else own
        for name, value in made.items()
    }


def write_splits(
    out: str | Path,
    open_rows: Callable[[], tuple[Source, Columns, pa.Schema, Make]],
    choice: Choice,
    name: str,
    more: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the folder `out` (train.parquet, val.parquet, info.json); return what info.json holds.

    Memory is bounded by one group of rows, whatever the size of the source.

    Args:
        open_rows: opens the source; gives the columns to read (those that each row must have, and
            those it may have), the schema of the result, and the function that makes a row of it,
            which may raise DropRow or UserError.
        name: of the data set, for info.json and the progress bar.
        more: what else info.json holds.
        asked: what else decides about the rows.

    Errors: UserError when an option is out of range, `out` exists, a row is bad (its file and
    number) and bad rows are errors, or no row is left; what `open_rows` raises.
    """
    _check(choice)
    tally, empty = _Tally(), _Tally()
    there = _read_info(Path(out)) if choice.reuse else None
    if there and there.get("asked") == _asked(open_rows()[0], choice, name, asked):
        return there
    with atomic_folder(out, choice.overwrite) as folder:
        source, columns, form, make = open_rows()
        size = min(source.total, choice.limit or source.total)
        counts = {"train": 0, "val": 0}
        with ExitStack() as stack:
            writers = {
                split: stack.enter_context(_Writer(folder / f"{split}.parquet", form))
                for split in counts
                if split == "train" or choice.val_size
            }
            bar = stack.enter_context(
                tqdm(total=size, desc=name, unit=" rows", disable=None if choice.progress else True)
            )
            for index, in_val, (where, raw) in _chosen(source, columns, choice):
                bar.update()
                try:
                    if isinstance(raw, RowError):
                        raise raw
                    row = make(index, raw)
                except DropRow as reason:
                    tally.add(str(reason), where)
                    continue
                except UserError as error:
                    if choice.bad_rows == "error":
                        raise UserError(f"{where}: {error}") from error
                    tally.add(f"bad row: {error}", where)
                    continue
                if row["reward_model"]["ground_truth"] is None:
                    empty.add("null", where)
                if in_val is None:
                    in_val = counts["val"] < choice.val_size
                for split in ("val",) * in_val + ("train",) * (not (in_val and choice.hold_out)):
                    row["extra_info"]["split"] = split
                    writers[split].add(row)
                    counts[split] += 1
            if not counts["train"]:
                reasons = ", ".join(f"{count} {reason}" for reason, count in tally.counts.items())
                raise UserError(
                    f"{name}: no row is left to train on ({reasons or 'all are held out'})"
                )
        info = {
            "data_set": name,
            "sources": source.origin,
            "rows": counts,
            "val": f"{'drawn by seed' if choice.seed is not None else 'the first rows'}, "
            + ("held out of train" if choice.hold_out else "in train too, as in the releases"),
            "no_ground_truth": empty.to_json().get("null", {"count": 0, "first": []}),
            "dropped": tally.to_json(),
            "limit": choice.limit,
            "seed": choice.seed,
            **more,
            "asked": _asked(source, choice, name, asked),
        }
        (folder / _INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def _read_info(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((out / _INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _asked(source: Source, choice: Choice, name: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the rows, as JSON has it."""
    chosen = {field: getattr(choice, field) for field in _DECISIVE}
    return {"data_set": name, "sources": source.origin, **chosen, **more}


def _check(choice: Choice) -> None:
    if choice.limit is not None and choice.limit < 1:
        raise UserError(f"--limit {choice.limit}: at least 1")
    if choice.val_size < 0:
        raise UserError(f"--val-size {choice.val_size}: at least 0")
    if choice.seed is not None and choice.seed < 0:
        raise UserError(f"--seed {choice.seed}: at least 0")


def _chosen(
    source: Source, columns: Columns, choice: Choice
) -> Iterator[tuple[int, bool | None, Found]]:
    """Number, whether it is for val (None: if val is not full yet), and the row itself."""
    if choice.seed is None:
        for index, row in enumerate(islice(source.rows(*columns), choice.limit)):
            yield index, None, row
        return
    drawn = np.random.default_rng(choice.seed).permutation(source.total)[: choice.limit]
    wanted, for_val = np.zeros((2, source.total), bool)
    wanted[drawn], for_val[drawn[: choice.val_size]] = True, True
    for index, row in enumerate(source.rows(*columns)):
        if wanted[index]:
            yield index, bool(for_val[index]), row


class _Writer:
    """A parquet file written one row group at a time."""

    def __init__(self, path: Path, form: pa.Schema) -> None:
        self.form = form
        self.rows: list[dict[str, Any]] = []
        self.file = pq.ParquetWriter(path, form, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        # One row may go into two files under two names of split: keep what it says now.
        self.rows.append({**row, "extra_info": dict(row["extra_info"])})
        if len(self.rows) == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.file.write_table(pa.Table.from_pylist(self.rows, self.form))
            self.rows = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self._flush()
        self.file.close()
