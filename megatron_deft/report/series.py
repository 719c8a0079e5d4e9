"""From metrics to arrays: what the figures show, without drawing. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_deft.errors import UserError
from megatron_deft.report.runs import Record, Run

Array = NDArray[np.float64]
AXES = ("steps", "tokens")
POINTS = 400  # of a drawn line: a panel is about as many pixels wide
COLUMNS = 100  # of a drawn histogram over time


def number(value: Any) -> float:
    """A logged value; nan for what is not a finite number, which metrics.jsonl has as null."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    # float() of a whole number of more than 308 digits, which JSON may hold, is an error
    return float(value) if abs(value) < 1e308 else float("nan")


def positions(run: Run, axis: str) -> Array:
    """Where each record of the run is on the x axis: its step, or the tokens seen by then.

    Tokens count from the first record: a run that went on from another folder's checkpoint begins
    at 0.

    Errors: UserError when tokens are asked for and the run did not log them.
    """
    if axis == "steps":
        return np.array([record["step"] for record in run.records], float)
    tokens = np.array([number(record.get("tokens")) for record in run.records])
    if np.isnan(tokens).any():
        raise UserError(f"{run.folder}: its metrics do not count tokens: use --x steps")
    return np.cumsum(tokens)


@dataclass(frozen=True)
class Curve:
    """A metric over time; y is nan where it was not finite."""

    x: Array
    y: Array


def curve(run: Run, key: str, axis: str = "steps") -> Curve | None:
    """The records of a run that have `key`; None when no value of it is finite."""
    has = np.array([key in record for record in run.records])
    y = np.array([number(record[key]) for record in run.records if key in record])
    return Curve(positions(run, axis)[has], y) if np.isfinite(y).any() else None


def last_value(run: Run, key: str) -> float | None:
    """The last logged value of a metric, nan when that was not finite; None: never logged."""
    for record in reversed(run.records):
        if key in record:
            return number(record[key])
    return None


def smoothing(points: int) -> int:
    """How many steps a smoothed curve averages unless the user says: 2%, odd; 1 below 50 points."""
    return 1 if points < 50 else points // 100 * 2 + 1


