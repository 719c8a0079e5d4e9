"""Why a run stops before its last step: a signal to any rank, or its time is up.

Every rank raises flags, which the step's all-reduce adds up: all learn of it at the end of the same
step, save, and end with exit code 0.
"""

import os
import signal
import threading
import time
from contextlib import AbstractContextManager, suppress

import psutil

from megatron_deft.processes import outlive_signals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = (*(number.name for number in SIGNALS), "train.exit_duration")
END = 0  # no signal's number: the listener ends
ECHO = 2.0  # seconds in which a SIGTERM is the same one: a launcher forwards what all ranks got


class Preemption(AbstractContextManager["Preemption"]):
    """Inside the block SIGTERM and SIGUSR1 are noted; a second SIGTERM ends the process at once.

    A thread notes them: Python's own handlers wait for as long as the main thread stands in a
    collective.

    exit_seconds: after how many seconds of the job to stop; None: never
    """

    def __init__(self, exit_seconds: float | None = None) -> None:
        self._limit = exit_seconds
        self._asked: dict[str, float] = {}  # signal -> when it came first
        self._begun, self._looked = _start_of_job(), time.time()
        self._longest_step, self._longest_save, self._has_saved = 0.0, 0.0, False
        self._undo: list[tuple[signal.Signals, object]] = []

    def __enter__(self) -> "Preemption":
        """Listen; nothing is done off the main thread, where Python allows no handlers."""
        self._looked = time.time()
        self._longest_save = self._looked - self._begun
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._undo = [(number, signal.signal(number, _nothing)) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        """Put the handlers back."""
        if not self._undo:
            return
        for number, handler in self._undo:
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._undo = []
        signal.set_wakeup_fd(self._wakeup)
        # not by closing the pipe, which readers of data that were forked hold open
        os.write(self._writer, bytes([END]))
        self._thread.join()
        os.close(self._writer)

    def flags(self) -> list[bool]:
        """Which of REASONS there are to stop after this step; once per step.

        Time is up when another step like the longest so far and a save like the longest would end
        too late. Before the first save, it is taken to last as long as the start of the job did.
        """
        now = time.time()
        self._longest_step = max(self._longest_step, now - self._looked)
        self._looked = now
        ends = now - self._begun + self._longest_step + self._longest_save
        is_late = self._limit is not None and ends > self._limit
        return [*(number.name in self._asked for number in SIGNALS), is_late]

    def saved(self, seconds: float) -> None:
        """How long a save took."""
        self._longest_save = max(seconds, self._longest_save if self._has_saved else 0.0)
        self._has_saved = True

    def _listen(self, reader: int) -> None:
        numbers = b""
        while END not in numbers:
            numbers = os.read(reader, 64)
            for number in numbers:
                if number in SIGNALS:
                    self._note(signal.Signals(number).name)
        os.close(reader)

    def _note(self, name: str) -> None:
        first = self._asked.setdefault(name, time.monotonic())
        if name == "SIGTERM" and time.monotonic() - first > ECHO:
            print("a second SIGTERM: ended at once", flush=True)
            os._exit(128 + signal.SIGTERM)


def _nothing(number: int, frame: object) -> None:
    """What Python itself does at a signal; the thread is woken before."""


def _start_of_job() -> float:
    """When the launcher of this rank was started, else this process, seconds since the epoch."""
    has_agent = "TORCHELASTIC_RUN_ID" in os.environ
    with suppress(psutil.Error):
        return float(psutil.Process(os.getppid() if has_agent else os.getpid()).create_time())
    return time.time()


def _let_rank_end_first() -> None:
    if signal.getsignal(signal.SIGTERM) is _nothing:
        with suppress(ValueError):  # forked off the main thread
            signal.set_wakeup_fd(-1)
            outlive_signals()


os.register_at_fork(after_in_child=_let_rank_end_first)
