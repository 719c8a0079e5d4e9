"""What `bench loss` and `bench head` share: arguments, the report around the rows, absent peers."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_deft.benchmarks import machine, peers
from megatron_deft.benchmarks.arguments import DTYPES, REPETITIONS
from megatron_deft.benchmarks.budgets import Budget, Rows, judge
from megatron_deft.benchmarks.check import WrongResultError
from megatron_deft.benchmarks.contenders import select
from megatron_deft.benchmarks.report import budget_table, save
from megatron_deft.benchmarks.timing import CpuClock, CudaClock, clock_for
from megatron_deft.errors import UserError
from megatron_deft.objectives import parse
from megatron_deft.revision import commit

log = logging.getLogger(__name__)

SPREAD = 4.0  # standard deviation of the logits: a softmax about as peaked as a language model's
TORCH_DTYPES = dict(zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))


class Settings(NamedTuple):
    """The arguments, checked.

    objective: as it is shown; spec: as `parse` takes it
    plans:     the runs, in order, each with a `title`
    table:     the contenders, by name
    """

    device: str
    objective: str
    spec: str
    ignored: list[float]
    threads: int
    repetitions: int
    plans: list[Any]
    table: dict[str, Any]


def settings(
    args: Namespace,
    plans: Callable[[str, Namespace], list[Any]],
    contenders: Callable[[str], dict[str, Any]],
) -> Settings:
    """Errors: UserError naming the argument.

    plans: (device, arguments) -> runs; contenders: (objective's spec) -> every contender
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; drop it to measure on the CPU")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file in it")
    repetitions = REPETITIONS[device] if args.repetitions is None else args.repetitions
    threads = torch.get_num_threads() if args.threads is None else args.threads
    for name, value in (("--repetitions", repetitions), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    ignored = [0.0, 0.5] if args.ignored is None else list(dict.fromkeys(args.ignored))
    for fraction in ignored:
        if not 0 <= fraction < 1:
            raise UserError(f"--ignored {fraction:g}: expected a fraction, at least 0 and below 1")
    objective = parse(args.objective)
    shown = objective.name if objective == parse("deft") else objective.spec
    return Settings(
        device,
        shown,
        objective.spec,
        ignored,
        threads,
        repetitions,
        list(dict.fromkeys(plans(device, args))),
        select(contenders(objective.spec), args.only),
    )


def _header(benchmark: str, method: str, args: Namespace, chosen: Settings) -> dict[str, Any]:
    """The report before anything is measured."""
    return {
        "benchmark": benchmark,
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {},
        "versions": machine.versions(),
        "operators": machine.operators(chosen.device),
        "method": method,
        "arguments": {
            **{name: getattr(args, name) for name in ("json", "only", "strict")},
            "device": chosen.device,
            "plans": [plan.title for plan in chosen.plans],
            "objective": chosen.objective,
            "ignored": chosen.ignored,
            "threads": chosen.threads,
            "repetitions": chosen.repetitions,
        },
        "rows": [],
        "wrong": [],
        "budgets": [],
    }


def measure_all(
    benchmark: str,
    method: str,
    args: Namespace,
    chosen: Settings,
    measure: Callable[[Any, Settings, CpuClock | CudaClock, list[str]], Rows],
    budgets: tuple[Budget, ...],
    table: Callable[[Any, Rows], str],
) -> int:
    """Measure every plan, print its table, write the JSON; the exit code, 1 for a wrong result.

    measure: one interleaved run; adds to its last argument who computed something else
    """
    report = _header(benchmark, method, args, chosen)
    measured: dict[Any, Rows] = {}
    with threads(chosen.threads):
        report["machine"] = machine.machine(chosen.device)
        clock = clock_for(chosen.device)
        report["memory"] = clock.memory
        try:
            for plan in chosen.plans:
                measured[plan] = measure(plan, chosen, clock, report["wrong"])
                report["rows"] += measured[plan].values()
                report["complete"] = len(measured) == len(chosen.plans)
                report["budgets"] = judge(
                    measured, chosen.device, chosen.threads, chosen.objective, budgets
                )
                print(table(plan, measured[plan]), flush=True)
                save(args.json, report)  # a run that is stopped leaves what it has measured
        finally:
            peers.close()
    return conclude(report, args, "WRONG, so not measured")


def conclude(report: Mapping[str, Any], args: Namespace, wrong: str) -> int:
    """Print the budgets and what was `wrong`; the exit code, 1 for that, or as --strict asks."""
    print(budget_table(report["budgets"]))
    if args.json:
        print(f"\n{args.json}: everything measured")
    for line in report["wrong"]:
        log.error("%s: %s", wrong, line)
    unmet = args.strict and not all(line["met"] for line in report["budgets"])
    return 1 if report["wrong"] or unmet else 0


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's CPU threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class AbsentError(Exception):
    """Why a contender has no numbers: its row says it."""


@contextmanager
def attempt(package: str | None, needs: tuple[str, ...], device: str) -> Iterator[None]:
    """Within it a contender is loaded, run once and compared.

    package: the distribution it comes in, None for our own
    needs:   the device types it runs on
    Errors: AbsentError; WrongResultError; from a contender of our own whatever it raises.
    """
    if device not in needs:
        raise AbsentError(f"needs {' or '.join(needs)}")
    if package is not None and peers.version(package) is None:
        raise AbsentError("not installed")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AbsentError("out of memory") from error
    except WrongResultError:
        raise
    except UserError as error:  # a form that an objective does not have
        raise AbsentError(f"refused: {error}") from error
    except Exception as error:  # whatever another package raises is a row that says so
        if package is None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise AbsentError(f"fails: {type(error).__name__}: {reason}") from error
