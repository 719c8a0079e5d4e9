"""Which figures a report has, with what is said beside each, and which it cannot have and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from megatron_deft.report import draw, maps, series
from megatron_deft.report.draw import Line, Panel
from megatron_deft.report.runs import Run
from megatron_deft.report.scores import Results, pass_at

Slots = Mapping[str, int | None]  # name of a run or model -> its colour's number


@dataclass(frozen=True)
class Plot:
    """A figure: its file's name, heading, what to know when reading it, and how to draw it."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class LeftOut:
    """A figure that cannot be drawn, and why: one sentence."""

    title: str
    reason: str


Part = Plot | LeftOut

# metric, title, whether values may span so much that the axis is logarithmic
TRAINING = (
    ("loss", "loss of the objective", True),
    ("ce", "cross-entropy, nats per token", True),
    ("grad_norm", "gradient norm", True),
    ("val_loss", "validation: loss of the objective", True),
    ("val_ce", "validation: cross-entropy", True),
    ("lr", "learning rate", False),
)
CONFIDENCE = (
    ("gate", "mean trust gate", False),
    ("p", "mean probability p of the target", False),
    ("entropy", "mean entropy, nats", False),
    ("accuracy", "share of targets that are the likeliest token", False),
)
NO_VALIDATION = " There are no validation curves: no run has validation data."
NOT_LOGGED = "No run logged {what}: runs of versions before it was logged do not have it."


def training(runs: Sequence[Run], slots: Slots, axis: str, window: int | None) -> Part:
    """Loss, cross-entropy, gradient norm, validation and learning rate."""
    caption = (
        "Losses of different objectives have different scales; cross-entropy is the same for all "
        f"that keep every token. {_smoothing(runs, window)}"
    )
    if not any(series.curve(run, "val_ce") for run in runs):
        caption += NO_VALIDATION
    return _curves("training", "Training", caption, TRAINING, runs, slots, axis, window)


def confidence(runs: Sequence[Run], slots: Slots, axis: str, window: int | None) -> Part:
    """Trust gate, p, entropy and accuracy."""
    caption = (
        "Means over the trained tokens. The gate is what the objective multiplies a token's "
        f"gradient by; with NLL it is 1. {_smoothing(runs, window)}"
    )
    title = "Trust gate and confidence"
    return _curves("confidence", title, caption, CONFIDENCE, runs, slots, axis, window)


def _smoothing(runs: Sequence[Run], window: int | None) -> str:
    windows = sorted({_window(run, window) for run in runs})
    if windows == [1]:
        return "Every step is shown as it was logged."
    spelled = " to ".join(dict.fromkeys(map(str, (windows[0], windows[-1]))))
    return f"Strong lines are means of {spelled} steps around each, faint ones every step."


def _window(run: Run, window: int | None) -> int:
    return series.smoothing(len(run.records)) if window is None else window


def _curves(
    name: str, title: str, caption: str, metrics: Sequence[tuple[str, str, bool]],
    runs: Sequence[Run], slots: Slots, axis: str, window: int | None,
) -> Part:  # fmt: skip
    panels = []
    for key, label, may_be_log in metrics:
        found = [(run, series.curve(run, key, axis)) for run in runs]
        lines = [
            # validations are few, and each is a mean of many samples
            Line(run.name, slots[run.name], one, 1 if key[:4] == "val_" else _window(run, window))
            for run, one in found
            if one is not None
        ]
        if lines:
            panels.append(Panel(label, lines, may_be_log))
    if not panels:
        return LeftOut(title, NOT_LOGGED.format(what="any of " + ", ".join(k for k, *_ in metrics)))
    return Plot(name, title, caption, partial(draw.curves, panels=panels, axis=axis))


def probabilities(runs: Sequence[Run], axis: str) -> Part:
    """Histograms of p and of the gate over training."""
    title = "Probabilities over training"
    quantities = (("p", "probability p of the target"), ("gate", "trust gate"))
    found = [(run, [series.history(run, name, axis) for name, _ in quantities]) for run in runs]
    kept = [i for i in range(len(quantities)) if any(one[i] is not None for _, one in found)]
    if not kept:
        return LeftOut(title, NOT_LOGGED.format(what="histograms of p or of the gate"))
    rows = [(run.name, [one[i] for i in kept]) for run, one in found if any(one)]
    caption = (
        "Shares of the trained tokens, each column of a map adds up to 1; the colour grows with "
        "the root of the share, and its scale is the same for all runs."
    )
    if 0 not in kept:
        caption += " Without p, whose histogram no run logged: it is newer than these runs."
    names = [quantities[i][1] for i in kept]
    return Plot(
        "probabilities", title, caption + _without(runs, [name for name, _ in rows]),
        partial(maps.histories, rows=rows, titles=names, axis=axis),
    )  # fmt: skip


def landscape(runs: Sequence[Run]) -> Part:
    """Where tokens lie in p and entropy, and what the objective does there."""
    title = "Token gradient landscape"
    logged = ((run, series.landscapes(run)) for run in runs)
    rows = [
        (run.name, found)
        for run, found in logged
        if found and series.late(found).tokens.sum() > 0 and found[0].tokens.sum() > 0
    ]
    if not rows:
        return LeftOut(
            title,
            "No run logged landscapes: monitor.landscape_every was 0, no token was kept, or the "
            "runs are of a version that did not log them.",
        )
    caption = (
        "Where the trained tokens lie by the probability p of the target (across) and the entropy "
        f"of the prediction as a share of its largest value, ln V (up). {maps.GATE_ERROR} = |gate| "
        "(1 - p) is the gradient on the target's logit, the mean of the tokens of each cell. Cells "
        "without tokens are empty; between the thin lines lies all that is possible. The scales "
        "are the same for all runs."
    )
    return Plot(
        "landscape", title, caption + _without(runs, [name for name, _ in rows]),
        partial(maps.landscapes, rows=rows),
    )  # fmt: skip


def _without(runs: Sequence[Run], shown: Sequence[str]) -> str:
    missing = [run.name for run in runs if run.name not in shown]
    return f" Without {', '.join(missing)}: not logged there." if missing else ""


def of_runs(runs: Sequence[Run], slots: Slots, axis: str, window: int | None) -> list[Part]:
    """The figures about training, in the order of the page; none without runs."""
    if not runs:
        return []
    return [
        training(runs, slots, axis, window),
        confidence(runs, slots, axis, window),
        probabilities(runs, axis),
        landscape(runs),
    ]


def of_results(results: Results, number: int, slots: Slots) -> Iterator[Plot]:
    """The figures about one file of scores, the `number`-th."""
    ending = "" if number == 1 else f"_{number}"
    yield Plot(
        f"scores{ending}",
        f"{results.title}: scores",
        "Means with their 95% intervals. Whether two models differ is told by the interval of "
        "their difference, in the table: intervals of the scores may overlap all the same.",
        partial(draw.scores, results=results, slots=slots),
    )
    if sum(pass_at(metric) is not None for metric in results.metrics) > 1:
        yield Plot(
            f"pass_at_k{ending}",
            f"{results.title}: pass@k",
            "The chance that one of k answers is right, with 95% intervals.",
            partial(draw.pass_curves, results=results, slots=slots),
        )
