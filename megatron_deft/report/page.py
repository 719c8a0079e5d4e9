"""The page: one HTML file with everything in it, readable in any browser and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron_deft.evaluation.results import Interval
from megatron_deft.report.plots import LeftOut, Part, Slots
from megatron_deft.report.runs import Run, differences, planned_steps, spell
from megatron_deft.report.scores import Model, Results, Score, metric_label, shown, told_by_set
from megatron_deft.report.series import last_value, number
from megatron_deft.report.style import colour_name, stylesheet

GENERATOR = "megatron-deft report"
MARK = f'<meta name="generator" content="{GENERATOR}">'
MEAN = "mean of the sets"
LONG = 40  # letters of a name that may be broken anywhere


@dataclass(frozen=True)
class Content:
    """What a page shows; `drawn`: figure's name -> its inline SVG."""

    title: str
    runs: Sequence[Run]
    results: Sequence[tuple[Results, Sequence[Part]]]
    parts: Sequence[Part]
    drawn: Mapping[str, str]
    slots: Slots
    version: str


def page(content: Content) -> str:
    """The whole HTML document."""
    title = escape(content.title)
    scores = [_results(results, parts, content) for results, parts in content.results]
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8">{MARK}',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{stylesheet()}\n</style></head>",
            "<body><main>",
            f"<header><h1>{title}</h1>{_lead(content)}</header>",
            *_runs(content),
            *(line for lines in scores for line in lines),
            *(_part(part, content.drawn) for part in content.parts),
            f"<footer>Made by megatron-deft {escape(content.version)} from metrics.jsonl, "
            "config.yaml and results.json alone.</footer>",
            "</main></body></html>",
            "",
        )
    )


