"""Numbered jobs shared among processes; one that dies is an error and never a hang.

Processes are spawned, since the caller may have threads, whose locks a fork would copy. Rejected:
concurrent.futures, which when a process dies tells neither which job it had nor what killed it.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

from megatron_deft.errors import UserError
from megatron_deft.processes import PATIENCE, start_without


class Job(Protocol):
    """What is to be done; sent to each process once."""

    def start(self) -> Callable[[int], Any]:
        """Load what is needed, and return what does the job of a number."""

    def describe(self, number: int) -> str:
        """What the job of a number is, for an error message."""


class Failure(NamedTuple):
    """What a process could not do. trace: where, for an error that is not the user's."""

    message: str
    trace: str | None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    number: int = -1  # of the job it has


def run_jobs(job: Job, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, Any]]:
    """Do the jobs in `workers` processes; yield (number, result) as they are done.

    One worker, or one job, is done in this process. Jobs are given out in order; after a failure
    those given out before are still waited for, so that the first one is reported whichever
    process was faster.

    Errors: UserError of the first job that raised one, or when a process died.
    """
    if min(workers, len(numbers)) <= 1:
        run = job.start()
        yield from ((number, run(number)) for number in numbers)
        return
    failures: dict[int, Failure] = {}
    todo = iter(numbers)
    with _crew(job, min(workers, len(numbers))) as idle:
        busy: dict[Connection, _Worker] = {}
        while True:
            while idle and not failures and (number := next(todo, None)) is not None:
                worker = idle.pop()
                _give(job, worker, number)
                busy[worker.pipe] = worker
            if not busy:
                break
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy.pop(pipe)
                result = _take(job, worker)
                if isinstance(result, Failure):
                    failures[worker.number] = result
                else:
                    yield worker.number, result
                idle.append(worker)
    if failures:
        first = failures[min(failures)]
        if first.trace is not None:
            raise RuntimeError(first.trace)
        raise UserError(first.message)


@contextmanager
def _crew(job: Job, count: int) -> Iterator[list[_Worker]]:
    """Processes that wait for a number; none is left behind, however the block ends."""
    context = get_context("spawn")
    crew: list[_Worker] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, job), daemon=True)
            # of a run too, whose ranks decide what SIGUSR1 means
            start_without(process, signal.SIGINT, signal.SIGUSR1)
            theirs.close()  # only the process holds it: its end is seen as the end of the file
            crew.append(_Worker(process, ours))
        yield list(reversed(crew))
    finally:
        for worker in crew:
            worker.pipe.close()
            worker.process.terminate()
        for worker in crew:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()


def _give(job: Job, worker: _Worker, number: int) -> None:
    worker.number = number
    try:
        worker.pipe.send(number)
    except OSError:
        raise _died(job, worker) from None


def _take(job: Job, worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        raise _died(job, worker) from None


def _died(job: Job, worker: _Worker) -> UserError:
    worker.process.join(PATIENCE)
    code = worker.process.exitcode
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = signal.Signals(-code).name
        if -code == signal.SIGKILL:
            how += ", as when memory is short"
    return UserError(
        f"a worker process died ({how}) at {job.describe(worker.number)}: run the same command "
        "again with fewer --workers; the parts that are done are kept"
    )


def _work(pipe: Connection, job: Job) -> None:
    """The life of a process: until its pipe is closed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores, not threads
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # what it warns of, the parent was told
    try:
        run = _guarded(job.start)
        while True:
            number = pipe.recv()
            pipe.send(run if isinstance(run, Failure) else _guarded(run, number))
    except (EOFError, OSError):  # nobody is there any more
        return


def _guarded(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except UserError as error:
        return Failure(str(error), None)
    except Exception as error:
        return Failure(str(error), traceback.format_exc())
