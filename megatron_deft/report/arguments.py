"""The arguments of `report`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse

from megatron_deft.options import add_number

TEXT = (
    "Write one HTML page about training runs and scores. With curves, the trust gate, histograms "
    "of p, the token gradient landscape of each objective, what differs between the runs, and a "
    "table of base and objectives; each figure is also written as PNG and SVG. It needs no server "
    "and no network, neither to make it nor to read it."
)
EXAMPLE = (
    "report deft=runs/deft nll=runs/nll results.json --out deft.html\n"
    "  megatron-deft report runs/deft --x tokens"
)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `report`."""
    add = parser.add_argument
    add(
        "runs", nargs="+", metavar="RUN",
        help="run folder, or a file that `evaluate --out` wrote, or its folder; NAME=RUN names it",
    )  # fmt: skip
    add(
        "--out", default="report.html", metavar="FILE",
        help="page to write; its figures go into FILE_figures without .html [report.html]",
    )  # fmt: skip
    add("--title", help="of the page [the runs' names]")
    add("--x", choices=("steps", "tokens"), default="steps", help="what curves run over [steps]")
    add_number(parser, "--smooth", None, "steps that a smoothed curve averages, 1: none [2%%]")


def run_report(args: argparse.Namespace) -> int:
    """Write the report; returns 0."""
    from megatron_deft.report.write import write_report

    report = write_report(args.runs, args.out, title=args.title, axis=args.x, window=args.smooth)
    for title, reason in report.left_out.items():
        print(f"left out: {title}. {reason}")
    figures = len(report.figures) // 2
    print(f"{report.page}: a page with {figures} figures; as PNG and SVG: {report.folder}")
    return 0
