"""`megatron-deft bench loss`: time and memory of the loss and its gradient, ours and others'."""

from __future__ import annotations

import gc
import logging
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_deft.benchmarks import machine, peers
from megatron_deft.benchmarks.arguments import BANDWIDTH, DTYPES, REPETITIONS, STEP, Plan, plans
from megatron_deft.benchmarks.budgets import Row, Rows, judge
from megatron_deft.benchmarks.check import Reference, WrongResultError, verify
from megatron_deft.benchmarks.contenders import Contender, Prepared, contenders, select
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.benchmarks.report import budget_table, legend, plan_table, save
from megatron_deft.benchmarks.timing import CpuClock, CudaClock, clock_for, interleave, peak
from megatron_deft.errors import UserError
from megatron_deft.objectives import parse
from megatron_deft.revision import commit

log = logging.getLogger(__name__)

TORCH_DTYPES = dict(zip(DTYPES, (torch.bfloat16, torch.float16, torch.float32), strict=True))
SPREAD = 4.0  # standard deviation of the logits: a softmax about as peaked as a language model's
BASELINES = ("eager-nll", "eager-deft")
METHOD = (
    "One process; each repetition runs every contender once, in an order of its own; median and "
    "interquartile range over repetitions. Logits normal with standard deviation "
    f"{SPREAD:g}, written anew before each turn outside the clock; loss of every token, then "
    "loss.sum() backward to the logits (upstream gradient 1 per token). Each contender's loss and "
    "gradient were compared with float64 before it was timed."
)


class Case(NamedTuple):
    """A contender on labels of which a fraction is ignored, ready to run."""

    contender: Contender
    ignored: float
    prepared: Prepared


class Settings(NamedTuple):
    """The arguments, checked."""

    device: str
    plans: list[Plan]
    table: dict[str, Contender]
    objective: str
    ignored: list[float]
    threads: int
    repetitions: int


def settings(args: Namespace) -> Settings:
    """Errors: UserError naming the argument."""
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
    return Settings(
        device,
        list(dict.fromkeys(plans(device, args.shape, args.dtype))),
        select(contenders(objective.spec), args.only),
        objective.name if objective == parse("deft") else objective.spec,
        ignored,
        threads,
        repetitions,
    )


def run(args: Namespace) -> int:
    """Measure, print the tables, write the JSON. Returns the exit code: 1 for a wrong result."""
    chosen = settings(args)
    report = _header(args, chosen)
    measured: dict[Plan, Rows] = {}
    print(legend(chosen.table), flush=True)
    with _threads(chosen.threads):
        report["machine"] = machine.machine(chosen.device)
        clock = clock_for(chosen.device)
        report["memory"] = clock.memory
        try:
            for plan in chosen.plans:
                measured[plan] = _measure(plan, chosen, clock, report["wrong"])
                report["rows"] += measured[plan].values()
                report["complete"] = len(measured) == len(chosen.plans)
                report["budgets"] = judge(measured, chosen.device, chosen.threads, chosen.objective)
                print(plan_table(plan, measured[plan]), flush=True)
                save(args.json, report)  # a run that is stopped leaves what it has measured
        finally:
            peers.close()
    print(budget_table(report["budgets"]))
    if args.json:
        print(f"\n{args.json}: everything measured")
    for line in report["wrong"]:
        log.error("WRONG, so not measured: %s", line)
    unmet = args.strict and not all(line["met"] for line in report["budgets"])
    return 1 if report["wrong"] or unmet else 0


