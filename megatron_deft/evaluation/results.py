"""Means with 95% intervals, the table that compares models, and the files that keep answers."""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from megatron_deft.data.prepare.pool import available_cores
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write

_Z = 1.959964  # 95% of a normal distribution lies within as many standard deviations
_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # bounds the memory: as many times 8 bytes per sample
_PACKAGES = ("megatron_deft", "torch", "transformers", "tokenizers", "vllm")


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


def wilson(values: Sequence[float]) -> Interval:
    """The share of ones among zeros and ones; Wilson's interval, which has a width at 0 and 1 too.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    count, mean = len(values), sum(values) / len(values)
    scale = 1 + _Z**2 / count
    centre = (mean + _Z**2 / (2 * count)) / scale
    half = _Z * sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2)) / scale
    return Interval(mean, min(mean, centre - half), max(mean, centre + half))


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean, and the middle 95% of the means of 2000 resamples (equal values, equal bounds).

    For two models on the same samples, pass the differences: they are resampled as pairs.
    """
    array, generator = np.asarray(values, float), np.random.default_rng(seed)
    means = [
        array[generator.integers(len(array), size=(_RESAMPLES_AT_ONCE, len(array)))].mean(1)
        for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


@dataclass(frozen=True)
class Metric:
    """A score of one answer, between 0 and 1; `interval` is how its mean is bounded."""

    label: str
    score: Callable[[str, str], float]  # (prediction, answer)
    interval: Callable[[Sequence[float]], Interval]


def summarise(
    metrics: Mapping[str, Metric], values: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, dict[str, Any]]:
    """Per model and metric: mean, low, high, and (but for the first model) `delta` to the first.

    `values`: model -> metric -> the score of each sample, in the same order for every model.
    """
    first = next(iter(values))
    summary: dict[str, dict[str, Any]] = {}
    for model, scores in values.items():
        summary[model] = {}
        for key, metric in metrics.items():
            entry: dict[str, Any] = asdict(metric.interval(scores[key]))
            if model != first:
                pairs = zip(scores[key], values[first][key], strict=True)
                entry["delta"] = asdict(bootstrap([ours - theirs for ours, theirs in pairs]))
            summary[model][key] = entry
    return summary


def format_table(metrics: Mapping[str, Metric], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The summary as aligned plain text in percent, a row per model and one for its deltas."""
    rows = [["model", *(metric.label for metric in metrics.values())]]
    first = next(iter(summary))
    for model, scores in summary.items():
        rows.append([model, *(_cell(scores[key], "") for key in metrics)])
        if model != first:
            deltas = [_cell(scores[key]["delta"], "+") for key in metrics]
            rows.append([f"  - {first}", *deltas])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


class GenerationLog:
    """The answers of one model, one JSON line each, written as they come.

    The first line is `header`: what the answers depend on. A file with the same header is
    continued, and a line torn by a kill is dropped; any other file is begun anew, and `changed`
    names what differs. Without a file the answers are only kept in memory.

    Errors: UserError when `file` holds something else.
    """

    def __init__(self, file: Path | None, header: Mapping[str, Any]) -> None:
        self.file = file
        self.records: dict[int, dict[str, Any]] = {}
        self.changed: list[str] = []
        if file is None:
            return
        found = _whole_lines(file) if file.is_file() else []
        if found:
            self.changed = [key for key in header if found[0].get(key) != header[key]]
            if not self.changed:
                self.records = {record["index"]: record for record in found[1:]}
        with atomic_write(file) as handle:
            for record in [header, *self.records.values()]:
                handle.write(json.dumps(record) + "\n")

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, which has an `index`."""
        self.records[record["index"]] = record
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")


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


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a model answers; those that are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor's name and its usable cores: what a time or a speed was measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": available_cores(),
    }


def _cell(interval: Mapping[str, float], sign: str) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}5.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file's lines, without a last line that has no end."""
    try:
        found = [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{file}: not a file of generations ({error}): remove it") from error
    if not all(isinstance(record, dict) for record in found):
        raise UserError(f"{file}: not a file of generations: remove it")
    return found
