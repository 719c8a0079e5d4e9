"""The file that keeps the answers of one model as they come."""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write
from megatron_deft.hashing import hash_file

Key = tuple[int, int]  # the question's number, and which of its samples
_PREFIX = "generations_"
_SUFFIXES = (".json", ".safetensors", ".bin", ".jinja", ".model")  # of a model's files
_NAMES = ("vocab.txt", "merges.txt")
_PLAN = "plan"  # of the header: what the answers do not depend on


class GenerationLog:
    """The answers of one model, one JSON line each, written as they come.

    The first line is `header`, what the answers depend on, with `plan`, how many there are to be. A
    file with the same header is continued, and a line torn by a kill is dropped. Any other one is
    set aside under the name `old`, and `changed` says what differs. Without a file answers are only
    kept in memory.

    Errors: UserError when `file` holds something else.
    """

    def __init__(
        self, file: Path | None, header: Mapping[str, Any], plan: Mapping[str, Any] | None = None
    ) -> None:
        self.file = file
        self.records: dict[Key, dict[str, Any]] = {}
        self.changed: list[str] = []
        self.old: Path | None = None
        if file is None:
            return
        there, records = read_log(file, "remove it") if file.is_file() else ({}, {})
        if there:
            self.changed = [key for key in header if there.get(key) != header[key]]
            if not self.changed:
                self.records = records
            elif records:
                self.old = set_aside(file)
        with atomic_write(file) as handle:
            for record in [{**header, _PLAN: plan}, *self.records.values()]:
                handle.write(json.dumps(record) + "\n")

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, which has an `index` and a `sample`."""
        self.records[record["index"], record["sample"]] = record
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")


def set_aside(file: Path) -> Path:
    """Give a file that is begun anew another name, which is returned: answers are expensive."""
    free = (file.with_name(f"{file.stem}.old-{n}{file.suffix}") for n in count(1))
    old = next(path for path in free if not path.exists())
    file.rename(old)
    return old


def read_log(file: Path, remedy: str) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """The header (empty where there is none yet) and the records of a file, but for a torn line.

    Errors: UserError with `remedy` when it is no file of generations.
    """
    try:
        found = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        if not found:
            return {}, {}
        return dict(found[0]), {(record["index"], record["sample"]): record for record in found[1:]}
    except (ValueError, TypeError, KeyError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise UserError(f"{file}: not a file of generations{why}: {remedy}") from error


def labels_of(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name per model (its folder's unless given), each fit for a file name and none twice."""
    if not folders:
        raise UserError("no model to evaluate: name at least one Hugging Face folder")
    if names is None:
        names = [folder.resolve().name for folder in folders]
    if len(names) != len(folders):
        raise UserError(f"{len(names)} names for {len(folders)} models: give one each")
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"name {name!r}: letters, digits and . _ - are legal")
    if len(set(names)) < len(names):
        raise UserError(f"two models share a name ({', '.join(names)}): pass distinct --names")
    return list(names)


def log_path(folder: Path, label: str) -> Path:
    """Where the answers of the model called `label` are kept."""
    return folder / f"{_PREFIX}{label}.jsonl"


def label_of(file: Path) -> str:
    """What the model was called whose answers a file holds."""
    return file.stem.removeprefix(_PREFIX)


def model_identity(folder: Path) -> str:
    """Tells whether a model folder has changed: a hash of its files, 32 hex digits.

    It reads the weights, which loading them does too. Rejected: sizes and times, which a copy of
    the folder changes, and a training run of equal size may not.
    """
    state = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES or path.name in _NAMES:
            state.update(f"{path.name} {hash_file(path)}\n".encode())
    return state.hexdigest()
