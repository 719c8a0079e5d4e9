"""What a report is made of: the folder of a training run, as it was left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_deft.errors import UserError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
RESULTS = "results.json"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run.

    name:     what it is called in the report, unique there
    folder:   where it is
    config:   its configuration, `optim.lr` -> 1e-05; empty without config.yaml
    records:  the lines of metrics.jsonl, at least one, steps rising
    notes:    what is odd about it, sentences
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    records: Sequence[Record]
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> str:
        """What it was trained with, as the configuration spells it."""
        return str(self.config.get("objective", "unknown"))


@dataclass(frozen=True)
class Source:
    """An argument of the command: a name, if one was given, and what was found at the path."""

    name: str | None
    path: Path
    metrics: Path | None
    results: Path | None


def find(argument: str) -> Source:
    """What `PATH` or `NAME=PATH` leads to.

    Errors: UserError when it is neither a run, nor a file of results, nor a folder with one.
    """
    label, separator, rest = argument.partition("=")
    named = bool(separator and label and not Path(argument).exists())
    name, path = (label, Path(rest)) if named else (None, Path(argument))
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder, or a file of results")
    if path.is_dir():
        metrics, results = (
            path / file if (path / file).is_file() else None for file in (METRICS, RESULTS)
        )
        if metrics is None and results is None:
            raise UserError(
                f"{path} holds neither {METRICS} nor {RESULTS}: name a folder that "
                "`megatron-deft train` wrote, or what `megatron-deft evaluate --out` did"
            )
        return Source(name, path, metrics, results)
    if path.suffix == ".jsonl":
        folder = path.parent if path.name == METRICS else path.with_suffix("")
        return Source(name, folder, path, None)
    return Source(name, path, None, path)


def read_runs(sources: Sequence[Source]) -> list[Run]:
    """The training runs among the sources, each under a name of its own.

    A run is called what the user says, else as its folder, with as many of the folders above as
    it takes to tell it from the others.

    Errors: UserError for a run that is named twice, two runs of one name, and unreadable files.
    """
    found = [(source, source.metrics) for source in sources if source.metrics is not None]
    for folder, count in Counter(metrics.resolve() for _, metrics in found).items():
        if count > 1:
            raise UserError(f"{folder.parent} is named {count} times: name every run once")
    unnamed = [source.path for source, _ in found if source.name is None]
    names = iter(short_names(unnamed))
    runs = [read_run(source.name or next(names), metrics) for source, metrics in found]
    for name, count in Counter(run.name for run in runs).items():
        if count > 1:
            raise UserError(f"{count} runs are called {name}: give each a name, as in NAME=FOLDER")
    return runs


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that tell them apart: runs/a, runs/b -> a, b."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next(
            length
            for length in range(1, len(mine) + 1)
            if all(other[-length:] != mine[-length:] for other in others)
        )
        names.append("/".join(mine[-length:]))
    return names


def read_run(name: str, metrics: Path) -> Run:
    """A run from its metrics.jsonl and the config.yaml beside it.

    Errors: UserError when a file is not what it should be.
    """
    records, notes = read_records(metrics)
    run = Run(name, metrics.parent, read_config(metrics.parent / CONFIG), records, tuple(notes))
    return replace(run, notes=(*run.notes, *_oddities(run)))


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of metrics.jsonl with rising steps, and notes on what was left out.

    A last line that a killed process tore is left out. Where a resumed run does steps again, what
    it logged then counts.

    Errors: UserError for another broken line (by its number), and a file without any step.
    """
    notes, lines = [], path.read_bytes().rstrip().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None and number == len(lines):
            notes.append("The last line of its metrics is torn and was left out.")
            break
        if record is None:
            raise UserError(
                f"{path}:{number} is not a line of metrics, an object with a step: remove the line"
            )
        while records and records[-1]["step"] >= record["step"]:
            records.pop()
            if _REPEATED not in notes:
                notes.append(_REPEATED)
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no step yet: wait for the run's first, or leave the run out")
    return records, notes


_REPEATED = "Its metrics have steps twice, as a resumed run did them again; the later ones count."


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    is_step = isinstance(step, int) and not isinstance(step, bool) and abs(step) < 2**53
    return record if is_step else None


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.yaml as `optim.lr` -> value; empty when there is none.

    Read as it is, not checked: runs of other versions have other keys.

    Errors: UserError when it is no YAML of keys.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a run's configuration: expected keys and values")
    return dict(_flat(config))


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _oddities(run: Run) -> Iterator[str]:
    first, last = run.records[0]["step"], run.records[-1]["step"]
    if not run.config:
        yield f"It has no {CONFIG}, so its objective, model and data are not known."
    planned = planned_steps(run)
    if planned is not None and last < planned:
        yield f"It has done {last} of {planned} steps: it was stopped, or still runs."
    if first > 1:
        yield f"Its metrics begin at step {first}: it went on from a checkpoint of another folder."
    if missing := last - first + 1 - len(run.records):
        yield f"Its metrics lack {missing} step{'s' * (missing > 1)} on the way."
    broken = Counter(name for record in run.records for name in _nonfinite(run, record))
    if broken:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(broken.items())[:6])
        rest = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
        yield f"Values that are not finite, by how many steps, leave gaps: {named}{rest}."


def _nonfinite(run: Run, record: Record) -> Sequence[str]:
    """The metrics that were not finite. Errors: UserError for what is no list of names."""
    names = record.get("nonfinite", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{run.folder / METRICS}: nonfinite of step {record['step']} is no list of metrics: "
            "remove it"
        )
    return names


def planned_steps(run: Run) -> int | None:
    """How many steps the run was to make; None when it counts epochs."""
    planned = run.config.get("train.steps")
    return planned if isinstance(planned, int) else None


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The keys that are not the same in all runs, with each run's value as text.

    A key that a run does not have is "-". Left out: run_dir, which always differs, and runs
    without a configuration, of which nothing is known.
    """
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config if key != "run_dir")
    rows = ((key, [spell(run.config.get(key, "-")) for run in runs]) for key in keys)
    return [
        (key, values)
        for key, values in rows
        if len({value for run, value in zip(runs, values, strict=True) if run.config}) > 1
    ]


def spell(value: Any) -> str:
    """A value of a configuration as a reader wants it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(spell, value)) or "none"
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
