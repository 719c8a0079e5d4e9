"""Where the seconds of a step go. Nothing waits for a GPU before the step's end: there CUDA events
are recorded in its stream, and read when the step is done.

megatron-core marks its own parts with `config.timers`; its Timers were rejected: each start and
stop of theirs waits for the GPU.
"""

import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.platform import device

STEP, DATA, OPTIMIZER = "step", "data", "optimizer"
SCHEDULE = "forward-backward"
COMPUTE = ("forward-compute", "backward-compute")
REDUCTION = (
    "all-grads-sync",
    "conditional-embedder-grads-all-reduce",
    "non-tensor-parallel-grads-all-reduce",
    "embedding-grads-all-reduce",
)
GATHER = "params-all-gather"
HEAD = ("head-forward", "head-backward")


class Clock:
    """Seconds that this rank has spent on each part since `restart`, as megatron-core's timers.

    On CUDA a part's seconds are those of the stream that computes: kernels, and what it waits for.
    """

    def __init__(self) -> None:
        self._cuda = device().type == "cuda"
        self._idle: list[Any] = []  # events to use again
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; the memory's high-water mark too, where it can be set back."""
        for pairs in getattr(self, "_pairs", {}).values():
            self._idle += [event for pair in pairs for event in pair] if self._cuda else []
        self._begun: dict[str, Any] = {}
        self._pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def start(self, name: str) -> None:
        """The part begins."""
        self._begun[name] = self._now()

    def stop(self, name: str) -> None:
        """It ends; nothing where it has not begun."""
        if (begun := self._begun.pop(name, None)) is not None:
            self._pairs[name].append((begun, self._now()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What stands in the block."""
        self.start(name)
        yield
        self.stop(name)

    def __call__(self, name: str, log_level: int = 0) -> "_Timer":
        """The timer of a part, as megatron-core asks for it."""
        return _Timer(self, name)

    def read(self) -> "Reading":
        """Seconds by part. On CUDA waits for the work to be done."""
        if self._cuda:
            torch.cuda.current_stream().synchronize()
        return Reading({name: sum(map(self._seconds, p)) for name, p in self._pairs.items()})

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._idle.pop() if self._idle else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, pair: tuple[Any, Any]) -> float:
        begun, ended = pair
        return begun.elapsed_time(ended) / 1000 if self._cuda else ended - begun


class _Timer(NamedTuple):
    """One of megatron-core's timers; its barrier, which makes ranks wait, is left out."""

    clock: Clock
    name: str

    def start(self, barrier: bool = False) -> None:
        self.clock.start(self.name)

    def stop(self, barrier: bool = False) -> None:
        self.clock.stop(self.name)


class Reading(dict[str, float]):
    """Seconds by part; 0 for one that a rank does not have."""

    def __missing__(self, name: str) -> float:
        return 0.0

    def sum(self, names: Sequence[str]) -> float:
        """Of several parts."""
        return sum(self[name] for name in names)


def time_head(chunks: Sequence[Any], clock: Clock) -> None:
    """Time the output layer with the loss, whichever way they are computed: HEAD.

    From the end of the layers, those of multi-token prediction included, to the loss; and from the
    loss's gradient to that of what the layers put out.
    """

    def layers_done(module: Any, inputs: Any, hidden: Any) -> None:
        clock.start(HEAD[0])
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: clock.stop(HEAD[1]))

    def loss_done(module: Any, inputs: Any, loss: Any) -> None:
        clock.stop(HEAD[0])
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.register_hook(lambda _: clock.start(HEAD[1]))

    for chunk in chunks:
        if chunk.post_process:
            layers = chunk.mtp if chunk.mtp_process else chunk.decoder
            layers.register_forward_hook(layers_done)
            chunk.register_forward_hook(loss_done)


def peak_memory() -> int:
    """Bytes: on CUDA the most that tensors took since `restart`; else the process's high water."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measurements(reading: Reading) -> dict[str, float]:
    """What a step reports of its time and memory: of each the largest of any rank, on every rank.

    step_seconds:             all of it, with `data_seconds`, what it waited for data
    forward_backward_seconds: computing the micro-batches; what tensor, context and expert ranks
                              exchange within a layer is part of it, and is not told apart
    loss_seconds:             of those, output layer and loss, forward and backward, prediction
                              heads' too
    optimizer_seconds:        clipping, update
    communication_seconds:    all else of the schedule, waits for other pipeline stages above all,
                              the gradients' reduction, and the gathering of updated parameters
    reduction_seconds:        of those, the gradients' reduction; what of it overlaps with the
                              backward pass does not count
    peak_memory_gb:           10^9 bytes, see peak_memory
    """
    waiting = reading[SCHEDULE] - reading.sum(COMPUTE)
    values = {
        "step_seconds": reading[STEP],
        "data_seconds": reading[DATA],
        "forward_backward_seconds": reading.sum(COMPUTE),
        "loss_seconds": reading.sum(HEAD),
        "optimizer_seconds": reading[OPTIMIZER] - reading[GATHER],
        "communication_seconds": waiting + reading[GATHER],
        "reduction_seconds": reading.sum(REDUCTION),
        "peak_memory_gb": peak_memory() / 1e9,
    }
    largest = torch.tensor(list(values.values()), dtype=torch.float64, device=device())
    # only the last stage has a loss, and a step is as slow as its slowest rank
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(values, largest.tolist(), strict=True))
