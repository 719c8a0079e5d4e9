"""What the kernels have to achieve: a table of budgets, each met or not by what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from megatron_deft.benchmarks.arguments import HeadPlan, Plan

Row = dict[str, Any]
Rows = dict[tuple[str, float], Row]  # of one plan, by contender and ignored fraction


class Measure(Protocol):
    """What a budget is about: a number out of the rows of one plan."""

    @property
    def of(self) -> tuple[str, ...]:
        """The contenders it is about."""

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""


@dataclass(frozen=True)
class Speedup:
    """How many times as long `over` takes as the fastest of `of`, nothing ignored."""

    over: str
    of: tuple[str, ...]

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""
        times = [median(rows, name) for name in self.of]
        known = [time for time in times if time is not None]
        baseline = median(rows, self.over)
        return baseline / min(known) if known and baseline is not None else None


@dataclass(frozen=True)
class Extra:
    """Peak memory of a contender above its inputs, as a share of the logits."""

    of: tuple[str]

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""
        row = rows.get((self.of[0], 0.0), {})
        extra = row.get("extra_bytes_per_logit")
        return None if extra is None else extra / row["bytes_of_a_logit"]


@dataclass(frozen=True)
class CopyShare:
    """Bandwidth of a kernel as a share of a copy's, nothing ignored."""

    of: tuple[str]

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""
        return rows.get((self.of[0], 0.0), {}).get("share_of_copy")


@dataclass(frozen=True)
class HalfIgnored:
    """Time with half of the tokens ignored over the time with none."""

    of: tuple[str]

    def __call__(self, rows: Rows) -> float | None:
        """None where a part of it was not measured."""
        whole, half = median(rows, self.of[0]), median(rows, self.of[0], 0.5)
        return half / whole if whole and half is not None else None


@dataclass(frozen=True)
class Budget:
    """A line of the budget table.

    at_least: whether the measured value has to be at least `required`, or at most
    plan:     the one it is set for; None: every plan of the device
    threads:  of the CPU that it is set for
    """

    name: str
    measure: Measure
    required: float
    device: str
    at_least: bool = True
    plan: Plan | HeadPlan | None = None
    threads: int | None = None

    def concerns(self, rows: Rows) -> bool:
        """Whether what it is about took part in a run, installed or not."""
        return any(name in self.measure.of for name, _ in rows)

    def line(self, measured: float | None, where: str) -> Row:
        """The budget as it is reported; met is None when nothing was measured."""
        met = None
        if measured is not None:
            met = measured >= self.required if self.at_least else measured <= self.required
        return {
            "name": self.name,
            "where": where,
            "required": f"{'>=' if self.at_least else '<='} {self.required:g}",
            "measured": measured,
            "met": met,
        }


def median(rows: Rows, name: str, ignored: float = 0.0) -> float | None:
    """Median time of a contender in milliseconds, if it was measured."""
    return rows.get((name, ignored), {}).get("median_ms")


_OURS = ("ours-inplace-single",)
_OUT = ("ours-out-single", "ours-out-two")
_cpu = partial(Budget, device="cpu", plan=Plan(512, 151936, "bf16"), threads=2)
_cuda = partial(Budget, device="cuda")
BUDGETS = (
    _cpu("deft in place, one read, over eager DEFT", Speedup("eager-deft", _OURS), 14),
    _cpu("deft in place, one read, over eager NLL", Speedup("eager-nll", _OURS), 5.5),
    _cpu("deft out of place, best form, over eager DEFT", Speedup("eager-deft", _OUT), 8),
    _cpu("deft out of place, best form, over eager NLL", Speedup("eager-nll", _OUT), 3.5),
    _cpu("deft in place, one read: extra memory over logits", Extra(_OURS), 0.01, at_least=False),
    *(_cuda(f"{kernel}: share of copy bandwidth", CopyShare((kernel,)), 0.9)
      for kernel in ("row_stats", "gate_grad")),
    # 0.50 or, as ignored rows are written all the same, 0.75 of the bytes; a tenth more of time
    *(_cuda(f"{kernel}: half ignored over none ignored", HalfIgnored((kernel,)), required,
            at_least=False)
      for kernel, required in (("row_stats", 0.55), ("gate_grad", 0.825),
                               ("row_stats_grad", 0.825))),
    *(_cuda(f"deft in place, one read, over {peer}", Speedup(peer, _OURS), required)
      for peer, required in (("megatron", 3), ("megatron-fused", 2), ("liger", 2),
                             ("liger-vocab-parallel", 2), ("eager-deft", 8))),
)  # fmt: skip


def judge(
    measured: Mapping[Any, Rows],
    device: str,
    threads: int,
    objective: str,
    budgets: tuple[Budget, ...] = BUDGETS,
) -> list[Row]:
    """The budgets of a device, each for every plan it is set for.

    measured: by plan; the budgets speak of DEFT, so of another objective they say "not measured"
    """
    lines = []
    for budget in budgets:
        if budget.device != device:
            continue
        asked = objective == "deft" and budget.threads in (None, threads)
        rows_of = {
            plan: rows
            for plan, rows in measured.items()
            if asked
            and (not budget.plan or plan.title == budget.plan.title)
            and budget.concerns(rows)
        }
        suffix = f", {budget.threads} threads" if budget.threads else ""
        for plan, rows in rows_of.items():
            lines.append(budget.line(budget.measure(rows), plan.title + suffix))
        if not rows_of:
            where = budget.plan.title if budget.plan else "every shape"
            lines.append(budget.line(None, where + suffix))
    return lines
