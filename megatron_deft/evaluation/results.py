"""From the scores of answers to means per model and set, and the tables that compare models."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_deft.evaluation.statistics import Interval, bootstrap, pass_at_k, wilson
from megatron_deft.processes import available_cores

_PACKAGES = (
    "megatron_deft", "torch", "transformers", "tokenizers", "vllm", "lm_eval", "math-verify",
    "latex2sympy2_extended", "sympy", "antlr4-python3-runtime",
)  # fmt: skip

Values = Mapping[str, Mapping[str, Sequence[float]]]  # metric -> set -> the value of each question


@dataclass(frozen=True)
class Metric:
    """What an answer is scored by, from 0 to 1. is_share: each answer has either 0 or 1."""

    label: str
    is_share: bool


def over_samples(
    metrics: Mapping[str, Metric], answers: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
) -> tuple[dict[str, Metric], dict[str, dict[str, list[float]]]]:
    """Of every question, the mean over its answers (avg@n) and the chances of success (pass@k).

    answers: set -> question -> answer -> metric -> value. With one answer to each question the
    metrics stay what they are. k is 2, 4, 8, ... and n; pass@1 is avg@n.
    """
    every = [question for questions in answers.values() for question in questions]
    samples = min(map(len, every))
    if samples == 1:
        return dict(metrics), {
            key: {name: [q[0][key] for q in questions] for name, questions in answers.items()}
            for key in metrics
        }
    tries = sorted({samples, *(2**i for i in range(1, samples.bit_length()))} - {1})
    expanded: dict[str, Metric] = {}
    values: dict[str, dict[str, list[float]]] = {}
    for key, metric in metrics.items():
        prefix, label = ("", "") if len(metrics) == 1 else (f"{key}_", f"{metric.label} ")
        of = {
            name: [[answer[key] for answer in question] for question in questions]
            for name, questions in answers.items()
        }
        expanded[f"{prefix}avg@{samples}"] = Metric(f"{label}avg@{samples}", False)
        values[f"{prefix}avg@{samples}"] = {
            name: [sum(question) / len(question) for question in questions]
            for name, questions in of.items()
        }
        for k in tries if metric.is_share else ():
            expanded[f"{prefix}pass@{k}"] = Metric(f"{label}pass@{k}", False)
            values[f"{prefix}pass@{k}"] = {
                name: [pass_at_k(round(sum(q)), len(q), k) for q in questions]
                for name, questions in of.items()
            }
    return expanded, values


def summarise(
    metrics: Mapping[str, Metric], values: Mapping[str, Values]
) -> dict[str, dict[str, Any]]:
    """Per model: "scores" of each metric, the mean of its sets, and "sets", those of each set.

    Each has mean, low, high and, but for the first model, its `delta` to that. values: of each
    model, the questions of a set in the same order for every model.
    """
    first = next(iter(values.values()))
    summary: dict[str, dict[str, Any]] = {}
    for model, own in values.items():
        base = None if own is first else first
        names = list(next(iter(own.values())))
        summary[model] = {
            "scores": {key: _entry(metrics[key], own, base, key, names) for key in metrics},
            "sets": {
                name: {key: _entry(metrics[key], own, base, key, [name]) for key in metrics}
                for name in names
            },
        }
    return summary


def _entry(
    metric: Metric, own: Values, base: Values | None, key: str, names: Sequence[str]
) -> dict[str, Any]:
    entry: dict[str, Any] = asdict(_interval(metric, [own[key][name] for name in names]))
    if base is not None:
        differences = [
            [ours - theirs for ours, theirs in zip(own[key][name], base[key][name], strict=True)]
            for name in names
        ]
        entry["delta"] = asdict(bootstrap(*differences))
    return entry


def _interval(metric: Metric, sets: Sequence[Sequence[float]]) -> Interval:
    return wilson(sets[0]) if metric.is_share and len(sets) == 1 else bootstrap(*sets)


def describe(results: Mapping[str, Any]) -> str:
    """What results.json holds as plain text, in percent: how it was asked, and the tables.

    Of one set, a table with a column per metric; of several, a table per metric with a column per
    set and their mean. A row per model, and one for its deltas. Of pass@k the largest k is shown.
    """
    settings, data = results["settings"], results["data"]
    drawn = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    how = "greedy" if settings["temperature"] == 0 else drawn
    times = f" x {settings['samples']} answers" if settings["samples"] > 1 else ""
    return (
        f"{results['title']}: {data['samples']} questions{times}, {how}, "
        f"{settings['max_new_tokens']} new tokens, prompt {settings['prompt_type']}; percent "
        f"[95%]\n\n{format_tables(results['metrics'], results['models'])}"
    )


def format_tables(labels: Mapping[str, str], summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of `describe`. labels: of each metric; summary: as `summarise` makes it."""
    shown = _without_small_k(labels)
    sets = list(next(iter(summary.values()))["sets"])
    if len(sets) == 1:
        cells = {model: {k: s["scores"][k] for k in shown} for model, s in summary.items()}
        return format_table({key: labels[key] for key in shown}, cells)
    tables = []
    for key in shown:
        cells = {
            model: {**{name: s["sets"][name][key] for name in sets}, "": s["scores"][key]}
            for model, s in summary.items()
        }
        table = format_table({**{name: name for name in sets}, "": "mean"}, cells)
        tables.append(f"{labels[key]}\n{table}")
    return "\n\n".join(tables)


def _without_small_k(keys: Iterable[str]) -> list[str]:
    last = {key.partition("pass@")[0]: key for key in keys if "pass@" in key}
    return [key for key in keys if "pass@" not in key or key in last.values()]


def format_table(
    columns: Mapping[str, str], cells: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> str:
    """Aligned plain text in percent: a row per model, and one for its deltas to the first.

    columns: key -> label; cells: model -> key -> {mean, low, high, delta}.
    """
    rows = [["model", *columns.values()]]
    first = next(iter(cells))
    for model, entries in cells.items():
        rows.append([model, *(_cell(entries[key], "") for key in columns)])
        if model != first:
            deltas = [_cell(entries[key]["delta"], "+") for key in columns]
            rows.append([f"  - {first}", *deltas])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _cell(interval: Mapping[str, float], sign: str) -> str:
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}5.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


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
