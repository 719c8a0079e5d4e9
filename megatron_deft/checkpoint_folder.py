"""The folder a checkpoint or a set of imported weights lives in, and how to tell that it is whole.

    FOLDER/megatron_deft.json  the manifest: kind, spec, step, objective, every file's checksum
    FOLDER/hf/                 config.json, generation_config.json, tokenizer files, as they came;
                               but tokenizer_config.json is spelled for transformers 4 and 5
    FOLDER/state/              megatron dist_checkpointing (torch_dist), free of parallel layout
    RUN/checkpoints/step_00000020/, RUN/checkpoints/latest     the folders of one training run

The manifest is written last, inside a folder that still has a temporary name: a folder without a
manifest, or with a file that does not match it, was cut short or damaged. No megatron and no torch
in here, so that looking at a folder costs nothing.
"""

import json
import queue
import re
import shutil
import threading
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write, read_json

MANIFEST = "megatron_deft.json"
FORMAT = 2
KINDS = ("weights", "training")
LATEST = "latest"
SOURCE = "megatron_deft_source.json"  # in an export: which folder it was made of
BLOCK = 16 * 2**20  # bytes hashed at a time
LAG = 16  # blocks


def _is_hash(entry: Any) -> bool:
    sized = isinstance(entry, dict) and type(entry.get("bytes")) is int
    return sized and isinstance(entry.get("xxh3_128"), str)


def _or_none(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or type(value) is kind


# Field of a manifest -> whether a value is legal; not all were written from the start.
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "files": lambda files: isinstance(files, dict) and all(map(_is_hash, files.values())),
    "kind": lambda kind: kind in KINDS,
    "spec": lambda spec: isinstance(spec, dict),
    "step": lambda step: type(step) is int,
    "consumed": _or_none(int),
    "skipped": _or_none(int),
    "objective": _or_none(str),
    "base": _or_none(str),
    "config": _or_none(dict),
    "layout": _or_none(dict),
    "license": _or_none(dict),
    "adapter": _or_none(dict),
}

_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_NAME = re.compile(r"\..+\.(tmp|old)-\d+(-\d+)?")


def list_files(folder: str | Path) -> list[str]:
    """Relative names of every file below `folder` but the manifest, sorted, with `/` between."""
    folder = Path(folder)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


