"""`write_report`: from folders of runs and files of scores to a page and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder, atomic_write

INDEX = "figures.json"  # tells a folder of ours from another
ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class Report:
    """What was written: the page, the folder of its figures, and what is not in it, by heading."""

    page: Path
    folder: Path
    figures: Sequence[Path]
    left_out: Mapping[str, str]


def write_report(
    runs: Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    title: str | None = None,
    axis: str = "steps",
    window: int | None = None,
) -> Report:
    """Write one HTML page about runs and scores, and each of its figures as PNG and SVG beside it.

    Page and folder (OUT without ending, then `_figures`) appear whole, and take the place of those
    of an earlier report, never of anything else.

    Args:
        runs: run folders and results.json, or folders with one; `NAME=PATH` names a run. A model
            of results.json has a run's colour if it has its name or lies in its folder.
        out: the page, .html or .htm.
        title: of the page; default: the names of the runs.
        axis: what curves are drawn over, "steps" or "tokens" seen.
        window: how many steps a smoothed curve averages, 1 or more; default: 2% of the steps.

    Errors: UserError for a path that is neither, broken files, two runs of one name, an `out` that
    is something else or has another ending, and without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise UserError("a report's figures need matplotlib: `pip install 'megatron-deft[report]'`")
    if window is not None and window < 1:
        raise UserError(f"--smooth {window}: must be >= 1, the number of steps to average")
    # matplotlib is slow to import, and optional
    from tqdm import tqdm

    from megatron_deft.report import plots, style
    from megatron_deft.report.page import Content, page
    from megatron_deft.report.render import render
    from megatron_deft.report.runs import find, read_runs
    from megatron_deft.report.scores import colour_slots, read_results

    out = Path(out)
    folder = out.with_name(f"{out.stem}_figures")
    _may_replace(out, folder)
    sources = [find(str(run)) for run in runs]
    found, results = read_runs(sources), read_results(sources)
    slots = colour_slots(found, results)
    style.check_count(len(slots))
    parts = plots.of_runs(found, slots, axis, window)
    scored = [(one, list(plots.of_results(one, i, slots))) for i, one in enumerate(results, 1)]
    every = [*(part for _, some in scored for part in some), *parts]
    chosen = [part for part in every if isinstance(part, plots.Plot)]
    left_out = {part.title: part.reason for part in every if isinstance(part, plots.LeftOut)}
    with atomic_folder(folder, overwrite=True, marker=INDEX) as temporary:
        drawn = {
            plot.name: render(plot, temporary)
            for plot in tqdm(chosen, desc="figures", disable=None, leave=False)
        }
        index = {plot.name: {"title": plot.title, "caption": plot.caption} for plot in chosen}
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    names = ", ".join(run.name for run in found) or ", ".join(one.title for one in results)
    content = Content(
        title or f"Training report: {names}", found, scored, parts, drawn, slots, _version()
    )
    with atomic_write(out) as handle:
        handle.write(page(content))
    files = [folder / f"{plot.name}.{ending}" for plot in chosen for ending in ("png", "svg")]
    return Report(out, folder, files, left_out)


def _may_replace(out: Path, folder: Path) -> None:
    """Errors: UserError when page or folder would replace what no report is, or another is."""
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out names the page, such as {out / 'report.html'}")
    if out.suffix.lower() not in ENDINGS:  # x.txt would have the figures of x.html
        raise UserError(f"--out {out}: a page ends in {' or '.join(ENDINGS)}")
    if out.exists() and not _is_report(out):
        raise UserError(f"{out} exists and is no report: choose another --out")
    if folder.exists() and not (folder / INDEX).is_file():
        raise UserError(f"{folder} exists and holds no report's figures: choose another --out")
    for twin in map(out.with_suffix, ENDINGS):
        if twin != out and twin.is_file() and _is_report(twin):
            raise UserError(f"{folder} holds the figures of {twin}: choose another --out")


def _is_report(page: Path) -> bool:
    from megatron_deft.report.page import MARK

    with open(page, "rb") as handle:
        return MARK in handle.read(1000).decode("utf-8", "replace")


def _version() -> str:
    try:
        return version("megatron-deft")
    except PackageNotFoundError:
        return ""
