"""Signals to one process; what whole runs do with them is in test_stopping.py."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_deft.training import preemption
from megatron_deft.training.preemption import REASONS, Preemption


def raised(listener: Preemption) -> list[str]:
    return [why for why, on in zip(REASONS, listener.flags(), strict=True) if on]


def test_signals_are_noted_and_handlers_put_back() -> None:
    assert threading.current_thread() is threading.main_thread(), "else nothing is done"
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with Preemption() as listener:
        assert raised(listener) == []
        os.kill(os.getpid(), signal.SIGUSR1)
    assert raised(listener) == ["SIGUSR1"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_it_ends_while_a_forked_reader_of_data_lives() -> None:
    with Preemption():
        child = os.fork()
        if child == 0:  # which has the ends of the pipe too
            time.sleep(20)
            os._exit(0)
    try:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_time_is_up_when_a_step_and_a_save_no_longer_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(preemption, "_start_of", lambda process: 0.0)
    monkeypatch.setattr(preemption, "time", SimpleNamespace(time=lambda: now))
    listener = Preemption(exit_seconds=100.0)
    listener.saved(20.0)
    for now, is_late in ((30.0, False), (40.0, False), (50.0, False), (51.0, True)):
        # the longest step took 30 s
        assert raised(listener) == ["train.exit_duration"] * is_late, now
