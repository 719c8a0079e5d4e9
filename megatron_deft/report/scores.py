"""Scores of models, from the results.json that `megatron-deft evaluate` writes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.evaluation.results import Interval
from megatron_deft.files import read_json
from megatron_deft.report.runs import Run, Source
from megatron_deft.report.series import number

_REMEDY = "name a file that `megatron-deft evaluate --out` wrote"


@dataclass(frozen=True)
class Score:
    """A mean with its 95% interval, 0 to 1, and how far the base is from it (None: the base)."""

    value: Interval
    delta: Interval | None


Scores = Mapping[str, Score]  # of metrics


@dataclass(frozen=True)
class Model:
    """What was measured of a model: over all sets, and of each, if there are several."""

    label: str
    path: str
    scores: Scores
    sets: Mapping[str, Scores]


@dataclass(frozen=True)
class Results:
    """One results.json; the first model is the base."""

    title: str
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    models: Sequence[Model]

    @property
    def metrics(self) -> list[str]:
        """Every metric, in the order of the file."""
        return list(dict.fromkeys(key for model in self.models for key in model.scores))

    @property
    def sets(self) -> list[str]:
        """Every test set, likewise; none where there is one, whose scores are the model's."""
        names = list(dict.fromkeys(name for model in self.models for name in model.sets))
        return names if len(names) > 1 else []


def read_results(sources: Sequence[Source]) -> list[Results]:
    """The results among the sources. Errors: UserError for a file of another content."""
    return [
        _results(source.results, source.name) for source in sources if source.results is not None
    ]


def _results(path: Path, name: str | None) -> Results:
    content = read_json(path, f"{path} does not exist", _REMEDY)
    try:
        models = [_model(label, model) for label, model in content["models"].items()]
        title = name or content.get("title") or content["task"]
        data, settings = dict(content.get("data") or {}), dict(content.get("settings") or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        models = []
    if not any(model.scores for model in models):
        raise UserError(f"{path} holds no scores of models: {_REMEDY}")
    return Results(str(title), data, settings, models)


def _model(label: str, content: Mapping[str, Any]) -> Model:
    sets = content.get("sets") or {}
    return Model(
        label,
        str(content.get("path", "")),
        _scores(content["scores"]),
        {name: _scores(scores) for name, scores in sets.items()},
    )


def _scores(content: Mapping[str, Any]) -> dict[str, Score]:
    return {
        key: Score(_interval(entry), _interval(entry["delta"]) if "delta" in entry else None)
        for key, entry in content.items()
    }


def _interval(entry: Mapping[str, Any]) -> Interval:
    return Interval(*(number(entry[key]) for key in ("mean", "low", "high")))


def pass_at(metric: str) -> int | None:
    """The k of `pass@k`; None for another metric."""
    found = re.fullmatch(r"pass@(\d+)", metric)
    return int(found[1]) if found else None


def shown(metrics: Sequence[str]) -> list[str]:
    """The metrics that a table shows: of pass@1, 2, 3, ... the powers of two and the last."""
    ks = [k for metric in metrics if (k := pass_at(metric)) is not None]
    kept = {k for k in ks if k & (k - 1) == 0} | set(ks[-1:])
    return [metric for metric in metrics if (k := pass_at(metric)) is None or k in kept]


def told_by_set(metrics: Sequence[str]) -> list[str]:
    """Of the metrics of a table those with a table by set: of pass@k the last; a figure has all."""
    passes = [metric for metric in metrics if pass_at(metric) is not None]
    return [metric for metric in metrics if metric not in passes[:-1]]


def metric_label(metric: str) -> str:
    """A metric's key as words."""
    words = metric.replace("_", " ")
    return {"jaro winkler": "Jaro-Winkler", "exact": "exact match"}.get(words, words)


def run_of(model: Model, runs: Sequence[Run]) -> Run | None:
    """The run in whose folder a model lies; None when it lies in none's."""
    if not model.path:
        return None
    path = Path(model.path).resolve()
    return next((run for run in runs if path.is_relative_to(run.folder.resolve())), None)


def colour_slots(runs: Sequence[Run], results: Sequence[Results]) -> dict[str, int | None]:
    """Name of every run and model -> number of its colour, the same in every figure.

    Runs come first. A model has the colour of the run it came from, the first such model, else,
    but for a base, one of its own. None, which is grey: a base that is no run.
    """
    slots: dict[str, int | None] = {run.name: place for place, run in enumerate(runs)}
    bases = {one.models[0].label for one in results}
    lent = {model.label for one in results for model in one.models} & set(slots)
    free = len(runs)
    for model in (model for one in results for model in one.models):
        if model.label in slots:
            continue
        run = run_of(model, runs)
        if run is not None and run.name not in lent:
            slots[model.label] = slots[run.name]
            lent.add(run.name)
        elif model.label in bases:
            slots[model.label] = None
        else:
            slots[model.label], free = free, free + 1
    return slots
