"""Jobs in processes: in order, each once; what goes wrong in one is told."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from megatron_deft.data.prepare.pool import run_jobs
from megatron_deft.errors import UserError


@dataclass
class Job:
    """Says who did what; does something else at `number`."""

    do: str = ""
    number: int = 5

    def start(self) -> Callable[[int], Any]:
        if self.do == "refuse":
            raise UserError("no such tokenizer")
        return self.run

    def run(self, number: int) -> tuple[int, int]:
        if number == self.number:
            if self.do == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.do == "leave":
                os._exit(3)
            elif self.do == "fail":
                time.sleep(0.3)  # a later one fails before
                raise UserError(f"row {number}")
        elif number > self.number and self.do == "fail":
            raise UserError(f"row {number}")
        elif self.do == "break":
            raise KeyError("a bug")
        return number * number, os.getpid()

    def describe(self, number: int) -> str:
        return f"file part {number}"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    before = set(multiprocessing.active_children())  # of other tests, such as a manager
    yield
    assert not set(multiprocessing.active_children()) - before


def test_each_job_is_done_once() -> None:
    done = dict(run_jobs(Job(), range(3, 40), 2))
    assert {number: square for number, (square, _) in done.items()} == {
        number: number * number for number in range(3, 40)
    }
    pids = {pid for _, pid in done.values()}
    assert os.getpid() not in pids


@pytest.mark.parametrize(("numbers", "workers"), [(range(9), 1), ([7], 4), ([], 4)])
def test_little_is_done_here(numbers: Any, workers: int) -> None:
    done = list(run_jobs(Job(), numbers, workers))
    assert done == [(number, (number * number, os.getpid())) for number in numbers]


@pytest.mark.parametrize(
    ("do", "how"), [("die", "SIGKILL, as when memory is short"), ("leave", "exit code 3")]
)
def test_a_process_that_dies_is_an_error(do: str, how: str) -> None:
    with pytest.raises(UserError) as error:
        list(run_jobs(Job(do), range(50), 2))
    for text in (f"({how})", "file part 5", "--workers"):
        assert text in str(error.value)


def test_the_first_failure_is_told_though_another_was_faster() -> None:
    with pytest.raises(UserError, match=r"^row 5$"):
        list(run_jobs(Job("fail"), range(50), 2))


def test_a_failure_to_start_and_a_bug() -> None:
    with pytest.raises(UserError, match="no such tokenizer"):
        list(run_jobs(Job("refuse"), range(50), 2))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'a bug'"):
        list(run_jobs(Job("break"), range(50), 2))


def test_whoever_stops_asking_leaves_no_process() -> None:
    jobs = run_jobs(Job(), range(50), 2)
    next(jobs)
    assert multiprocessing.active_children()
    jobs.close()
