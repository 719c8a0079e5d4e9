"""Prepare a set: tokenise files in parallel into one folder that training maps and reads.

Files are cut into tasks that depend on nothing but the files. Each task becomes a part file, by
whichever process; the parts are joined in the order of the tasks. So the result has the same bytes
whatever the number of processes, and whether or not a run was interrupted and taken up again.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_deft import __version__
from megatron_deft.data.indexed import Block, open_set, require_whole, token_dtype, write_set
from megatron_deft.data.manifest import (
    MANIFEST,
    PLACES,
    TOKENIZER,
    VERSION,
    Count,
    read_manifest,
)
from megatron_deft.data.prepare.parts import Stored, find_part, key_of, work_folder, write_part
from megatron_deft.data.prepare.pool import run_jobs
from megatron_deft.data.prepare.samples import (
    TOO_LONG,
    UNTRAINED,
    Counts,
    Tally,
    Tokeniser,
    make_part,
)
from megatron_deft.data.prepare.settings import RowSettings, columns_of, uses_template
from megatron_deft.data.rows import cut, detect_format, place, release
from megatron_deft.data.task import TASK_BYTES, TASK_ROWS, Task, stamp
from megatron_deft.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    template_hash,
    template_text,
    tokenizer_hash,
    vocab_size,
)
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder, require_space
from megatron_deft.hashing import hash_file

__all__ = ["RowSettings", "prepare_set"]

logger = logging.getLogger(__name__)
_REASONS = 40  # told apart; more are counted together
_OTHER = "other reasons"
_BYTES_PER_TOKEN = 4  # of text, for an estimate


def prepare_set(
    out: str | Path,
    files: Sequence[str],
    tokenizer_folder: str | Path,
    settings: RowSettings | None = None,
    *,
    workers: int = 1,
    overwrite: bool = False,
    reuse: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenise the rows of `files` into the new folder `out`; returns its manifest.

    Interrupted, it leaves the parts that are done in a hidden folder beside `out`; called again
    with the same files, tokenizer and settings it goes on from there.

    Args:
        files: parquet, JSONL or JSON files; their rows, in order, are the samples.
        tokenizer_folder: a Hugging Face folder with a tokenizer.
        workers: processes; 1 is this one.
        overwrite: replace `out`, which must be a prepared set.
        reuse: leave `out` as it is where it was made of the same files, tokenizer and settings;
            replace it where not.
        progress: a bar on stderr, where that is a terminal.

    Errors: UserError for a file or row that cannot be used, a tokenizer without what is needed,
    when no sample is left, when the disk is full, and when a worker process dies.
    """
    settings = settings or RowSettings()
    out = Path(os.path.realpath(out))
    _check_out(out, overwrite or reuse)
    if not files:
        raise UserError("no data files: name at least one parquet or JSONL file")
    if workers < 1:
        raise UserError(f"workers={workers}: at least 1 is needed")
    form = detect_format(settings, files)
    tokenizer = load_tokenizer(tokenizer_folder, settings.template)
    tokeniser = Tokeniser(tokenizer, settings, form)
    bar = partial(tqdm, unit="B", unit_scale=True, disable=None if progress else True)
    stamps = [stamp(file) for file in files]
    about = _about(tokeniser, files, tokenizer_folder, bar)
    if reuse and _is_made_of(out, about):
        return read_manifest(out)
    needed, optional = columns_of(settings, form)
    tasks = cut(files, [*needed, *optional], settings.limit)
    dtype = token_dtype(about["tokenizer"]["vocab_size"])
    with work_folder(out, key_of(_decisive(about))) as folder:
        job = _Job(tasks, tokeniser, dtype, folder)
        try:
            parts = _parts(job, workers, bar)
        finally:
            release()
        for file, before in zip(files, stamps, strict=True):
            if stamp(file) != before:
                raise UserError(f"{file} has changed while it was read: run the command again")
        about |= _left_out(tasks, [part.counts for part in parts])
        if not any(part.samples for part in parts):
            reasons = ", ".join(f"{c['count']} {why}" for why, c in about["dropped"].items())
            raise UserError(f"{', '.join(files)}: no sample is left to train on: {reasons}")
        weights = None if form == "text" else _weight_dtype(parts)
        needs = sum(part.path.stat().st_size for part in parts) + sum(p.samples for p in parts) * 20
        with atomic_folder(out, overwrite or reuse, needs, MANIFEST) as target:
            save_tokenizer(Path(tokenizer_folder), tokenizer, target / TOKENIZER)
            total = sum(part.tokens for part in parts)
            blocks = _blocks(parts, bar(total=total, unit=" tokens", desc="joining"))
            return write_set(target, blocks, (dtype, weights), about)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UserError(f"{out} is a file: choose another name")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already: remove it, choose another, or pass --overwrite")
    if any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UserError(f"{out} is no prepared set, so it is not replaced: choose another name")