def smooth(y: Array, window: int) -> Array:
    """The mean of the `window` (odd) values around each, fewer at the ends; nan stays nan.

    At an end the window shrinks on both sides alike, so that a slope is not bent. Rejected: the
    usual exponential mean, which lags behind by its length.
    """
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    places = np.arange(len(y))
    half = np.minimum(window // 2, np.minimum(places, len(y) - 1 - places))
    low, high = places - half, places + half + 1
    total, count = sums[high] - sums[low], counts[high] - counts[low]
    return np.where(known, total / np.maximum(count, 1), np.nan)


def thin(line: Curve, points: int = POINTS) -> Curve:
    """A curve of at most about `points` points that looks the same: low and high of each piece.

    Rejected: every n-th point, which loses spikes.
    """
    count = len(line.x)
    if count <= points:
        return line
    edges = np.linspace(0, count, points // 2 + 1).astype(int)
    chosen: list[int] = []
    for low, high in pairwise(edges.tolist()):
        piece = line.y[low:high]
        if np.isfinite(piece).any():
            chosen += [low + int(np.nanargmin(piece)), low + int(np.nanargmax(piece))]
        else:
            chosen.append(low)
    chosen = sorted({0, *chosen, count - 1})
    return Curve(line.x[chosen], line.y[chosen])


@dataclass(frozen=True)
class History:
    """A histogram over time.

    shares:  [bins, columns], mean over the steps of a column; each column sums to 1
    low, high: where the first column begins and the last ends, on the x axis
    """

    shares: Array
    low: float
    high: float


def history(run: Run, name: str, axis: str = "steps", columns: int = COLUMNS) -> History | None:
    """The histograms `name`_histogram_0, _1, ... of a run; None when it did not log them.

    Columns are equally wide; one without a step of its own shows the nearest step.
    """
    key = f"{name}_histogram_"
    bins = 0
    while any(f"{key}{bins}" in record for record in run.records):
        bins += 1
    table = np.array(
        [[number(record.get(f"{key}{i}")) for i in range(bins)] for record in run.records]
    )
    if not bins or not (whole := np.isfinite(table).all(1)).any():
        return None
    x, table = positions(run, axis)[whole], table[whole]
    half = (x[-1] - x[0]) / max(len(x) - 1, 1) / 2 or 0.5
    low, high = x[0] - half, x[-1] + half
    columns = min(columns, len(x))
    place = np.minimum(((x - low) / (high - low) * columns).astype(int), columns - 1)
    middles = low + (np.arange(columns) + 0.5) * (high - low) / columns
    shares = [
        table[place == i].mean(0) if (place == i).any() else table[np.abs(x - middles[i]).argmin()]
        for i in range(columns)
    ]
    return History(np.stack(shares, 1), float(low), float(high))


@dataclass(frozen=True)
class Landscape:
    """Where the tokens of some steps lie, and what they pull.

    first, last:  the steps it is summed over, those between them that were logged
    vocab_size:   entropies are shares of its logarithm
    tokens:       [bins of p, bins of entropy], weighted counts
    gate_error:   likewise, sums of |gate| * (1 - p); nan where one was not finite
    """

    first: int
    last: int
    vocab_size: int
    tokens: Array
    gate_error: Array

    @property
    def density(self) -> Array:
        """Share of the tokens in each cell; nan where there is none."""
        return np.where(self.tokens > 0, self.tokens, np.nan) / max(self.tokens.sum(), 1e-300)

    @property
    def mean_gate_error(self) -> Array:
        """Mean |gate| * (1 - p) of the tokens in each cell; nan where there is none."""
        none = self.tokens <= 0
        return np.where(none, np.nan, self.gate_error / np.where(none, 1.0, self.tokens))


def landscapes(run: Run) -> list[Landscape]:
    """Every landscape that a run logged, of one step each. Errors: UserError for a broken one."""
    return [_landscape(run, record) for record in run.records if "landscape" in record]


def _landscape(run: Run, record: Record) -> Landscape:
    step, content = record["step"], record["landscape"]
    try:
        vocab_size, bins = int(content["vocab_size"]), int(content["entropy_bins"])
        tables = [np.array([_padded(row, bins) for row in content[key]], float)
                  for key in ("tokens", "gate_error")]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        tables, vocab_size = [], 0
    if not tables or tables[0].ndim != 2 or tables[0].shape != tables[1].shape:
        raise UserError(f"{run.folder}: the landscape of step {step} is broken: remove it")
    return Landscape(step, step, vocab_size, *tables)


def _padded(row: Sequence[Any], bins: int) -> list[float]:
    """Zeros at the end of a row are not logged."""
    return [number(cell) for cell in row] + [0.0] * (bins - len(row))


def late(found: Sequence[Landscape]) -> Landscape:
    """The landscapes of the second half of the steps as one, at least the last.

    Only those with the bins of the last: another version may have had others.
    """
    end = found[-1]
    chosen = [
        one for one in found if 2 * one.last > end.last and one.tokens.shape == end.tokens.shape
    ]
    return Landscape(
        chosen[0].first,
        end.last,
        end.vocab_size,
        np.sum([one.tokens for one in chosen], 0),
        np.sum([one.gate_error for one in chosen], 0),
    )


def entropy_limits(p: Array, vocab_size: int) -> tuple[Array, Array]:
    """Least and largest entropy / ln(vocab_size) of a distribution that gives the target p.

    The rest, 1 - p, lies on one other token, or evenly on all of them.
    """
    rest = 1 - p
    with np.errstate(divide="ignore", invalid="ignore"):
        least = -np.nan_to_num(p * np.log(p)) - np.nan_to_num(rest * np.log(rest))
    scale = np.log(vocab_size)
    return least / scale, (least + rest * np.log(max(vocab_size - 1, 1))) / scale
