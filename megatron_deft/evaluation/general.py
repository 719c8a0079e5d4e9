"""General tests before and after fine-tuning: what has been forgotten? Any task of lm-eval.

Fine-tuning on one thing can cost others. The published comparisons look at MMLU, IFEval and the
like; lm-eval (EleutherAI's harness) has them, and reads a task of one's own from a YAML file. It
asks and scores; means with intervals, differences to the first model and what is kept for a rerun
are done here.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from math import hypot, sqrt
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.evaluation.engines import engine_name
from megatron_deft.evaluation.folder import check_folder, load_tokenizer
from megatron_deft.evaluation.harness import (
    DTYPES,
    TaskSet,
    calm,
    check_installed,
    free,
    load_model,
    load_tasks,
    measure,
)
from megatron_deft.evaluation.log import labels_of, model_identity, set_aside
from megatron_deft.evaluation.results import format_table, machine, versions
from megatron_deft.evaluation.scoring import results_path
from megatron_deft.evaluation.statistics import Interval, bootstrap
from megatron_deft.files import atomic_write, read_json
from megatron_deft.platform import device

TITLE = "General tests"
AVERAGE = "average"  # of all tasks whose metric is a fraction, of which more is better
_Z = 1.959964  # 95% of a normal distribution lies within as many standard errors
_COLUMNS = 4  # of a table; more tasks make more tables
_MEAN = ""  # the column of the mean: no task has that name

Scores = Mapping[str, Mapping[str, Any]]  # set -> what harness.measure returns


def evaluate(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    engine: str = "auto",
    out: str | Path | None = None,
    names: Sequence[str] | None = None,
    dtype: str = "auto",
    apply_chat_template: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score Hugging Face folders on tasks of lm-eval.

    The first model is what the others are compared with. `tasks`: names, groups, tags or patterns
    of lm-eval, of YAML files under the folder `include_path`, or such files. `limit` takes the
    first so many questions of each task. `num_fewshot`: examples before each question, in place of
    the tasks' own number; a task that fixes it at 0 keeps that, and is named. `batch_size` is
    transformers' alone. `names` (the folders' names unless given) name them in the results.

    `out` is the file for the results, or a folder for results.json. Beside it general_NAME.json
    keeps each model's scores, question by question, and is written after each task: a rerun asks
    only those tasks that are not in it for the same model, questions and settings.

    A task's score is its main metric: acc_norm, acc or exact_match where it has one, else its
    first (all are in general_NAME.json). Its interval is 1.96 standard errors: lm-eval's, or where
    it has none, resampled. The interval of a difference comes from resampling the questions'
    differences, or where a metric is no mean over questions, from the two errors. Scores of several
    tasks are their unweighted mean.

    Returns what results.json holds; scores that are no fractions (perplexities) stand as they are.
    Errors: UserError for lm-eval absent, a task that is unknown or cannot be loaded, a model
    folder or an option that is missing or wrong.
    """
    check_installed()
    folders = [check_folder(model) for model in models]
    labels = labels_of(folders, names)
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: at least 1 is needed")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"num_fewshot={num_fewshot}: 0 or more is needed")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype={dtype}: one of auto, {', '.join(DTYPES)} is needed")
    settings = {
        "engine": engine_name(engine),
        "device": device().type,
        "dtype": dtype,
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "lm_eval": version("lm_eval"),
    }
    if apply_chat_template:
        _check_templates(folders)
    target = results_path(out, "general")
    _say(progress, f"lm-eval: loading {', '.join(tasks)}")
    with calm(progress):
        sets, fixed = load_tasks(tasks, include_path, num_fewshot, limit)
    if fixed:
        _say(True, f"{', '.join(fixed)}: asked without examples, which their authors fixed")

    scores: dict[str, Scores] = {}
    entries: dict[str, dict[str, Any]] = {}
    for label, folder in zip(labels, folders, strict=True):
        header = {"model": model_identity(folder), **settings}
        file = target.with_name(f"general_{label}.json") if target else None
        scores[label] = _scores(label, folder, sets, header, file, batch_size, progress)
        entries[label] = {
            "path": str(folder),
            "identity": header["model"],
            "samples": sum(score["samples"] for score in scores[label].values()),
            "unfinished": None,  # lm-eval does not count them
            "generated_tokens": None,
        }

    summary = _summary(scores)
    results = {
        "task": "general",
        "title": TITLE,
        "data": {"tasks": _asked(sets, scores[labels[0]])},
        "settings": settings,
        "models": {label: {**entries[label], **summary[label]} for label in labels},
        "versions": versions(),
        "machine": machine(),
    }
    if target is not None:
        _write(target, results)
    return results


