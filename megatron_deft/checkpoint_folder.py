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
import logging
import re
import shutil
import threading
from collections.abc import Callable, Collection, Container, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write, read_json
from megatron_deft.hashing import SEAL, fingerprint, hash_file, hash_files, is_entry
from megatron_deft.hf_files import TOKENIZER_FILES, matching

MANIFEST = "megatron_deft.json"
FORMAT = 2
KINDS = ("weights", "training")
LATEST = "latest"
SOURCE = "megatron_deft_source.json"  # in an export: which folder it was made of


def _or_none(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or type(value) is kind


# Field of a manifest -> whether a value is legal; not all were written from the start.
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "files": lambda files: isinstance(files, dict) and all(map(is_entry, files.values())),
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

logger = logging.getLogger(__name__)
_DROPPING = threading.Lock()  # a save's thread and the one that sees to exports take turns
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # a tokenizer has one of them
_READ = (*TOKENIZER_FILES, "generation_config.json")  # of hf/; the rest is carried along
_STEP_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY_NAME = re.compile(r"\..+\.(tmp|old)-\d+(-\d+)?")


def list_files(folder: str | Path) -> list[str]:
    """Relative names of every file below `folder` but the manifest, sorted, with `/` between."""
    folder = Path(folder)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


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
    manifest[SEAL] = fingerprint(json.loads(json.dumps(manifest)))  # of what will be read
    with atomic_write(Path(folder) / MANIFEST) as handle:
        json.dump(manifest, handle, indent=1)
        handle.write("\n")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of `folder`, without its own checksum.

    Errors: UserError when there is none, none that we can read, or a damaged one.
    """
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
    seal = manifest.pop(SEAL, None)
    if seal is not None and seal != fingerprint(manifest):
        raise UserError(
            f"{path} does not match its own checksum: the folder is damaged: use another "
            "checkpoint, or convert the model again"
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
    checksums: bool | slice | Container[str] = True,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """What is wrong with `folder`, one line per problem; empty when it is whole.

    Compares every file of the manifest by presence and size, then by checksum: all, none, those
    named in `checksums`, or that slice of the sorted names. `known` are hashes, as of `hash_files`,
    that are not computed again. What cannot be read is a problem like any other.
    """
    folder = Path(folder)
    try:
        recorded = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    known = known or {}
    if isinstance(checksums, slice):
        checksums = sorted(recorded)[checksums]
    named = (recorded if checksums else ()) if isinstance(checksums, bool) else checksums
    found = (
        _problem(folder / name, want, known.get(name), name in named)
        for name, want in recorded.items()
    )
    return [f"{name} {why}" for name, why in zip(recorded, found, strict=True) if why]


def _problem(path: Path, want: Any, known: Any, is_hashed: bool) -> str:
    try:
        if not path.is_file():
            return "is missing"
        if (size := path.stat().st_size) != want["bytes"]:
            return f"has {size} bytes instead of {want['bytes']}"
        if is_hashed and (known or hash_file(path)) != want:
            return "does not match its checksum"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def strays(folder: str | Path) -> list[str]:
    """Files that someone has put into FOLDER/hf and that would be read with the others, one line
    per file; empty when there are none.

    They are no damage, for which another folder would do: whoever put them there must decide.
    Hidden files are no one's (.nfs0001, .DS_Store); a folder that came without a tokenizer may be
    given one. Errors: UserError as read_manifest raises.
    """
    folder = Path(folder)
    recorded = read_manifest(folder)["files"]
    if not any(f"hf/{name}" in recorded for name in _TOKENIZERS):
        return []
    found = (path for path in matching(folder / "hf", _READ) if not path.name.startswith("."))
    return [
        f"{path} was put there after the folder was written, it is not in {MANIFEST}: remove it, "
        "or convert the model again with it (a chat template: data.template)"
        for path in found
        if path.relative_to(folder).as_posix() not in recorded
    ]


def write_source(export: str | Path, manifest: Mapping[str, Any]) -> None:
    """Record in the folder `export` that it is made of the folder with this manifest."""
    made_of = {"kind": manifest["kind"], "step": manifest["step"]}
    with atomic_write(Path(export) / SOURCE) as handle:
        json.dump({**made_of, SEAL: fingerprint(manifest)}, handle, indent=1)
        handle.write("\n")


def is_export_of(export: str | Path, folder: str | Path) -> bool:
    """Whether `export` was made of `folder` as it is now, not of another that had its name.

    Errors: UserError when `folder` has no manifest.
    """
    try:
        recorded = json.loads((Path(export) / SOURCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    made_of = recorded.get(SEAL) if isinstance(recorded, dict) else None
    return bool(made_of == fingerprint(read_manifest(folder)))


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
        with _DROPPING:
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
    named, damage = named_by_latest(root)
    if damage:
        skipped.append((root / LATEST, damage))
    elif named is not None and not named.is_dir():
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


def named_by_latest(root: str | Path) -> tuple[Path | None, str]:
    """The folder that RUN/checkpoints/latest names (`root` is RUN/checkpoints), there or not, and
    what is wrong with that file, empty for nothing; None where it is absent or damaged."""
    path = Path(root) / LATEST
    try:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    if _STEP_NAME.fullmatch(text) is None:
        return None, f"damaged: it holds {text[:40]!r} and not the name of a checkpoint"
    return path.with_name(text), ""


def resolve(path: str | Path) -> Path:
    """The checkpoint folder a user means by `path`.

    Accepts a weights folder, a checkpoint folder, a run folder, RUN/checkpoints, or the file
    RUN/checkpoints/latest. A run stands for what `latest` names; where that file is absent or
    damaged, for its highest step. Errors: UserError when nothing is there or what is named is
    unfinished. An older checkpoint is never taken instead: what someone exports must be what they
    think it is.
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
    named, damage = named_by_latest(root)
    if named is not None:
        target, why = named, f"{root / LATEST} names it"
    else:
        names = [p.name for p in root.iterdir() if _STEP_NAME.fullmatch(p.name)]
        if not names:
            raise UserError(
                f"{path} holds neither {MANIFEST} nor checkpoints: name a folder written by "
                "`megatron-deft convert import` or by training"
            )
        target = root / max(names, key=lambda name: (len(name), name))
        why = "the highest step"
        if damage:
            logger.warning("%s is %s; %s is used", root / LATEST, damage, target.name)
    if not (target / MANIFEST).exists():
        raise UserError(
            f"{target} ({why}) is unfinished or gone: name one of the other step_ folders in {root}"
        )
    return target


def _checkpoints(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
