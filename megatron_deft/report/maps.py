"""Maps: histograms over time, and where tokens lie in p and entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from megatron_deft.report import series, style
from megatron_deft.report.draw import brief, grid, time_axis
from megatron_deft.report.series import History, Landscape
from megatron_deft.report.style import LIGHT

GATE_ERROR = "|gate \N{MULTIPLICATION SIGN} error|"
SHARES = (0, 0.05, 0.25, 0.5, 1)
PULL = f"mean {GATE_ERROR}"


def histories(
    rows: Sequence[tuple[str, Sequence[History | None]]], titles: Sequence[str],
    axis: str,
) -> Figure:  # fmt: skip
    """A row per run: shares of tokens over time and value, a column per quantity.

    Colours grow with the root of the share: most bins hold little, one may hold nearly all.
    """
    figure, places = grid(len(rows), len(titles), 2.0)
    ramp = _ramp(style.DENSITY)
    for column, title in enumerate(titles):
        shown = [one for _, histories in rows if (one := histories[column]) is not None]
        norm = PowerNorm(0.5, 0.0, max(float(one.shares.max()) for one in shown))
        image = None
        for (name, histories), axes in zip(rows, (row[column] for row in places), strict=True):
            axes.set_title(f"{brief(name, 28)}: {title}")
            one = histories[column]
            if one is None:
                _not_logged(axes)
                continue
            shares = np.where(one.shares > 0, one.shares, np.nan)  # nothing is not little
            image = axes.imshow(
                shares, cmap=ramp, norm=norm, origin="lower", aspect="auto",
                interpolation="none", extent=(one.low, one.high, 0.0, 1.0),
            )  # fmt: skip
            time_axis(axes, axis)
            axes.set_yticks([0, 0.5, 1])
        places[-1][column].set_xlabel(axis)
        _bar(figure, image, [row[column] for row in places], "share of the tokens", percent=True)
    return figure


def landscapes(rows: Sequence[tuple[str, Sequence[Landscape]]]) -> Figure:
    """A row per run: tokens of the first and of the last steps, and the mean |gate x error|.

    The scales are the same for all runs. Thin lines: no distribution lies outside them.
    """
    figure, places = grid(len(rows), 3, 2.6)
    late = [series.late(found) for _, found in rows]
    densest = max(_largest(one.density) for one in [*late, *(found[0] for _, found in rows)])
    density = LogNorm(densest / 1e3, densest, clip=True)
    strongest = max(_largest(one.mean_gate_error) for one in late)
    pull = Normalize(0.0, min(1.0, strongest) or 1.0)
    top = max(_top(one) for one in [*late, *(found[0] for _, found in rows)])
    images: list[Any] = []
    for (name, found), last, line in zip(rows, late, places, strict=True):
        one = last.first == last.last
        steps = f"step {last.last}" if one else f"steps {last.first}-{last.last}"
        pictures = (
            (
                f"{brief(name, 20)}: tokens, step {found[0].first}",
                found[0].density,
                density,
                style.DENSITY,
            ),
            (f"tokens, {steps}", last.density, density, style.DENSITY),
            (f"{PULL}, {steps}", last.mean_gate_error, pull, style.PULL),
        )
        for axes, (title, values, norm, colours) in zip(line, pictures, strict=True):
            axes.set_title(title)
            images.append(_map(axes, values, _ramp(colours), norm))
            _limits(axes, last.vocab_size)
            axes.set_ylim(0, top)
            axes.set_xlim(0, 1)
        line[0].set_ylabel("entropy / ln V")
    for axes in places[-1]:
        axes.set_xlabel("probability p of the target")
    left = [axes for line in places for axes in line[:2]]
    _bar(figure, images[0], left, "share of the tokens", percent=True)
    label = f"{PULL}, 1 and more as 1" if strongest > 1 else PULL
    _bar(figure, images[2], [line[2] for line in places], label)
    return figure


def _largest(values: series.Array) -> float:
    """Of those that are finite; 0 without one."""
    return float(np.max(values[np.isfinite(values)], initial=0.0))


def _top(one: Landscape) -> float:
    """The upper end of the entropies that occur, with a little room."""
    bins = np.flatnonzero(one.tokens.sum(0) > 0)
    return min(1.0, (int(bins[-1]) + 2) / one.tokens.shape[1]) if len(bins) else 1.0


def _map(axes: Axes, values: series.Array, ramp: Any, norm: Normalize) -> Any:
    axes.tick_params(length=0)
    return axes.imshow(
        values.T, cmap=ramp, norm=norm, origin="lower", aspect="auto", interpolation="none",
        extent=(0.0, 1.0, 0.0, 1.0),
    )  # fmt: skip


def _limits(axes: Axes, vocab_size: int) -> None:
    p = np.linspace(0, 1, 201)
    for limit in series.entropy_limits(p, vocab_size):
        axes.plot(p, limit, color=LIGHT.soft, linewidth=0.8, alpha=0.7)


def _ramp(colours: Sequence[str]) -> LinearSegmentedColormap:
    # cells without a value are see-through, which is matplotlib's default
    return LinearSegmentedColormap.from_list("ramp", list(colours))


def _not_logged(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not logged by this run", ha="center", va="center",
              transform=axes.transAxes, alpha=0.6)  # fmt: skip


def _bar(
    figure: Figure, image: Any, axes: Sequence[Axes], label: str, percent: bool = False,
) -> None:  # fmt: skip
    """The scale of a column of maps, below it."""
    width = 0.6 if len({one.get_subplotspec().colspan.start for one in axes}) == 1 else 0.4  # type: ignore[union-attr]
    bar = figure.colorbar(
        image, ax=list(axes), location="bottom", shrink=width, aspect=28, pad=0.03
    )
    assert bar.solids is not None
    bar.solids.set_rasterized(True)  # an image, as the maps are
    bar.outline.set_visible(False)  # type: ignore[operator]
    if isinstance(image.norm, PowerNorm):  # where the root is told in the middle of the scale too
        bar.set_ticks([share for share in SHARES if share <= (image.norm.vmax or 1)])
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.set_label(label)
    if percent:
        bar.ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