def describe(results: Mapping[str, Any]) -> str:
    """What results.json holds as plain text: a column per task, and one for their mean."""
    limit = results["settings"]["limit"]
    first = "" if limit is None else f"the first {limit} questions of each, "
    tables = _tables(results["data"]["tasks"], results["models"])
    return f"{results['title']}: {first}percent [95%]\n\n{tables}"


def _scores(
    label: str,
    folder: Path,
    sets: Sequence[TaskSet],
    header: Mapping[str, Any],
    file: Path | None,
    batch_size: int,
    progress: bool,
) -> Scores:
    """Scores of every set: those that `file` has, and those that the model is now asked for."""
    kept = _kept(file, header, progress)
    current = {each.name for each in sets if kept.get(each.name, {}).get("digest") == each.digest}
    todo = [each for each in sets if each.name not in current]
    if current:
        _say(progress, f"{label}: {file} has {len(current)} of {len(sets)} tasks: not asked again")
    model = None
    try:
        for number, each in enumerate(todo, 1):
            _say(progress, f"{label}: {each.name} ({number} of {len(todo)})")
            with calm(progress):
                if model is None:
                    engine, dtype = header["engine"], header["dtype"]
                    model = load_model(engine, folder, batch_size, dtype)
                found = measure(model, each, header["limit"], header["apply_chat_template"])
            kept[each.name] = {"digest": each.digest, **found}
            if file is not None:
                _write(file, {**header, "tasks": kept}, None)  # a line: it has every question
    finally:
        del model
        free()
    return {each.name: kept[each.name] for each in sets}


def _kept(file: Path | None, header: Mapping[str, Any], progress: bool) -> dict[str, Any]:
    """The scores in a file of the same model and settings."""
    if file is None or not file.is_file():
        return {}
    found = read_json(file, f"{file}: no such file", "remove it")
    if not isinstance(found, dict) or not isinstance(found.get("tasks"), dict):
        raise UserError(f"{file}: not a file of general scores: remove it")
    changed = [key for key in header if found.get(key) != header[key]]
    if changed:
        why = f"since {', '.join(changed)} changed"
        _say(progress, f"{file}: begun anew, {why}; what it held is in {set_aside(file)}")
        return {}
    return dict(found["tasks"])


