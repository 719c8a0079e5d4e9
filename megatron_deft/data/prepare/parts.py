"""The unfinished work of a set: one file per task, in a hidden folder beside it.

The folder's name has a key of everything that decides about its content, so a run that was killed
goes on where it stopped, and one with other settings starts anew.
"""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from megatron_deft.data.prepare.samples import Counts, Part, Tally
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write, lock

logger = logging.getLogger(__name__)


def key_of(content: Mapping[str, Any]) -> str:
    """16 hex digits of everything that decides about the parts."""
    return str(xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest())


@contextmanager
def work_folder(out: Path, key: str) -> Iterator[Path]:
    """The folder for the parts of `out`, held by this process; others wait for no one.

    It stays when the block fails, and goes when it succeeds, with all that is left of other runs.

    Errors: UserError when another process works on the same.
    """
    folder = out.with_name(f"{_prefix(out)}{key}")
    for other in _others(out, folder):
        logger.info(
            "%s is the unfinished work of other settings: it is removed when %s is whole",
            other,
            out,
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder) as held:
        if not held:
            raise UserError(
                f"another process is preparing {out} from the same files ({folder}): "
                "wait for it, or choose another name"
            )
        try:
            yield folder
        except KeyboardInterrupt:
            logger.info("interrupted: the same command goes on with the parts in %s", folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        for other in _others(out, folder):
            with _held(other) as free:
                if free:
                    shutil.rmtree(other, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}.parts-"


def _others(out: Path, folder: Path) -> list[Path]:
    if not out.parent.is_dir():
        return []
    prefix = _prefix(out)
    return sorted(p for p in out.parent.iterdir() if p.name.startswith(prefix) and p != folder)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether no other process holds the folder; it is ours until the block ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor) is not False  # without locks everything is ours
    finally:
        os.close(descriptor)


def part_path(folder: Path, number: int) -> Path:
    """Where the part of a task is."""
    return folder / f"{number:07d}.npz"


def write_part(folder: Path, number: int, part: Part) -> None:
    """Write a part; it appears whole."""
    about = {"counts": asdict(part.counts), "weights": part.weights.dtype.name}
    with atomic_write(part_path(folder, number), "wb") as file:
        np.savez(
            file,
            lengths=part.lengths,
            tokens=part.tokens,
            weights=part.weights,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        )


class Stored:
    """A part on the disk, of which only the counts and sizes are read at first."""

    def __init__(self, folder: Path, number: int) -> None:
        """Errors: OSError, ValueError, KeyError or BadZipFile when there is none that is whole."""
        self.path = part_path(folder, number)
        with np.load(self.path) as file:
            lengths = file["lengths"]
            about = json.loads(file["about"].tobytes())
        self.samples, self.tokens = len(lengths), int(lengths.sum(dtype=np.int64))
        self.weight_dtype: str = about["weights"]
        counts = about["counts"]
        dropped = {reason: Tally(**tally) for reason, tally in counts["dropped"].items()}
        self.counts = Counts(counts["rows"], dropped, Tally(**counts["cut"]))

    def read(self) -> Part:
        """The whole part."""
        with np.load(self.path) as file:
            return Part(file["lengths"], file["tokens"], file["weights"], self.counts)


def find_part(folder: Path, number: int) -> Stored | None:
    """The part of a task, if it was made before and is whole."""
    try:
        return Stored(folder, number)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
