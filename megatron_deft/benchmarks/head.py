"""`megatron-deft bench head`: time and memory from hidden states to the gradients of the head."""

from __future__ import annotations

import gc
import logging
import time
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_deft.benchmarks.arguments import HeadPlan, head_plans
from megatron_deft.benchmarks.budgets import Row, Rows
from megatron_deft.benchmarks.check import WrongResultError
from megatron_deft.benchmarks.head_budgets import BUDGETS
from megatron_deft.benchmarks.head_check import HeadReference
from megatron_deft.benchmarks.head_contenders import HeadContender, contenders
from megatron_deft.benchmarks.head_inputs import make_inputs
from megatron_deft.benchmarks.head_memory import Case, peaks, peaks_apart
from megatron_deft.benchmarks.head_report import head_table
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.benchmarks.report import legend
from megatron_deft.benchmarks.shared import (
    SPREAD,
    AbsentError,
    Settings,
    attempt,
    measure_all,
    settings,
)
from megatron_deft.benchmarks.timing import CpuClock, CudaClock, interleave
from megatron_deft.loss.linear_head import plan_of, tile_dtype
from megatron_deft.objectives import parse

log = logging.getLogger(__name__)

BASELINES = ("logits-main-grad", "logits")
METHOD = (
    "One process for the times; each repetition runs every contender once, in an order of its "
    "own; median and interquartile range over repetitions. Hidden states and weight normal, "
    f"logits with standard deviation {SPREAD:g}; hidden states written anew before each turn "
    "outside the clock. From hidden states to the gradients of hidden states and weight of the "
    "sum of the losses (upstream gradient 1 per token). gradient_in main_grad: an fp32 tensor "
    "that exists before and is added to inside the clock, by the operator itself or, from a "
    "temporary weight.grad, by main_grad += weight.grad, as megatron-core's "
    "DistributedDataParallel does without gradient accumulation fusion. gradient_in weight.grad: "
    "a fresh tensor of the weight's dtype, made inside the clock. Each contender's losses, and "
    "its gradients of some hidden states and rows of the weight, were compared with float64 "
    "before it was timed; the error may be twice that of the plain formula in the same dtype. On "
    "CUDA fused_linear_loss is told the number of kept tokens, which is counted outside the "
    "clock. products: of the kept tokens alone. peak_bytes: of one run, above what was there "
    "before it (hidden states, weight, labels and, for all, main_grad), less the bytes of a fresh"
    " weight.grad. Counted are thus logits, their copies, the gradient of the hidden states, what"
    " sums are made in, and a temporary weight.grad beside main_grad. On the CPU peaks are those "
    "of a process of its own, whose malloc gives back blocks of 1 MiB and more as soon as they "
    "are freed. chunk_bytes: chunk_tokens rows of logits, of the plan that fused_linear_loss "
    "makes for the kept tokens. peak_bytes_at_twice: peak_bytes with the same hidden states and "
    "labels twice; its budget leaves out hidden_gradient_bytes, what their gradient takes, summed"
    " in fp32 and handed on in their own dtype."
)


def run(args: Namespace) -> int:
    """Measure, print the tables, write the JSON. Returns the exit code: 1 for a wrong result."""
    chosen = settings(
        args,
        lambda device, args: head_plans(device, args.shape, args.dtype, args.ignored),
        contenders,
    )
    print(legend(chosen.table), flush=True)
    return measure_all("head", METHOD, args, chosen, _measure, BUDGETS, head_table)