def _check_templates(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not load_tokenizer(folder).chat_template:
            raise UserError(
                f"{folder}: its tokenizer has no chat template: add one, or leave "
                "--apply-chat-template out"
            )


def _interval(score: Mapping[str, Any]) -> Interval:
    """The mean and its 95% interval; one without width where lm-eval has no error for it."""
    mean = score["mean"]
    if score["stderr"] is None:
        return bootstrap(score["values"]) if score["values"] else Interval(mean, mean, mean)
    half = _Z * score["stderr"]
    low, high = (0.0, 1.0) if score["fraction"] else (-float("inf"), float("inf"))
    return Interval(mean, max(mean - half, low), min(mean + half, high))


def _difference(score: Mapping[str, Any], base: Mapping[str, Any]) -> Interval:
    if score["values"] and base["values"]:
        pairs = zip(score["values"], base["values"], strict=True)
        return bootstrap([ours - theirs for ours, theirs in pairs])
    mean = score["mean"] - base["mean"]
    half = _Z * hypot(score["stderr"] or 0, base["stderr"] or 0)
    return Interval(mean, mean - half, mean + half)


def _mean(intervals: Sequence[Interval]) -> Interval:
    """The unweighted mean of independent scores: their errors add in squares."""
    count = len(intervals)
    mean = sum(each.mean for each in intervals) / count
    below = sqrt(sum((each.mean - each.low) ** 2 for each in intervals)) / count
    above = sqrt(sum((each.high - each.mean) ** 2 for each in intervals)) / count
    return Interval(mean, mean - below, mean + above)


def _summary(scores: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """Per model `sets` (set -> metric) and `scores` (metric -> its mean over the sets that have
    it; `average` when there are several), each with `delta` to the first model but for that.
    """
    base = next(iter(scores))
    groups = _groups(scores[base])
    summary: dict[str, dict[str, Any]] = {}
    for label, each in scores.items():
        means = {name: _interval(score) for name, score in each.items()}
        deltas: dict[str, Interval] = {}
        if label != base:
            deltas = {name: _difference(score, scores[base][name]) for name, score in each.items()}
        summary[label] = {
            "scores": {
                metric: _entry(
                    _mean([means[name] for name in names]),
                    _mean([deltas[name] for name in names]) if deltas else None,
                )
                for metric, names in groups.items()
            },
            "sets": {
                name: {score["metric"]: _entry(means[name], deltas.get(name))}
                for name, score in each.items()
            },
        }
    return summary


def _groups(scores: Scores) -> dict[str, list[str]]:
    """Metric -> the sets that have it; and AVERAGE -> the comparable ones, if metrics differ."""
    groups: dict[str, list[str]] = {}
    for name, score in scores.items():
        groups.setdefault(score["metric"], []).append(name)
    comparable = [
        name for name, score in scores.items() if score["fraction"] and score["higher_is_better"]
    ]
    if len(groups) > 1 and len(comparable) > 1:
        groups[AVERAGE] = comparable
    return groups


def _entry(interval: Interval, delta: Interval | None) -> dict[str, Any]:
    return {**asdict(interval), **({} if delta is None else {"delta": asdict(delta)})}


def _asked(sets: Sequence[TaskSet], scores: Scores) -> dict[str, Any]:
    """What each set is: what the report needs to read its score."""
    told = ("metric", "samples", "fewshot", "version", "fraction", "higher_is_better")
    return {
        each.name: {"digest": each.digest, **{key: scores[each.name][key] for key in told}}
        for each in sets
    }


def _tables(asked: Scores, summary: Mapping[str, Mapping[str, Any]]) -> str:
    """A column per set, and one for the mean of those that can be compared."""
    columns = {name: _label(name, score) for name, score in asked.items()}
    groups = _groups(asked)
    mean = next(iter(groups)) if len(groups) == 1 else AVERAGE
    averaged = groups.get(mean, [])
    if len(averaged) > 1:
        columns[_MEAN] = "mean of tasks"
    factors = {name: 1 if score["fraction"] else 0.01 for name, score in asked.items()}
    cells: dict[str, dict[str, Any]] = {}
    for label, each in summary.items():
        cells[label] = {
            name: _shown(each["sets"][name][score["metric"]], factors[name])
            for name, score in asked.items()
        }
        if averaged:
            cells[label][_MEAN] = _shown(each["scores"][mean], factors[averaged[0]])
    keys = list(columns)
    return "\n\n".join(
        format_table({key: columns[key] for key in keys[start : start + _COLUMNS]}, cells)
        for start in range(0, len(keys), _COLUMNS)
    )


def _label(name: str, score: Mapping[str, Any]) -> str:
    notes = [note for note, holds in (
        ("no percent", not score["fraction"]),
        ("less is better", not score["higher_is_better"]),
    ) if holds]  # fmt: skip
    return f"{name} {score['metric']}" + (f" ({', '.join(notes)})" if notes else "")


def _shown(entry: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """An entry for a table in percent: 0.01 shows the number as it is."""
    return {
        key: _shown(value, factor) if isinstance(value, Mapping) else value * factor
        for key, value in entry.items()
    }


def _write(file: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    with atomic_write(file) as handle:
        json.dump(content, handle, indent=indent)
        handle.write("\n")


def _say(progress: bool, text: str) -> None:
    if progress:
        print(text, file=sys.stderr)
