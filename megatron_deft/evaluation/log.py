"""The file that keeps the answers of one model as they come."""

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write

Key = tuple[int, int]  # the question's number, and which of its samples
_PREFIX = "generations_"
_PLAN = "plan"  # of the header: what the answers do not depend on


class GenerationLog:
    """The answers of one model, one JSON line each, written as they come.

    The first line is `header`, what the answers depend on, with `plan`, how many there are to be. A
    file with the same header is continued, and a line torn by a kill is dropped; any other file is
    begun anew, and `changed` names what differs. Without a file answers are only kept in memory.

    Errors: UserError when `file` holds something else.
    """

    def __init__(
        self, file: Path | None, header: Mapping[str, Any], plan: Mapping[str, Any] | None = None
    ) -> None:
        self.file = file
        self.records: dict[Key, dict[str, Any]] = {}
        self.changed: list[str] = []
        if file is None:
            return
        there, records = read_log(file) if file.is_file() else ({}, {})
        if there:
            self.changed = [key for key in header if there.get(key) != header[key]]
            if not self.changed:
                self.records = records
        with atomic_write(file) as handle:
            for record in [{**header, _PLAN: plan}, *self.records.values()]:
                handle.write(json.dumps(record) + "\n")

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, which has an `index` and a `sample`."""
        self.records[record["index"], record["sample"]] = record
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")


def read_log(file: Path) -> tuple[dict[str, Any], dict[Key, dict[str, Any]]]:
    """The header (empty where there is none yet) and the records of a file, but for a torn line.

    Errors: UserError when it is no file of generations.
    """
    try:
        found = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        if not found:
            return {}, {}
        return dict(found[0]), {(record["index"], record["sample"]): record for record in found[1:]}
    except (ValueError, TypeError, KeyError) as error:
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise UserError(f"{file}: not a file of generations{why}: remove it") from error


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
    """Tells whether a model folder has changed: a hash of the names, sizes and times of its files.

    Rejected: hashing the weights, which takes as long as answering a few hundred questions.
    """
    state = blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin", ".jinja", ".model"):
            status = path.stat()
            state.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return state.hexdigest()
