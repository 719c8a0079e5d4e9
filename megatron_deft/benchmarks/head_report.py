"""The measurements of `bench head` as text, and as the README's table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_deft.benchmarks.arguments import HeadPlan
from megatron_deft.benchmarks.budgets import Row, Rows
from megatron_deft.benchmarks.report import number, tables_by_fraction

HEADER = (
    "contender",
    "gradient in",
    "ms",
    "iqr",
    "x logits-main-grad",
    "x logits",
    "peak MB",
    "of logits",
    "of logits-main-grad's",
    "of logits'",
    "chunks",
    "MB at twice",
)


def head_table(plan: HeadPlan, rows: Rows) -> str:
    """A table for each ignored fraction."""
    return tables_by_fraction(plan.title, rows, HEADER, _cells)


def _cells(row: Row) -> tuple[str, ...]:
    if row["median_ms"] is None:
        return (row["name"], row["status"])
    digits = "{:.3f}" if row["median_ms"] < 10 else "{:.1f}"
    return (
        row["name"],
        row["gradient_in"],
        digits.format(row["median_ms"]),
        digits.format(row["iqr_ms"]),
        *_ratios(row),
    )


def _ratios(row: Row) -> tuple[str, ...]:
    over, peak = row["time_over"], row["peak_over"]
    return (
        number(over["logits-main-grad"], "{:.2f}"),
        number(over["logits"], "{:.2f}"),
        _megabytes(row["peak_bytes"]),
        number(peak["logits_bytes"], "{:.2f}"),
        number(peak["logits-main-grad"], "{:.2f}"),
        number(peak["logits"], "{:.2f}"),
        number(peak["chunk_bytes"], "{:.2f}"),
        _megabytes(row["peak_bytes_at_twice"]),
    )


def _megabytes(value: int | None) -> str:
    return number(None if value is None else value / 1e6, "{:.1f}")


def markdown(report: dict[str, Any]) -> str:
    """The README's tables, one for each shape and dtype, with all contenders that were measured."""
    plans: dict[str, list[Row]] = {}
    for row in report["rows"]:
        plan = HeadPlan(row["tokens"], row["hidden"], row["vocabulary"], row["dtype"])
        if row["status"] == "measured":
            plans.setdefault(plan.title, []).append(row)
    return "\n\n".join(_markdown_table(title, rows) for title, rows in plans.items())


def _markdown_table(title: str, rows: list[Row]) -> str:
    fractions = dict.fromkeys(row["ignored"] for row in rows)
    found = {(row["name"], row["ignored"]): row for row in rows}
    head = [title, *(f"ms, {fraction:.0%} ignored" for fraction in fractions)]
    head += ["over the logits path", "peak, MB", "of its peak", "of the logits", "chunks"]
    lines = [head, ["---"] * len(head)]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [found.get((name, fraction), {}) for fraction in fractions]
        times = [(row.get("median_ms"), row.get("iqr_ms")) for row in mine]
        over = [row["time_over"]["logits-main-grad"] if row else None for row in mine]
        worst = max(filter(None, mine), key=lambda row: row["peak_bytes"] or 0)
        peak = worst["peak_over"]
        lines.append(
            [
                f"`{name}`",
                *(f"{number(ms, '{:.0f}')} ± {number(iqr, '{:.0f}')}" for ms, iqr in times),
                ", ".join(number(value, "{:.2f}") for value in over),
                _megabytes(worst["peak_bytes"]),
                number(peak["logits-main-grad"], "{:.2f}"),
                number(peak["logits_bytes"], "{:.2f}"),
                number(peak["chunk_bytes"], "{:.2f}"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
