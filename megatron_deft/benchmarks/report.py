"""The measurements as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_deft.benchmarks.arguments import Plan
from megatron_deft.benchmarks.budgets import Row, Rows
from megatron_deft.benchmarks.contenders import Contender
from megatron_deft.files import atomic_write

HEADER = (
    "contender",
    "ms",
    "iqr",
    "x eager-nll",
    "x eager-deft",
    "GB/s",
    "of copy",
    "extra B/logit",
)


def save(path: str | None, report: Mapping[str, Any]) -> None:
    """Write everything measured as JSON, where a file is named."""
    if path is not None:
        with atomic_write(path) as handle:
            json.dump(report, handle, indent=1)
            handle.write("\n")


def legend(table: dict[str, Contender]) -> str:
    """What the contenders' names stand for."""
    return columns((), [(name, contender.what) for name, contender in table.items()]) + "\n"


def plan_table(plan: Plan, rows: Rows) -> str:
    """A table for each ignored fraction."""
    return tables_by_fraction(plan.title, rows, HEADER, _cells)


def tables_by_fraction(
    title: str, rows: Rows, header: tuple[str, ...], cells_of: Callable[[Row], tuple[str, ...]]
) -> str:
    """A table for each ignored fraction, its lines made by `cells_of`."""
    parts = []
    for fraction in dict.fromkeys(ignored for _, ignored in rows):
        cells = [cells_of(row) for (_, ignored), row in rows.items() if ignored == fraction]
        parts += [
            f"{title}, {fraction:.0%} of the tokens ignored",
            columns(header, cells, right=True),
            "",
        ]
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    if row["median_ms"] is None:
        return (row["name"], row["status"])
    over = row["speedup_over"]
    return (
        row["name"],
        number(row["median_ms"], "{:.3f}" if row["median_ms"] < 10 else "{:.1f}"),
        number(row["iqr_ms"], "{:.3f}" if row["median_ms"] < 10 else "{:.1f}"),
        number(over["eager-nll"], "{:.2f}"),
        number(over["eager-deft"], "{:.2f}"),
        number(row["gigabytes_per_second"], "{:.1f}"),
        number(row["share_of_copy"], "{:.0%}"),
        number(row["extra_bytes_per_logit"], "{:.4f}"),
    )


def number(value: float | None, form: str) -> str:
    """A value, or - where there is none."""
    return "-" if value is None else form.format(value)


def budget_table(budgets: list[Row]) -> str:
    """Every budget with what was required and measured."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    cells = [
        (b["name"], b["where"], b["required"], number(b["measured"], "{:.3g}"), words[b["met"]])
        for b in budgets
    ]
    return columns(("budget", "where", "required", "measured", ""), cells)


def columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: bool = False) -> str:
    """Aligned text: the first column to the left, the others to the right if `right`.

    A row shorter than the longest has its last cell as it is: a remark instead of numbers.
    """
    lines = [*([header] if header else []), *rows]
    count = max((len(line) for line in lines), default=0)
    widths = [
        max((len(line[i]) for line in lines if len(line) == count or i == 0), default=0)
        for i in range(count)
    ]
    text = []
    for first, *rest in lines:
        numbers = right and len(rest) == count - 1
        shown = [
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width in zip(rest, widths[1:], strict=False)
        ]
        text.append("  ".join([first.ljust(widths[0]), *shown]).rstrip())
    return "\n".join(text)
