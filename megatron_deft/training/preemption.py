"""Why a run stops before its last step: a signal to any rank, or its time is up.

Every rank raises flags, which the step's all-reduce adds up: all learn of it at the end of the same
step, save, and end with exit code 0. While they start, there is nothing to save: they agree to end
where the start has its joints (run.py), and rank 0 breaks off what it makes for the others.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import psutil

from megatron_deft.processes import ECHO, STOPS, outlive_signals

REASONS = (*(number.name for number in STOPS), "train.exit_duration")
END = 0  # no signal's number: the listener ends
LAUNCHED = "TORCHELASTIC_RUN_ID"  # in the environment of a launcher's ranks
LOOK = 2.0  # seconds between looks at whether the launcher lives


class Stopped(BaseException):  # no error: nobody who catches those is to have it
    """The run is told to stop before its first step, by the signal that this names."""


class Preemption(AbstractContextManager["Preemption"]):
    """Inside the block SIGTERM and SIGUSR1 are noted; a second SIGTERM ends the process at once.

    A thread notes them: Python's own handlers wait for as long as the main thread stands in a
    collective. It also ends a rank whose launcher was killed: nobody would stop it any more.

    exit_seconds: after how many seconds of the job to stop; None: never
    """

    def __init__(self, exit_seconds: float | None = None) -> None:
        self._limit = exit_seconds
        self._asked: dict[str, float] = {}  # signal -> when it came first
        self._launcher = os.getppid() if LAUNCHED in os.environ else None
        self._begun = _start_of(self._launcher or os.getpid())
        self._longest_step, self._has_saved = 0.0, False
        self.may_raise = False
        self._undo: list[tuple[signal.Signals, object]] = []
        self.begin_steps()

    def __enter__(self) -> "Preemption":
        """Listen; nothing is done off the main thread, where Python allows no handlers."""
        global _current
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()
        self._wakeup = signal.set_wakeup_fd(self._writer)
        self._undo = [(number, signal.signal(number, self._handle)) for number in STOPS]
        _current = self
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # they waited: launch.py blocks them
        return self

    def __exit__(self, *_: object) -> None:
        """Put the handlers back. A rank then ends, and is not to die of a signal that came late."""
        global _current
        if not self._undo:
            return
        _current = None
        for number, handler in self._undo:
            signal.signal(number, signal.SIG_IGN if self._launcher else handler)  # type: ignore[arg-type]
        self._undo = []
        signal.set_wakeup_fd(self._wakeup)
        # not by closing the pipe, which readers of data that were forked hold open
        os.write(self._writer, bytes([END]))
        self._thread.join()
        os.close(self._writer)

    def begin_steps(self) -> None:
        """The steps begin now: what was before was the start."""
        self._looked = time.time()
        self._longest_save = self._looked - self._begun

    def signalled(self) -> list[bool]:
        """Which of STOPS have come."""
        return [number.name in self._asked for number in STOPS]

    def raise_if_asked(self) -> None:
        """Errors: Stopped when a signal has come."""
        for number, has_come in zip(STOPS, self.signalled(), strict=True):
            if has_come:
                raise Stopped(number.name)

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
        return [*self.signalled(), is_late]

    def saved(self, seconds: float) -> None:
        """How long a save took."""
        self._longest_save = max(seconds, self._longest_save if self._has_saved else 0.0)
        self._has_saved = True

    def _listen(self, reader: int) -> None:
        numbers = b""
        while END not in numbers:
            if not select.select([reader], [], [], LOOK)[0]:
                self._end_if_orphaned()
                continue
            numbers = os.read(reader, 64)
            for number in numbers:
                if number in STOPS:
                    self._note(signal.Signals(number).name)
        os.close(reader)

    def _note(self, name: str) -> None:
        first = self._asked.setdefault(name, time.monotonic())
        if name == "SIGTERM" and time.monotonic() - first > ECHO:
            print("a second SIGTERM: ended at once", flush=True)
            os._exit(128 + signal.SIGTERM)

    def _end_if_orphaned(self) -> None:
        if self._launcher in (None, os.getppid()):
            return
        try:
            print("megatron-deft: its launcher is gone: a rank ends", file=sys.stderr, flush=True)
        finally:  # there may be nobody who reads it
            os._exit(1)

    def _handle(self, number: int, frame: object) -> None:
        """What Python itself does at a signal; the thread is woken before."""
        if self.may_raise:
            self.may_raise = False
            self._asked.setdefault(signal.Signals(number).name, time.monotonic())
            self.raise_if_asked()


_current: Preemption | None = None  # signals are the process's, and so is who notes them


@contextmanager
def stoppable() -> Iterator[None]:
    """A block of work of this rank alone, which a signal breaks off.

    Errors: Stopped when one comes in it, or came before.
    """
    if (noting := _current) is None:
        yield
        return
    noting.may_raise = True
    try:
        noting.raise_if_asked()
        yield
    except BaseException:
        noting.may_raise = False
        noting.raise_if_asked()  # the signal may have reached helpers first
        raise
    finally:
        noting.may_raise = False


def _start_of(process: int) -> float:
    """When a process was started, seconds since the epoch."""
    with suppress(psutil.Error):
        return float(psutil.Process(process).create_time())
    return time.time()


def _let_rank_end_first() -> None:
    handler = signal.getsignal(signal.SIGTERM)
    if getattr(handler, "__func__", None) is Preemption._handle:
        with suppress(ValueError):  # forked off the main thread
            signal.set_wakeup_fd(-1)
            outlive_signals()


os.register_at_fork(after_in_child=_let_rank_end_first)
