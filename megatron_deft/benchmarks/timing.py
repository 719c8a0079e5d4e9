"""How it is measured: interleaved repetitions, device clocks, and the peak of memory.

The contenders of one run take turns: each repetition runs every one of them once, in an order of
its own, so that a machine that slows down slows all of them, and none always follows the same other
(in a fixed rotation, the one after the eager forms found memory fragmented and took twice as long).
The orders are the same in every run.

Before each turn the logits are written anew into the same buffer, outside the clock: a CPU's cache
then holds their end, which is read last, and a GPU's is flushed. What a contender allocates, it
allocates inside the clock; its result is freed outside.
"""

from __future__ import annotations

import ctypes
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Run = Callable[[Tensor], Any]
FLUSH_BYTES = 1 << 31  # read before each CUDA turn: far more than any L2
HEAD_START_CYCLES = 4_000_000  # 2 ms of the GPU, in which the host enqueues a contender's kernels


class Times(NamedTuple):
    """Median and interquartile range of the repetitions, milliseconds."""

    median_ms: float
    iqr_ms: float
    repetitions: int


class Clock(Protocol):
    """Runs something on the logits' buffer and says how long it took, or how much memory."""

    def seconds(self, run: Run, logits: Tensor) -> float:
        """Time of one run, seconds."""

    def extra_bytes(self, run: Run, logits: Tensor) -> int | None:
        """Peak memory of one run above what was there before it; None where it cannot be known."""


class CpuClock:
    """Wall time, and the process's resident memory: whoever allocated it, it counts."""

    memory = (
        "peak resident memory of the process (VmHWM) above that before, the smaller of two runs"
    )

    def seconds(self, run: Run, logits: Tensor) -> float:
        """Wall time of one run."""
        start = time.perf_counter()
        result = run(logits)
        seconds = time.perf_counter() - start
        del result
        return seconds

    def extra_bytes(self, run: Run, logits: Tensor) -> int | None:
        """From Linux's high-water mark, which a process may reset; None elsewhere."""
        try:
            # what malloc keeps for later would be used again without growing the process
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            run(logits)
            return max(0, _status_bytes("VmHWM") - before)
        except (OSError, AttributeError):
            return None


class CudaClock:
    """Time between two events of the stream, and the peak of torch's allocator.

    The host runs ahead while the cache is flushed and the GPU sleeps: launches cost nothing;
    a contender that waits for the device pays for the wait.
    """

    memory = "torch.cuda.max_memory_allocated above what was allocated before"

    def __init__(self) -> None:
        self._flush = torch.ones(FLUSH_BYTES // 4, device="cuda")

    def seconds(self, run: Run, logits: Tensor) -> float:
        """Device time of one run."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.amax()  # a read: written lines would be flushed on the contender's time
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = run(logits)
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def extra_bytes(self, run: Run, logits: Tensor) -> int | None:
        """From the caching allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(logits)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def clock_for(device: str) -> CpuClock | CudaClock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def interleave(
    runs: Sequence[Run], original: Tensor, work: Tensor, clock: Clock, repetitions: int
) -> list[Times]:
    """Time each of `runs` on `work`, into which `original` is copied before each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for repetition in range(repetitions):
        for index in random.Random(repetition).sample(range(len(runs)), len(runs)):
            work.copy_(original)
            seconds[index].append(clock.seconds(runs[index], work))
    return [summary(times) for times in seconds]


def summary(seconds: list[float]) -> Times:
    """Median and interquartile range of some times."""
    low, _, high = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (0, 0, 0)
    return Times(1e3 * median(seconds), 1e3 * (high - low), len(seconds))


def peak(run: Run, original: Tensor, work: Tensor, clock: Clock, runs: int = 2) -> int | None:
    """Extra bytes of one run; the smallest of a few, which leaves out what others allocate."""
    found = []
    for _ in range(runs):
        work.copy_(original)
        found.append(clock.extra_bytes(run, work))
    known = [extra for extra in found if extra is not None]
    return min(known) if known else None
