"""The figures, drawn with matplotlib in the light colours; which arrays they show is series'.

Figures are made without pyplot: it keeps a global list of them and looks for a display.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from megatron_deft.evaluation.results import Interval
from megatron_deft.report import series, style
from megatron_deft.report.scores import Model, Results, Score, Scores, metric_label, pass_at, shown
from megatron_deft.report.series import Curve
from megatron_deft.report.style import LIGHT

WIDTH = 11.0  # inches; text is 10 points
MEAN = "mean of the sets"
ROUND = (1, 2, 5, 10)  # what the first digit of a step between ticks may be


@dataclass(frozen=True)
class Line:
    """A curve and how it looks: name and colour of its run; what is averaged for the thick line."""

    name: str
    slot: int | None
    curve: Curve
    window: int = 1


@dataclass(frozen=True)
class Panel:
    """Curves of one metric, one per run that has it."""

    title: str
    lines: Sequence[Line]
    may_be_log: bool = False


def settings() -> dict[Any, Any]:
    """matplotlib's rcParams for a LIGHT."""
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "text.color": LIGHT.ink,
        "text.parse_math": False,  # a name may hold a $
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.titlecolor": LIGHT.ink,
        "axes.labelcolor": LIGHT.soft,
        "axes.labelsize": 9.5,
        "axes.edgecolor": LIGHT.faint,
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LIGHT.faint,
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT.faint,
        "ytick.color": LIGHT.faint,
        "xtick.labelcolor": LIGHT.soft,
        "ytick.labelcolor": LIGHT.soft,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "figure.facecolor": LIGHT.surface,
        "legend.frameon": False,
        "legend.handlelength": 1.6,
        "svg.fonttype": "none",  # letters, not outlines: small, and they can be searched
        "svg.hashsalt": "megatron_deft",
    }