def _header(args: Namespace, chosen: Settings) -> dict[str, Any]:
    arguments = {name: getattr(args, name) for name in ("json", "only", "strict")}
    return {
        "benchmark": "loss",
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {},
        "versions": machine.versions(),
        "operators": machine.operators(chosen.device),
        "method": METHOD,
        "arguments": {
            **arguments,
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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inputs(plan: Plan, device: str, ignored: list[float]) -> tuple[Tensor, dict[float, Tensor]]:
    """Logits [tokens, vocabulary], and labels [tokens] for each ignored fraction."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (plan.tokens, plan.vocabulary), TORCH_DTYPES[plan.dtype]
    logits = torch.empty(shape, dtype=dtype, device=device)
    logits.normal_(0.0, SPREAD, generator=generator)
    labels = torch.randint(plan.vocabulary, (plan.tokens,), device=device, generator=generator)
    # every other token is one that the model expects: at random nearly all gates would be 0
    labels[::2] = logits[::2].argmax(-1)
    order = torch.randperm(plan.tokens, device=device, generator=generator)
    return logits, {f: labels.where(order >= round(f * plan.tokens), IGNORE) for f in ignored}


def _measure(plan: Plan, chosen: Settings, clock: CpuClock | CudaClock, wrong: list[str]) -> Rows:
    """One interleaved run; adds to `wrong` the contenders that compute something else."""
    gc.collect()
    if chosen.device == "cuda":
        torch.cuda.empty_cache()
        torch.compiler.reset()  # each shape is compiled as if it were the only one
    began = time.monotonic()
    log.info("%s: checking every contender against float64", plan.title)
    logits, labels = _inputs(plan, chosen.device, [0.0, *chosen.ignored])
    work = logits.clone()
    reference = Reference(logits, labels[0.0], parse(chosen.objective).topk)
    rows: Rows = {}
    cases = []
    for contender in chosen.table.values():
        if contender.kind not in plan.kinds:
            continue
        for ignored in chosen.ignored:
            row = rows[contender.name, ignored] = _row(plan, contender, ignored)
            try:
                case = _prepare(contender, ignored, logits, labels[ignored], work, reference)
                extra = peak(case.prepared.run, logits, work, clock)
            except WrongResultError as error:
                wrong.append(f"{plan.title}, {ignored:g} ignored: {contender.name}: {error}")
                del rows[contender.name, ignored]
            except _AbsentError as error:
                row["status"] = str(error)
            else:
                cases.append(case)
                row["extra_bytes_per_logit"] = None if extra is None else extra / logits.numel()
    del reference
    log.info("%s: %d x %d timed runs", plan.title, chosen.repetitions, len(cases))
    runs = [case.prepared.run for case in cases]
    for case, times in zip(
        cases, interleave(runs, logits, work, clock, chosen.repetitions), strict=True
    ):
        rows[case.contender.name, case.ignored] |= {"status": "measured", **times._asdict()}
    _add_ratios(rows, plan)
    log.info("%s: done in %.0f s", plan.title, time.monotonic() - began)
    return rows


class _AbsentError(Exception):
    """Why a contender of another package has no numbers: its row says it."""


def _prepare(
    contender: Contender,
    ignored: float,
    logits: Tensor,
    labels: Tensor,
    work: Tensor,
    reference: Reference,
) -> Case:
    """Load a contender, run it once, compare. Errors: WrongResultError, _AbsentError."""
    if logits.device.type not in contender.devices:
        raise _AbsentError(f"needs {' or '.join(contender.devices)}")
    if contender.package is not None and peers.version(contender.package) is None:
        raise _AbsentError("not installed")
    work.copy_(logits)
    try:
        prepared = contender.prepare(logits, labels)
        outcome = prepared.outcome(prepared.run(work))
        verify(outcome, reference.expected(contender.objective, labels), contender.rounds_to)
    except torch.OutOfMemoryError as error:
        raise _AbsentError("out of memory") from error
    except WrongResultError:
        raise
    except UserError as error:  # a form that an objective does not have
        raise _AbsentError(f"refused: {error}") from error
    except Exception as error:  # whatever another package raises is a row that says so
        if contender.package is None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise _AbsentError(f"fails: {type(error).__name__}: {reason}") from error
    return Case(contender, ignored, prepared)


def _row(plan: Plan, contender: Contender, ignored: float) -> Row:
    """A contender's row before anything is known of it."""
    return {
        "name": contender.name,
        "what": contender.what,
        "kind": contender.kind,
        "objective": contender.objective if contender.kind == STEP else None,
        "package": contender.package,
        "tokens": plan.tokens,
        "vocabulary": plan.vocabulary,
        "dtype": plan.dtype,
        "ignored": ignored,
        "status": "",
        "median_ms": None,
        "iqr_ms": None,
        "repetitions": 0,
        "bytes_of_a_logit": TORCH_DTYPES[plan.dtype].itemsize,
        "passes": contender.passes,
        "extra_bytes_per_logit": None,
        "gigabytes_per_second": None,
        "share_of_copy": None,
        "speedup_over": dict.fromkeys(BASELINES),
    }


def _add_ratios(rows: Rows, plan: Plan) -> None:
    """Bandwidth where the bytes are known, and ratios to the baselines of the same run.

    Ignored rows need not be read: with some of them, only the contenders that ignore nothing move
    a known number of bytes.
    """
    for (_, ignored), row in rows.items():
        if row["median_ms"] is None:
            continue
        if row["passes"] and (ignored == 0 or row["kind"] == BANDWIDTH):
            moved = row["passes"] * row["bytes_of_a_logit"] * plan.tokens * plan.vocabulary
            row["gigabytes_per_second"] = moved / row["median_ms"] / 1e6
        for baseline in BASELINES:
            other = rows.get((baseline, ignored), {}).get("median_ms")
            if row["kind"] == STEP and other is not None:
                row["speedup_over"][baseline] = other / row["median_ms"]
    for (_, ignored), row in rows.items():
        copy = rows.get(("copy", ignored), {}).get("gigabytes_per_second")
        if copy and row["gigabytes_per_second"]:
            row["share_of_copy"] = row["gigabytes_per_second"] / copy