def _about(
    tokeniser: Tokeniser, files: Sequence[str], folder: str | Path, bar: Callable[..., Any]
) -> dict[str, Any]:
    """What the manifest says of where the set comes from."""
    import transformers

    tokenizer, settings, form = tokeniser.tokenizer, tokeniser.settings, tokeniser.form
    text = template_text(tokenizer) if uses_template(settings, form) else None
    sizes = [Path(file).stat().st_size for file in files]
    sources = []
    with bar(total=sum(sizes), desc="reading", leave=False) as shown:
        for file in files:
            sources.append({"file": str(file), **hash_file(Path(file))})
            shown.update(sources[-1]["bytes"])
    return {
        "megatron_deft": __version__,
        "transformers": transformers.__version__,
        "kind": "pretrain" if form == "text" else "sft",
        "max_length": settings.max_length,
        "truncation": settings.truncation,
        "tokenizer": {
            "name": str(folder),
            "hash": tokenizer_hash(tokenizer),
            "vocab_size": vocab_size(tokenizer),
        },
        "template": text and {
            "name": settings.template or "the tokenizer's own",
            "hash": template_hash(text),
            "text": text,
        },
        "sources": sources,
        "settings": asdict(settings) | {"format": form},
    }  # fmt: skip


def _is_made_of(out: Path, about: dict[str, Any]) -> bool:
    """Whether `out` is a whole set of just this; a damaged one is made again."""
    if not (out / MANIFEST).is_file():
        return False
    try:
        require_whole(found := open_set(out))
    except UserError:
        return False
    there = found.manifest
    now = json.loads(json.dumps(about))  # as JSON has it: without tuples
    same = _decisive({key: there[key] for key in about}) == _decisive(now)
    return same and there["settings"]["bad_rows"] == now["settings"]["bad_rows"]


def _decisive(about: dict[str, Any]) -> dict[str, Any]:
    """What decides about the parts: not what files and folders are called.

    Nor bad_rows, so that a run which met a bad row can be told to drop it and go on: see _found.
    """
    return {
        **about,
        "version": VERSION,
        "cut": [TASK_BYTES, TASK_ROWS],
        "tokenizer": about["tokenizer"]["hash"],
        "template": about["template"] and about["template"]["hash"],
        "sources": [{**source, "file": None} for source in about["sources"]],
        "settings": {**about["settings"], "template": None, "bad_rows": None},
    }


@dataclass(frozen=True)
class _Job:
    """The tasks of a set.

    The processes are sent the tokenizer: to load it from its folder takes several times as long,
    most of it for imports that reading a vocabulary does not need.
    """

    tasks: Sequence[Task]
    tokeniser: Tokeniser
    dtype: str
    folder: Path

    def start(self) -> Callable[[int], None]:
        return self._run

    def _run(self, number: int) -> None:
        write_part(self.folder, number, make_part(self.tokeniser, self.tasks[number], self.dtype))

    def describe(self, number: int) -> str:
        return f"{place(self.tasks[number], 0)} and on"


def _parts(job: _Job, workers: int, bar: Callable[..., Any]) -> list[Stored]:
    """Every part in order; those that are missing are made now."""
    parts = _found(job)
    missing = [number for number in range(len(job.tasks)) if number not in parts]
    if parts:
        logger.info("%d of %d parts are there from before: going on", len(parts), len(job.tasks))
    done = sum(job.tasks[number].bytes for number in parts)
    total = sum(task.bytes for task in job.tasks)
    # The parts, and the set beside them before they go.
    tokens = (total - done) // _BYTES_PER_TOKEN
    require_space(job.folder, 2 * tokens * (np.dtype(job.dtype).itemsize + 1))
    samples, tokens = (sum(getattr(p, n) for p in parts.values()) for n in ("samples", "tokens"))
    with bar(total=total, initial=done, desc="tokenising") as shown:
        for number, _ in run_jobs(job, missing, workers):
            part = parts[number] = Stored(job.folder, number)
            samples, tokens = samples + part.samples, tokens + part.tokens
            shown.set_postfix(samples=samples, tokens=tokens, refresh=False)
            shown.update(job.tasks[number].bytes)
    return [parts[number] for number in sorted(parts)]


def _found(job: _Job) -> dict[int, Stored]:
    """Parts made before; where bad rows are errors, only those without any."""
    found = {number: find_part(job.folder, number) for number in range(len(job.tasks))}
    strict = job.tokeniser.settings.bad_rows == "error"
    return {
        number: part
        for number, part in found.items()
        if part is not None and not (strict and set(part.counts.dropped) - {TOO_LONG, UNTRAINED})
    }


def _weight_dtype(parts: Sequence[Stored]) -> str:
    return "uint8" if all(part.weight_dtype == "uint8" for part in parts) else "float32"


def _blocks(parts: Sequence[Stored], shown: Any) -> Iterator[Block]:
    with shown:
        for stored in parts:
            part = stored.read()
            yield Block(part.lengths, part.tokens, part.weights)
            shown.update(len(part.tokens))


def _left_out(tasks: Sequence[Task], counts: Sequence[Counts]) -> dict[str, Any]:
    """The manifest's `dropped` and `cut`: all tasks' counts, with the first places by name."""
    dropped: dict[str, Count] = {}
    shortened = Count()
    before = 0
    for task, count in zip(tasks, counts, strict=True):
        before = before if task.start else 0  # a new file
        for reason, tally in count.dropped.items():
            is_new = reason not in dropped and len(dropped) >= _REASONS
            _add(dropped.setdefault(_OTHER if is_new else reason, Count()), task, tally, before)
        _add(shortened, task, count.cut, before)
        before += count.rows
    return {
        "dropped": {reason: asdict(count) for reason, count in dropped.items()},
        "cut": asdict(shortened),
    }


def _add(total: Count, task: Task, tally: Tally, before: int) -> None:
    total.count += tally.count
    for row in tally.rows[: PLACES - len(total.places)]:
        total.places.append(place(task, row, before))
