"""From the answers of models to scores, the file of results and the tables.

It needs nothing but what was written of the answers, so it can be done again without a model, and
on another machine.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.evaluation.log import Key, label_of, read_log
from megatron_deft.evaluation.results import (
    machine,
    over_samples,
    summarise,
    versions,
)
from megatron_deft.evaluation.task import Record, Task
from megatron_deft.files import atomic_write, read_json
from megatron_deft.processes import available_cores

TASKS = ("math", "medical", "figfont")
_HEADER = ("task", "model", "data")  # what stands in a log's header beside the settings
_FIELDS = {  # of what is read of a log
    "header": {
        "task": str, "model": str, "data": str, "prompt_type": str, "max_new_tokens": int,
        "temperature": float, "top_p": float, "plan": dict,
    },
    "plan": {"path": str, "data": list, "samples": int, "questions": list},
    "answer": {
        "index": int, "sample": int, "set": str, "gold": dict, "output": str, "tokens": int,
        "finished": bool,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """The answers of one model: where it is, its log's header, and a list for each question."""

    path: str
    header: Mapping[str, Any]
    questions: Sequence[Sequence[Record]]


def find_task(name: str) -> Task:
    """The task of that name. Errors: UserError for none, with those there are."""
    if name not in TASKS:
        raise UserError(f"task={name}: one of {', '.join(TASKS)} is needed")
    task: Task = import_module(f"megatron_deft.evaluation.{name}").TASK
    return task


def results_path(out: str | Path | None, task: str) -> Path | None:
    """Where the results of a task go: `out`, or results.json in it.

    Errors: UserError where there is something else than results of this task already.
    """
    if out is None:
        return None
    path = Path(out) if Path(out).suffix == ".json" else Path(out) / "results.json"
    if path.is_dir():
        raise UserError(f"{path} is a folder: name another --out")
    if path.exists():
        found = read_json(path, f"{path}: no such file", "name another --out")
        other = found.get("task") if isinstance(found, dict) else None
        if other != task:
            what = f"results of {other}" if other else "something else"
            raise UserError(f"{path} holds {what}, not of {task}: name another --out")
    return path


def score(
    files: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """Score files of answers (generations_NAME.jsonl) that `evaluate` wrote.

    The files must be of one task, the same questions and settings; the first is what the others are
    compared with. partial: take a file that is not finished, of which the longest questions come
    first, as far as it goes; every file's questions that are not answered in all are left out.

    Returns and writes the same as `evaluate`. Errors: UserError for a file that is none, is not
    finished, or does not go with the first.
    """
    if not files:
        raise UserError("no file to score: name generations_NAME.jsonl of `evaluate --out`")
    found: dict[str, Answers] = {}
    sources: list[str] = []
    indices: list[set[int]] = []
    for file in map(Path, files):
        if not file.is_file():
            raise UserError(f"{file}: no such file: `evaluate --out` writes generations_NAME.jsonl")
        header, records = read_log(file, "name one that `evaluate` wrote")
        _check(file, "header", header)
        plan = header.pop("plan")
        _check(file, "plan", plan)
        for record in records.values():
            _check(file, "answer", record)
        rows = _whole_questions(file, plan, records, partial)
        indices.append(set(rows))
        label = label_of(file)
        if label in found:
            raise UserError(f"two files are of {label}: rename one")
        found[label] = Answers(plan["path"], header, [rows[index] for index in sorted(rows)])
        sources = sources or plan["data"]
    first = next(iter(found.values()))
    for label, answers in found.items():
        differ = [k for k, v in first.header.items() if k != "model" and answers.header.get(k) != v]
        if differ:
            raise UserError(f"{label}: {', '.join(differ)} differ from {next(iter(found))}'s")
    common = set.intersection(*indices)
    if not common:
        raise UserError("no question is answered in all files: run `evaluate` again, it goes on")
    samples = min(len(row) for answers in found.values() for row in answers.questions)
    found = {
        label: replace(a, questions=[r[:samples] for r in a.questions if r[0]["index"] in common])
        for label, a in found.items()
    }
    task = find_task(first.header["task"])
    return score_answers(task, found, sources, workers, results_path(out, task.name))


def _check(file: Path, what: str, found: Mapping[str, Any]) -> None:
    """Errors: UserError where a part of a log lacks what `evaluate` writes."""
    wrong = [name for name, kind in _FIELDS[what].items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise UserError(
            f"{file}: not a file of generations (its {what} has no right "
            f"{', '.join(wrong)}): name one that `evaluate` wrote"
        )


def _whole_questions(
    file: Path, plan: Mapping[str, Any], records: Mapping[Key, Record], partial: bool
) -> dict[int, list[Record]]:
    """Question -> its answers, of the planned ones that have all."""
    samples, wanted = plan["samples"], plan["questions"]
    rows = {
        index: [records[index, s] for s in range(samples) if (index, s) in records]
        for index in wanted
    }
    rows = {index: row for index, row in rows.items() if len(row) == samples}
    missing = len(wanted) - len(rows)
    if missing > 0 and not partial:
        raise UserError(
            f"{file}: {missing} of {len(wanted)} questions are not answered: run the same "
            "`evaluate` again, it goes on; or pass --partial to score the others"
        )
    return rows


def score_answers(
    task: Task,
    found: Mapping[str, Answers],
    data: Sequence[str],
    workers: int | None,
    target: Path | None,
) -> dict[str, Any]:
    """What results.json holds, which is written to `target`."""
    if workers is not None and workers < 1:
        raise UserError(f"workers={workers}: at least 1 is needed")
    flat = [record for answers in found.values() for row in answers.questions for record in row]
    scored = iter(task.score(flat, workers or available_cores()))
    values, metrics = {}, dict(task.metrics)
    for label, answers in found.items():
        by_set: dict[str, list[list[dict[str, float]]]] = {}
        for row in answers.questions:
            by_set.setdefault(row[0]["set"], []).append([next(scored) for _ in row])
        metrics, values[label] = over_samples(task.metrics, by_set)
    summary = summarise(metrics, values)
    first = next(iter(found.values()))
    settings = {key: value for key, value in first.header.items() if key not in _HEADER}
    results = {
        "task": task.name,
        "title": task.title,
        "data": {
            "path": data[0] if len(data) == 1 else list(data),
            "samples": len(first.questions),
            "sets": {
                name: len(questions)
                for name, questions in next(iter(next(iter(values.values())).values())).items()
            },
            "blake2b": first.header["data"],
        },
        "settings": {**settings, "samples": len(first.questions[0])},
        "models": {
            label: {**_counts(answers), **summary[label]} for label, answers in found.items()
        },
        "metrics": {key: metric.label for key, metric in metrics.items()},
        "versions": versions(),
        "machine": machine(),
    }
    if target is not None:
        with atomic_write(target) as handle:
            json.dump(results, handle, indent=2)
            handle.write("\n")
    return results


def _counts(answers: Answers) -> dict[str, Any]:
    records = [record for row in answers.questions for record in row]
    return {
        "path": answers.path,
        "identity": answers.header["model"],
        "samples": len(answers.questions),
        "unfinished": sum(not record["finished"] for record in records),
        "generated_tokens": sum(record["tokens"] for record in records),
    }