def grid(rows: int, columns: int, row_height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of axes, each so many inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.04)
    figure = Figure(figsize=(WIDTH, rows * row_height + 0.6), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def _columns(count: int) -> int:
    """How many panels stand beside one another."""
    return {1: 1, 2: 2, 4: 2}.get(count, 3)


def _panels(count: int, row_height: float) -> tuple[Figure, list[Axes], list[Axes]]:
    """A grid of `count` axes, the rest empty; and those of them with none below."""
    columns = _columns(count)
    rows = -(-count // columns)
    figure, places = grid(rows, columns, row_height)
    flat = [axes for row in places for axes in row]
    for axes in flat[count:]:
        axes.remove()
    return figure, flat[:count], flat[max(0, count - columns) : count]


def _legend(figure: Figure, names: Iterable[tuple[str, int | None]]) -> None:
    """Names of the lines above all panels; none for a single one."""
    entries = dict(names)
    if len(entries) < 2:
        return
    handles = [
        Line2D([], [], color=style.colour(slot), linestyle=style.dash(slot), linewidth=2.4)  # type: ignore[arg-type]
        for slot in entries.values()
    ]
    labels = [brief(name) for name in entries]
    longest = max(map(len, labels))
    columns = max(1, min(len(entries), 110 // (longest + 6)))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def curves(panels: Sequence[Panel], axis: str) -> Figure:
    """Small multiples over steps or tokens: the mean of a few steps strong, each step faint."""
    figure, places, lowest = _panels(len(panels), 2.5)
    for axes, panel in zip(places, panels, strict=True):
        axes.set_title(panel.title)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        for place, line in enumerate(panel.lines):
            # a line that others cover shows at their sides
            covers = sum(_same(line.curve, other.curve) for other in panel.lines[place + 1 :])
            _draw_line(axes, line, 1.9 + 1.5 * covers)
        if panel.may_be_log and _spreads(panel.lines):
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        time_axis(axes, axis)
        if axes in lowest:
            axes.set_xlabel(axis)
    _legend(figure, ((line.name, line.slot) for panel in panels for line in panel.lines))
    return figure


def _same(one: Curve, other: Curve) -> bool:
    return np.array_equal(one.x, other.x) and np.array_equal(one.y, other.y, equal_nan=True)


def _draw_line(axes: Axes, line: Line, width: float) -> None:
    look: dict[str, Any] = {
        "color": style.colour(line.slot),
        "linestyle": style.dash(line.slot),
        "solid_capstyle": "round",
    }
    raw = series.thin(line.curve)
    if line.window > 1:
        axes.plot(raw.x, raw.y, alpha=0.28, linewidth=0.9, **{**look, "linestyle": "-"})
        smoothed = Curve(line.curve.x, series.smooth(line.curve.y, line.window))
        raw = series.thin(smoothed)
    # a point between two gaps would not be seen without a mark
    few = np.isfinite(raw.y).sum() <= 30
    axes.plot(raw.x, raw.y, linewidth=width, marker="o" if few else "", markersize=4, **look)


def _spreads(lines: Sequence[Line]) -> bool:
    """Whether values span so much that a linear axis would hide most of them."""
    values = np.concatenate([line.curve.y for line in lines])
    values = values[np.isfinite(values)]
    return bool(values.min() > 0 and values.max() > 100 * values.min())


def short(value: float) -> str:
    """A number beside an axis: 2e-5, not 2e-05 or an offset somewhere else."""
    return f"{value:g}".replace("e-0", "e-").replace("e+0", "e")


def brief(name: str, most: int = 40) -> str:
    """A name of at most so many letters, its middle left out: figures have no room for more."""
    head = most // 2
    tail = most - head - 1
    return name if len(name) <= most else f"{name[:head]}\N{HORIZONTAL ELLIPSIS}{name[-tail:]}"


def time_axis(axes: Axes, axis: str) -> None:
    """Whole steps, or tokens in k and M."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=ROUND))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if axis == "tokens" else "{x:g}")


def scores(results: Results, slots: Mapping[str, int | None]) -> Figure:
    """A panel per metric: each model's mean with its 95% interval, in percent."""
    metrics, models = shown(results.metrics), results.models
    figure, places, _ = _panels(len(metrics), 0.34 * len(models) + 0.75)
    for axes, metric in zip(places, metrics, strict=True):
        axes.set_title(metric_label(metric))
        axes.grid(axis="x")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        for place, model in enumerate(models):
            if (score := model.scores.get(metric)) is not None:
                _draw_score(axes, style.colour(slots[model.label]), score, place)
        first = axes.get_subplotspec().colspan.start == 0  # type: ignore[union-attr]
        names = [brief(model.label) if first else "" for model in models]
        axes.set_yticks(range(len(models)), names, color=LIGHT.ink)
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.margins(x=0.16)
        if _all_zero(*axes.get_xlim()):
            axes.set_xlim(-0.16, 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
        axes.xaxis.set_major_formatter("{x:g}%")
    return figure


def _draw_score(axes: Axes, colour: str, score: Score, place: int) -> None:
    value = score.value
    mean, low, high = 100 * value.mean, 100 * value.low, 100 * value.high
    axes.plot([low, high], [place, place], color=colour, linewidth=2.6, alpha=0.55)
    axes.plot([mean], [place], "o", color=colour, markersize=8)
    if np.isfinite(mean):
        axes.annotate(f"{mean:.1f}", (mean, place), xytext=(0, 7), textcoords="offset points",
                      ha="center", va="bottom", fontsize=8.5)  # fmt: skip


def pass_curves(results: Results, slots: Mapping[str, int | None]) -> Figure:
    """pass@k over k, for the mean of the sets and each set, with 95% bands."""
    groups: list[tuple[str, Callable[[Model], Scores]]] = [
        (MEAN if results.sets else "", lambda model: model.scores)
    ]
    groups += [(name, _scores_of(name)) for name in results.sets]
    figure, places, lowest = _panels(len(groups), 2.5)
    for axes, (title, of) in zip(places, groups, strict=True):
        axes.set_title(brief(title))
        axes.grid(axis="y")
        axes.tick_params(length=0)
        for model in results.models:
            points = _passes(of(model))
            ks, slot = sorted(points), slots[model.label]
            colour, low = style.colour(slot), [100 * points[k].low for k in ks]
            axes.fill_between(ks, low, [100 * points[k].high for k in ks], color=colour,
                              alpha=0.14, linewidth=0)  # fmt: skip
            axes.plot(
                ks,
                [100 * points[k].mean for k in ks],
                color=colour,
                linewidth=1.9,
                linestyle=style.dash(slot),
                marker="o",
                markersize=3.5,
                clip_on=False,  # a mark at 0 is whole
            )  # type: ignore[arg-type]
        axes.set_xscale("log", base=2)
        axes.set_xticks(_pass_ticks({k for model in results.models for k in _passes(of(model))}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(0.0, bottom), 1.0 if _all_zero(bottom, top) else top)
        axes.yaxis.set_major_formatter("{x:g}%")
        if axes in lowest:
            axes.set_xlabel("k, answers per question")
    _legend(figure, ((model.label, slots[model.label]) for model in results.models))
    return figure


def _passes(scores: Scores) -> dict[int, Interval]:
    found = ((pass_at(metric), score.value) for metric, score in scores.items())
    return {k: value for k, value in found if k is not None}


def _pass_ticks(ks: set[int]) -> list[int]:
    """The last k, and the powers of two from the first on that are not too near to it."""
    first, last = min(ks, default=1), max(ks, default=1)
    powers = (2**i for i in range(last.bit_length()))
    return [*(k for k in powers if first <= k < last / 1.3), last]


def _all_zero(low: float, high: float) -> bool:
    """Whether these are the limits that an axis of shares has whose values are all 0."""
    return low < 0 < high and abs(low + high) < 1e-9


def _scores_of(name: str) -> Callable[[Model], Scores]:
    return lambda model: model.sets.get(name, {})
