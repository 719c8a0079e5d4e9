"""Calls that hang, fill the memory, crash and raise, in real processes."""

import os
import signal
from typing import Any

import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation.limited import Calls, Limits, Stopped, run_limited

LIMITS = Limits(seconds=0.5, memory=2 << 30)
LATE, DIED = Stopped(late=True), Stopped(late=False)


def ready() -> None:
    """Nothing has to be loaded."""


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def square(number: int) -> int:
    return number * number


def do(what: str) -> Any:
    if what == "loop":
        while True:
            pass
    if what == "power":  # within C, where no handler of a signal runs
        return len(str(9**9**9))
    if what == "memory":
        return len(bytearray(3 << 30))
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "crash":
        os.abort()
    if what == "raise":
        raise LookupError("no such thing")
    return os.getpid()


def run(call: Any, items: list[Any], workers: int, start: Any = ready) -> list[Any]:
    found = dict(run_limited(Calls(call, start, LIMITS), [(item,) for item in items], workers))
    return [found[index] for index in range(len(items))]


@pytest.mark.parametrize("workers", [1, 3])
def test_each_item_once_by_any_number_of_processes(workers: int) -> None:
    assert run(square, list(range(20)), workers) == [number**2 for number in range(20)]


def test_no_items() -> None:
    assert run(square, [], 2) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_call_must_not_do_ends_it_alone(workers: int) -> None:
    items = ["fine", "loop", "fine", "power", "memory", "killed", "crash", "fine"]
    found = run(do, items, workers)
    assert [found[i] for i in (1, 3, 4, 5, 6)] == [LATE, LATE, DIED, DIED, DIED]
    assert all(isinstance(found[i], int) for i in (0, 2, 7))
    assert os.getpid() not in found


def test_the_limit_is_of_each_call_and_not_of_their_sum() -> None:
    assert set(map(type, run(work_a_little, [None] * 6, 1))) == {int}


def work_a_little(nothing: None) -> int:
    return sum(range(8_000_000))  # 0.1 to 0.3 seconds, of which 6 are more than the limit


def test_an_exception_is_not_a_result() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        run(do, ["fine", "raise", "fine"], 2)


def test_a_process_that_cannot_start_is_told() -> None:
    with pytest.raises(UserError, match=r"ended as it started.*2048 MiB.*--workers"):
        run(square, [1, 2], 2, start=end)


def test_no_process_is_left_when_the_results_are_no_longer_wanted() -> None:
    found = run_limited(Calls(do, ready, LIMITS), [("fine",), ("loop",), ("loop",)], 1)
    process = next(found)[1]
    found.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