def hash_files(folder: str | Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size in bytes and xxh3_128 of each named file: the manifest's "files".

    It is to find damage, not to prove who wrote a file. A cryptographic hash was rejected: BLAKE2b
    does 0.4 GB/s where XXH3 does 8, and would take half of the time of a conversion.

    Ranks share the work by hashing `list_files(folder)[rank::world_size]` each; the merged dicts go
    to `write_manifest`. Streams in 16 MiB blocks.
    """
    return {name: _hash_file(Path(folder) / name) for name in names}


def _entry(digest: Any, size: int) -> dict[str, Any]:
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def _hash_file(path: Path) -> dict[str, Any]:
    digest, size = xxh3_128(), 0
    with open(path, "rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
            size += len(block)
    return _entry(digest, size)


class FollowingHashes:
    """Hashes of files, computed in a thread behind whoever reads or writes them front to back.

    A pass of its own over a finished folder was rejected: it would read every file once more from
    the disk, while here the pages are still in memory. `reached` waits when the thread is more than
    LAG blocks behind, so they stay there. Leaving the `with` block ends the thread.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._sent: dict[Path, int] = {}  # bytes of each file that the thread was told of
        self._found: dict[Path, tuple[Any, int]] = {}  # digest and bytes, the thread's own
        self._tasks: queue.Queue[tuple[Path, int | None] | None] = queue.Queue(LAG)
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "FollowingHashes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._tasks.put(None)
        self._thread.join()

    def reached(self, path: Path, end: int) -> None:
        """Bytes of the file `path` below `end` are there, and will not change."""
        for border in range(self._sent.get(path, 0) + BLOCK, end + 1, BLOCK):
            self._sent[path] = border
            self._tasks.put((path, border))

    def finish(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Like `hash_files` of the folder: hash what is left of each file, which now is whole."""
        names = list(names)
        for name in names:
            self._tasks.put((self._folder / name, None))
        self._tasks.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return {name: _entry(*self._found[self._folder / name]) for name in names}

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._stopped or self._error is not None:
                continue  # emptying the queue, so that nobody waits for room in it
            try:
                self._follow(*task)
            except BaseException as error:
                self._error = error

    def _follow(self, path: Path, end: int | None) -> None:
        digest, done = self._found.get(path) or (xxh3_128(), 0)
        with open(path, "rb", buffering=0) as handle:
            handle.seek(done)
            while block := handle.read(BLOCK if end is None else min(BLOCK, end - done)):
                digest.update(block)
                done += len(block)
        self._found[path] = digest, done


def write_manifest(
    folder: str | Path,
    *,
    kind: str,
    spec: Mapping[str, Any],
    step: int = 0,
    objective: str | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    **extra: Any,
) -> None:
    """Write FOLDER/megatron_deft.json atomically, after every other file.

    `files` comes from `hash_files`; without it every file is hashed here. `extra` are further JSON
    fields (`base`, the model that was imported, is carried to the model card by export).
    """
    assert kind in KINDS, f"kind {kind!r} is not one of {KINDS}"
    files = hash_files(folder, list_files(folder)) if files is None else files
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "spec": dict(spec),
        "step": step,
        "objective": objective,
        **extra,
        "files": {name: dict(files[name]) for name in sorted(files)},
    }
    with atomic_write(Path(folder) / MANIFEST) as handle:
        json.dump(manifest, handle, indent=1)
        handle.write("\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of `folder`. Errors: UserError when there is none, or none that we can read."""
    path = Path(folder) / MANIFEST
    missing = (
        f"{folder} has no {MANIFEST}, so it is not a finished megatron_deft folder: name one "
        "written by `megatron-deft convert import` or by training"
    )
    manifest = read_json(path, missing, "the folder is damaged")
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{path} is not a megatron_deft manifest: it has no format")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}: "
            "use the megatron_deft that wrote it"
        )
    wrong = [name for name, fits in FIELDS.items() if not fits(manifest.get(name))]
    if wrong:
        raise UserError(
            f"{path} has no legal {', '.join(wrong)}: the folder is damaged: use another "
            "checkpoint, or convert the model again"
        )
    return manifest


def verify(
    folder: str | Path,
    checksums: bool | Container[str] = True,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """What is wrong with `folder`, one line per problem; empty when it is whole.

    Compares every file of the manifest by presence and size, then by checksum: all, none, or those
    named in `checksums`. `known` are hashes, as of `hash_files`, that are not computed again.
    """
    folder = Path(folder)
    try:
        recorded = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    known = known or {}
    named = (recorded if checksums else ()) if isinstance(checksums, bool) else checksums
    problems = []
    for name, want in recorded.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != want["bytes"]:
            problems.append(f"{name} has {size} bytes instead of {want['bytes']}")
        elif name in named and (known.get(name) or _hash_file(path)) != want:
            problems.append(f"{name} does not match its checksum")
    return problems


def write_source(export: str | Path, manifest: Mapping[str, Any]) -> None:
    """Record in the folder `export` that it is made of the folder with this manifest."""
    made_of = {"kind": manifest["kind"], "step": manifest["step"]}
    with atomic_write(Path(export) / SOURCE) as handle:
        json.dump({**made_of, "manifest_xxh3_128": _fingerprint(manifest)}, handle, indent=1)
        handle.write("\n")


def is_export_of(export: str | Path, folder: str | Path) -> bool:
    """Whether `export` was made of `folder` as it is now, not of another that had its name.

    Errors: UserError when `folder` has no manifest.
    """
    try:
        recorded = json.loads((Path(export) / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    made_of = recorded.get("manifest_xxh3_128") if isinstance(recorded, dict) else None
    return bool(made_of == _fingerprint(read_manifest(folder)))


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    """Of a manifest, which names every file's checksum: the same means the same folder."""
    text = json.dumps(manifest, sort_keys=True)
    return str(xxh3_128(text.encode()).hexdigest())


def step_name(step: int) -> str:
    """Name of the checkpoint folder of one optimizer step, such as step_00000020."""
    return f"step_{step:08d}"


def drop_oldest(
    root: str | Path, newest: Path, keep: int | None, spare: Collection[Path] = ()
) -> None:
    """Remove step folders below `root` but the newest `keep` (None: all) up to `newest`.

    Later ones are not looked at. Those of `spare` stay, and are removed by a later call.
    """
    if keep is not None:
        spared = {path.resolve() for path in spare}
        for path in [p for p in _step_folders(Path(root)) if p.name <= newest.name][:-keep]:
            if path.resolve() not in spared:
                shutil.rmtree(path)


def set_aside(root: str | Path, step: int) -> list[str]:
    """Rename the folders of steps after `step` below `root` to step_N.abandoned, or, where an
    earlier turn has left one of that name, step_N.abandoned-2 and so on.

    returns: lines for the log
    """
    notes = []
    for path in _step_folders(Path(root)):
        if path.name > step_name(step):
            suffixes = (f"-{number}" if number > 1 else "" for number in count(1))
            asides = (path.with_name(f"{path.name}.abandoned{suffix}") for suffix in suffixes)
            aside = next(name for name in asides if not name.exists())
            path.rename(aside)
            notes.append(f"{path} is not of this run: kept as {aside.name}")
    return notes


def _step_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if _STEP_NAME.fullmatch(path.name))


def candidates(root: str | Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Checkpoints below `root`, newest first, not looked into yet; and half-written ones with why.

    `root` is RUN or RUN/checkpoints.
    """
    root = _checkpoints(Path(root))
    skipped: list[tuple[Path, str]] = []
    steps: list[tuple[int, Path]] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if _TEMPORARY_NAME.fullmatch(path.name):
            skipped.append((path, "half-written: it still has its temporary name"))
        elif (match := _STEP_NAME.fullmatch(path.name)) and path.is_dir():
            steps.append((int(match.group(1)), path))
    if (root / LATEST).is_file():
        named = root / (root / LATEST).read_text(encoding="utf-8").strip()
        if not named.is_dir():
            skipped.append((named, f"missing, though {LATEST} names it"))
    return [path for _, path in sorted(steps, reverse=True)], skipped


def newest_whole(
    root: str | Path, checksums: bool = True
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint below `root` that is whole, and what was passed over with the reason.

    `root` is RUN or RUN/checkpoints. Half-written folders (temporary names, no manifest) and
    missing, truncated or corrupted files disqualify a checkpoint; older ones are then tried. The
    search stops at the first whole one, so healthy older checkpoints are neither hashed nor listed.
    """
    paths, skipped = candidates(root)
    for path in paths:
        problems = verify(path, checksums)
        if not problems:
            return path, skipped
        skipped.append((path, "; ".join(problems)))
    return None, skipped


def write_latest(root: str | Path, name: str) -> None:
    """Point RUN/checkpoints/latest (`root` is RUN/checkpoints) at the folder `name`, atomically."""
    with atomic_write(Path(root) / LATEST) as handle:
        handle.write(name + "\n")


def resolve(path: str | Path) -> Path:
    """The checkpoint folder a user means by `path`.

    Accepts a weights folder, a checkpoint folder, a run folder, RUN/checkpoints, or the file
    RUN/checkpoints/latest. A run stands for what `latest` names; without that file, for its
    highest step. Errors: UserError when nothing is there or what is named is unfinished. An older
    checkpoint is never taken instead: what someone exports must be what they think it is.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a weights, checkpoint or run folder")
    if path.is_file() and path.name != LATEST:
        raise UserError(
            f"{path} is a file: name the weights, checkpoint or run folder that holds it"
        )
    if path.is_dir() and (path / MANIFEST).exists():
        return path
    root = path.parent if path.is_file() else _checkpoints(path)
    pointer = root / LATEST
    if pointer.is_file():
        target = root / pointer.read_text(encoding="utf-8").strip()
        why = f"{pointer} names it"
    else:
        names = [p.name for p in root.iterdir() if _STEP_NAME.fullmatch(p.name)]
        if not names:
            raise UserError(
                f"{path} holds neither {MANIFEST} nor checkpoints: name a folder written by "
                "`megatron-deft convert import` or by training"
            )
        target = root / max(names, key=lambda name: (len(name), name))
        why = "the highest step"
    if not (target / MANIFEST).exists():
        raise UserError(
            f"{target} ({why}) is unfinished or gone: name one of the other step_ folders in {root}"
        )
    return target


def _checkpoints(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
