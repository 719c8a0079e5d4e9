"""What pools of processes share: how many there are to be, and how they are started."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

STOPS = (signal.SIGTERM, signal.SIGUSR1)  # told to ranks: they save, and end with exit code 0
ECHO = 2.0  # seconds in which a SIGTERM is the same one: a launcher forwards what all ranks got
PATIENCE = 10  # seconds that a process is given to end
OUTLIVE = 30.0  # seconds that a rank's helper has left after a SIGTERM


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def outlive_signals(worker: int = 0) -> None:
    """In a process that reads data or writes a checkpoint for a rank: let the rank end first.

    Schedulers, and torchrun, signal every process of a job. Not for ever, or a rank could not end
    a helper that it no longer needs. worker: its number, as torch's DataLoader tells it; not used.
    """

    def end_later(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, OUTLIVE)  # SIGALRM then ends the process

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


@contextmanager
def signals_held(*numbers: signal.Signals) -> Iterator[None]:
    """A block in which processes are started that have these signals blocked.

    From their first instruction, as a new program keeps the mask of who started it; to ignore or to
    handle them in what they run would be too late for the seconds of their imports. Here such a
    signal takes effect at the block's end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_without(process: BaseProcess, *numbers: signal.Signals) -> None:
    """Start one of multiprocessing's, which leaves these signals to this process."""
    resource_tracker.ensure_running()  # Python starts it before the first, and then unblocks SIGINT
    with signals_held(*numbers):
        process.start()