def _lead(content: Content) -> str:
    counts = [(len(content.runs), "training run"), (len(content.results), "table of scores")]
    plural = {"training run": "training runs", "table of scores": "tables of scores"}
    words = [f"{count} {name if count == 1 else plural[name]}" for count, name in counts if count]
    return f'<p class="lead soft">{" and ".join(words)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> str:
    """A table of cells that are HTML; the columns from `numbers` on hold numbers, at the right."""
    first = len(head) if numbers is None else numbers

    def cell(place: int, text: str, tag: str) -> str:
        return f"<{tag}{' class=number' * (place >= first)}>{text}</{tag}>"

    top = "".join(cell(place, text, "th") for place, text in enumerate(head))
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(cell(place, text, "td") for place, text in enumerate(row[1:], 1))
        + "</tr>\n"
        for row in rows
    )
    return (
        '<div class="card scroll"><table>'
        f"<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def _named(name: str, slots: Slots) -> str:
    colour = colour_name(slots[name])
    chip = f'<span class="chip" style="background:var(--{colour})"></span>'
    kind = "named long" if len(name) > LONG else "named"
    return f'<span class="{kind}">{chip}<span>{escape(name)}</span></span>'


def _runs(content: Content) -> list[str]:
    runs = content.runs
    if not runs:
        return []
    columns = [column for column in COLUMNS if any(column[1](run) for run in runs)]
    head = ["run", *(name for name, _ in columns)]
    text = sum(name in ("objective", "model", "data") for name, _ in columns)
    rows = [
        [_named(run.name, content.slots), *(of(run) or "-" for _, of in columns)] for run in runs
    ]
    lines = ["<h2>Runs</h2>", table(head, rows, 1 + text)]
    if notes := [(run.name, note) for run in runs for note in run.notes]:
        items = "".join(f"<li>{escape(name)}: {escape(note)}</li>" for name, note in notes)
        lines.append(f'<ul class="note">{items}</ul>')
    return lines + _differences(content)


def _differences(content: Content) -> list[str]:
    known = [run for run in content.runs if run.config]
    if len(known) < 2:
        return []
    lines, rows = ["<h2>What differs in their configurations</h2>"], differences(known)
    if not rows:
        return [*lines, '<p class="soft">Nothing but the folder they write.</p>']
    cells = [
        [f"<code>{escape(key)}</code>", *(f'<div class="wrap">{escape(v)}</div>' for v in values)]
        for key, values in rows
    ]
    return [*lines, table(["key", *(_named(run.name, content.slots) for run in known)], cells)]


def _steps(run: Run) -> str:
    done, planned = run.records[-1]["step"], planned_steps(run)
    return f"{done} of {planned}" if planned is not None and done < planned else f"{done}"


def _configured(*keys: str) -> Any:
    """The first of the keys that a run has set, as a cell."""

    def of(run: Run) -> str:
        values = (run.config.get(key) for key in keys)
        value = next((value for value in values if value), None)
        return f'<div class="wrap">{escape(spell(value))}</div>' if value else ""

    return of


def _last(key: str) -> Any:
    def of(run: Run) -> str:
        value = last_value(run, key)
        return "" if value is None else figure(value)

    return of


def _tokens(run: Run) -> str:
    total = sum(number(record.get("tokens")) for record in run.records)
    return "" if total != total else count(total)


def figure(value: float) -> str:
    """A number for a table, four digits."""
    return "not finite" if value != value else f"{value:.4g}"


def count(value: float) -> str:
    """A large whole number: 1234567 -> 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


COLUMNS = (
    ("objective", lambda run: escape(run.objective) if run.config else ""),
    ("model", _configured("model.load", "model.hf")),
    ("data", _configured("data.train_sets", "data.train_files")),
    ("steps", _steps),
    ("tokens", _tokens),
    ("last loss", _last("loss")),
    ("last cross-entropy", _last("ce")),
    ("validation cross-entropy", _last("val_ce")),
)


def _results(results: Results, parts: Sequence[Part], content: Content) -> list[str]:
    base, metrics = results.models[0], shown(results.metrics)
    lines = [f"<h2>{escape(results.title)}: {_against(results)}</h2>"]
    lines.append(
        f'<p class="soft">In percent, with 95% intervals. Below each score: how far it is from '
        f"{escape(base.label)}; bold where the interval of the difference leaves out 0.</p>"
        if len(results.models) > 1
        else '<p class="soft">In percent, with 95% intervals.</p>'
    )
    names = [_named(model.label, content.slots) for model in results.models]
    cells = [[_score(model.scores.get(key)) for key in metrics] for model in results.models]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    lines.append(table(["model", *(escape(metric_label(key)) for key in metrics)], rows, 1))
    for key in told_by_set(metrics) if results.sets else ():
        lines.append(f"<h3>{escape(metric_label(key))} by set</h3>")
        cells = [_by_set(model, key, results) for model in results.models]
        rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
        lines.append(table(["model", MEAN, *map(_set, results.sets)], rows, 1))
    lines += [_part(part, content.drawn, heading=False) for part in parts]
    lines.append(f'<p class="note">{_facts(results)}</p>')
    return lines


def _set(name: str) -> str:
    text = escape(name)
    return f'<div class="long">{text}</div>' if len(name) > LONG else text


def _against(results: Results) -> str:
    return "base and objectives" if len(results.models) > 1 else "scores"


def _by_set(model: Model, key: str, results: Results) -> list[str]:
    sets = [model.sets.get(name, {}).get(key) for name in results.sets]
    return [_score(score) for score in (model.scores.get(key), *sets)]


def _score(score: Score | None) -> str:
    if score is None or score.value.mean != score.value.mean:
        return "-"
    cell = f"{100 * score.value.mean:.1f} <small>{_interval(score.value, '')}</small>"
    if score.delta is not None:
        low, high = score.delta.low, score.delta.high
        mean = f"{100 * score.delta.mean:+.1f}"
        text = f'<span class="sure">{mean}</span>' if low > 0 or high < 0 else mean
        cell += f"<small>{text} {_interval(score.delta, '+')}</small>"
    return cell


def _interval(interval: Interval, sign: str) -> str:
    return f"[{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def _facts(results: Results) -> str:
    pairs = [*results.data.items(), *results.settings.items()]
    return escape("; ".join(f"{key}: {spell(value)}" for key, value in pairs))


def _part(part: Part, drawn: Mapping[str, str], heading: bool = True) -> str:
    title = f"<h2>{escape(part.title)}</h2>" if heading else ""
    if isinstance(part, LeftOut):
        return f'{title}<p class="missing">Not shown. {escape(part.reason)}</p>'
    return (
        f'{title}<figure id="{part.name}"><div class="scroll"><div class="plot">'
        f"{drawn[part.name]}</div></div><figcaption>{escape(part.caption)}</figcaption></figure>"
    )