def _measure(
    plan: HeadPlan, chosen: Settings, clock: CpuClock | CudaClock, wrong: list[str]
) -> Rows:
    """One interleaved run; adds to `wrong` the contenders that compute something else."""
    gc.collect()
    if chosen.device == "cuda":
        torch.cuda.empty_cache()
        torch.compiler.reset()  # each shape is compiled as if it were the only one
    began = time.monotonic()
    log.info("%s: checking every contender against float64", plan.title)
    hidden, weight, every_label, labels = make_inputs(plan, chosen.device)
    work = hidden.clone()
    rows: Rows = {}
    cases: list[Case] = []
    reference = HeadReference(hidden, weight, every_label, parse(chosen.spec).topk)
    for ignored in plan.ignored:
        for contender in chosen.table.values():
            row = _row(plan, contender, ignored, labels[ignored], weight)
            try:
                case = _prepare(
                    contender, ignored, hidden, weight, labels[ignored], work, reference
                )
            except WrongResultError as error:
                wrong.append(f"{plan.title}, {ignored:g} ignored: {contender.name}: {error}")
                continue
            except AbsentError as error:
                row["status"] = str(error)
            else:
                cases.append(case)
            rows[contender.name, ignored] = row
    del reference
    if chosen.device == "cpu":
        keys = [(case.contender.name, case.ignored) for case in cases]
        found = peaks_apart(plan, chosen, keys)
    else:
        found = peaks(cases, hidden, weight, labels, clock)
    for key, bytes_of in found.items():
        rows[key] |= bytes_of
    log.info("%s: %d x %d timed runs", plan.title, chosen.repetitions, len(cases))
    runs = [case.run for case in cases]
    for case, times in zip(
        cases, interleave(runs, hidden, work, clock, chosen.repetitions), strict=True
    ):
        rows[case.contender.name, case.ignored] |= {"status": "measured", **times._asdict()}
    _add_ratios(rows)
    log.info("%s: done in %.0f s", plan.title, time.monotonic() - began)
    return rows


def _prepare(
    contender: HeadContender,
    ignored: float,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    work: Tensor,
    reference: HeadReference,
) -> Case:
    """Load a contender, run it once, compare. Errors: WrongResultError, AbsentError."""
    work.copy_(hidden)
    weight.grad = None
    weight.main_grad.zero_()  # type: ignore[attr-defined]
    with attempt(contender.package, contender.devices, work.device.type):
        run = contender.prepare(weight, labels)
        outcome = run(work)
        if contender.objective is not None:
            rounding = contender.rounding(work, weight)
            reference.verify(outcome, contender.objective, labels, rounding)
    return Case(contender, ignored, run)


def _row(
    plan: HeadPlan, contender: HeadContender, ignored: float, labels: Tensor, weight: Tensor
) -> Row:
    """A contender's row before anything is known of it."""
    dtype = tile_dtype(weight)
    kept = int((labels != IGNORE).sum())
    chunk_tokens = plan_of(weight, kept).chunk_tokens
    row: dict[str, Any] = {
        "name": contender.name,
        "what": contender.what,
        "objective": contender.objective,
        "package": contender.package,
        "gradient_in": contender.gradient_in,
        "tokens": plan.tokens,
        "hidden": plan.hidden,
        "vocabulary": plan.vocabulary,
        "dtype": plan.dtype,
        "ignored": ignored,
        "status": "",
        "median_ms": None,
        "iqr_ms": None,
        "repetitions": 0,
        "time_over": dict.fromkeys(BASELINES),
        "logits_bytes": plan.tokens * plan.vocabulary * weight.itemsize,
        "chunk_tokens": chunk_tokens if contender.is_fused else None,
        "chunk_bytes": None,
        "hidden_gradient_bytes": plan.tokens * plan.hidden * sum({4, weight.itemsize}),
        "peak_bytes": None,
        "peak_bytes_at_twice": None,
        "peak_over": dict.fromkeys(("logits_bytes", "chunk_bytes", *BASELINES)),
    }
    if contender.is_fused:
        row["chunk_bytes"] = chunk_tokens * plan.vocabulary * dtype.itemsize
    return row


def _add_ratios(rows: Rows) -> None:
    """Time and peak over those of the paths over the logits, on the same labels, in this run."""
    for (_, ignored), row in rows.items():
        against = {name: rows.get((name, ignored), {}) for name in BASELINES}
        for name, other in against.items():
            row["time_over"][name] = _ratio(row["median_ms"], other.get("median_ms"))
            row["peak_over"][name] = _ratio(row["peak_bytes"], other.get("peak_bytes"))
        for name in ("logits_bytes", "chunk_bytes"):
            row["peak_over"][name] = _ratio(row["peak_bytes"], row[name])


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
