"""`megatron-deft bench loss`: time and memory of the loss and its gradient, ours and others'."""

from __future__ import annotations

import gc
import logging
import time
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_deft.benchmarks.arguments import BANDWIDTH, STEP, Plan, plans
from megatron_deft.benchmarks.budgets import BUDGETS, Row, Rows
from megatron_deft.benchmarks.check import Reference, WrongResultError, verify
from megatron_deft.benchmarks.contenders import Contender, Prepared, contenders
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.benchmarks.report import legend, plan_table
from megatron_deft.benchmarks.shared import (
    SPREAD,
    TORCH_DTYPES,
    AbsentError,
    Settings,
    attempt,
    measure_all,
    settings,
)
from megatron_deft.benchmarks.timing import CpuClock, CudaClock, interleave, peak
from megatron_deft.objectives import parse

log = logging.getLogger(__name__)

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


def run(args: Namespace) -> int:
    """Measure, print the tables, write the JSON. Returns the exit code: 1 for a wrong result."""
    chosen = settings(args, lambda device, args: plans(device, args.shape, args.dtype), contenders)
    print(legend(chosen.table), flush=True)
    return measure_all("loss", METHOD, args, chosen, _measure, BUDGETS, plan_table)


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
    device = chosen.device
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.compiler.reset()  # each shape is compiled as if it were the only one
    began = time.monotonic()
    log.info("%s: checking every contender against float64", plan.title)
    logits, labels = _inputs(plan, device, [0.0, *chosen.ignored])
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
            except AbsentError as error:
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


def _prepare(
    contender: Contender,
    ignored: float,
    logits: Tensor,
    labels: Tensor,
    work: Tensor,
    reference: Reference,
) -> Case:
    """Load a contender, run it once, compare. Errors: WrongResultError, AbsentError."""
    work.copy_(logits)
    with attempt(contender.package, contender.devices, logits.device.type):
        prepared = contender.prepare(logits, labels)
        outcome = prepared.outcome(prepared.run(work))
        verify(outcome, reference.expected(contender.objective, labels), contender.rounds_to)
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
