"""Peak memory of the contenders of `bench head`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple

from torch import Tensor

from megatron_deft.benchmarks import peers
from megatron_deft.benchmarks.arguments import HeadPlan
from megatron_deft.benchmarks.head_contenders import GRAD, HeadContender, contenders
from megatron_deft.benchmarks.head_inputs import make_inputs
from megatron_deft.benchmarks.shared import Settings, threads
from megatron_deft.benchmarks.timing import Clock, Run, clock_for, peak

Key = tuple[str, float]  # contender, fraction of the tokens that is ignored
Peaks = dict[str, int | None]
# Of glibc: blocks from so many bytes on come from the system, and go back when they are freed.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


class Case(NamedTuple):
    """A contender on labels of which a fraction is ignored, ready to run."""

    contender: HeadContender
    ignored: float
    run: Run


def peaks(
    cases: Sequence[Case],
    hidden: Tensor,
    weight: Tensor,
    labels: dict[float, Tensor],
    clock: Clock,
) -> dict[Key, Peaks]:
    """Bytes of a run above what was there before; of ours without the logits also with twice the
    tokens.
    """
    found: dict[Key, Peaks] = {}
    for case in cases:
        mine: Peaks = {"peak_bytes": _above(case, case.run, hidden, weight, clock)}
        if case.contender.is_fused:
            run = case.contender.prepare(weight, labels[case.ignored].repeat(2))
            twice = _above(case, run, hidden.repeat(2, 1), weight, clock)
            mine["peak_bytes_at_twice"] = twice
        found[case.contender.name, case.ignored] = mine
    return found


def _above(case: Case, run: Run, hidden: Tensor, weight: Tensor, clock: Clock) -> int | None:
    work = hidden.clone()
    gc.collect()
    weight.amax()  # there, and not what the system took back
    weight.main_grad.amax()  # type: ignore[attr-defined]
    extra = peak(run, hidden, work, clock)
    fresh = weight.nbytes if case.contender.gradient_in == GRAD else 0
    return None if extra is None else max(0, extra - fresh)


def peaks_apart(plan: HeadPlan, chosen: Settings, keys: Sequence[Key]) -> dict[Key, Peaks]:
    """The same on the CPU, in a process of its own whose malloc keeps nothing large that is freed.

    What it keeps otherwise depends on what ran before: one run of ours showed 42 to 117 MB.
    """
    spawn = get_context("spawn")
    with _environment(MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_peaks_here, plan, chosen.spec, chosen.threads, keys).result()


def _peaks_here(
    plan: HeadPlan, spec: str, number_of_threads: int, keys: Sequence[Key]
) -> dict[Key, Peaks]:
    table = contenders(spec)
    try:
        with threads(number_of_threads):
            hidden, weight, _, labels = make_inputs(plan, "cpu")
            cases = [
                Case(table[name], ignored, table[name].prepare(weight, labels[ignored]))
                for name, ignored in keys
            ]
            return peaks(cases, hidden, weight, labels, clock_for("cpu"))
    finally:
        peers.close()


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """What a process that is started in the block gets."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
