"""Calls in other processes, each with a limit of time and memory that nothing gets past.

The kernel ends a process that uses more processor time on a call than it may, also within a library
that looks at no signal, and another one takes its place. It is processor time, and not the clock's,
so that neither the number of processes nor a busy machine changes a result.

Rejected: concurrent.futures and multiprocessing.Pool, which a process that ends breaks or hangs.
Pebble, whose limit is the clock's, which prints a stranger's traceback when it is stopped while a
process starts, and gives up when an idle one ends.
"""

import resource
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from megatron_deft.errors import UserError
from megatron_deft.processes import PATIENCE, start_without

_PRELOADED = ["math_verify"]  # what is called takes a second to import, and may be absent


@dataclass(frozen=True)
class Limits:
    """What one call may use: seconds of processor time, bytes of its process's address space."""

    seconds: float = 10.0
    memory: int = 4 << 30


class Stopped(NamedTuple):
    """A call without a result: it passed the limit of time, or (not `late`) its process died, as
    when memory is short.
    """

    late: bool


class _Error(NamedTuple):
    trace: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    index: int | None = None  # of the item it has; none until it has said that it is ready


class Calls(NamedTuple):
    """What processes do: `start` once, without a limit of time, and then `call`, item by item.

    Both are functions of a module.
    """

    call: Callable[..., Any]
    start: Callable[[], Any]
    limits: Limits = Limits()


def run_limited(
    calls: Calls, items: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[tuple[int, Any]]:
    """Call `calls.call` with each of `items`; yield (index, result or Stopped) as they are done.

    Errors: UserError when a process ends before it is ready, RuntimeError with the trace of an
    exception of `call`.
    """
    left = deque(range(len(items)))
    crew: list[_Worker] = []
    try:
        crew += [_hire(calls) for _ in range(min(max(workers, 1), len(items)))]
        while crew:
            ready = wait([worker.pipe for worker in crew])
            for worker in [worker for worker in crew if worker.pipe in ready]:
                result = _take(worker)
                if worker.index is not None:
                    yield worker.index, result
                elif isinstance(result, Stopped):
                    raise UserError(
                        f"a process ended as it started: are there {calls.limits.memory >> 20} MiB "
                        f"of memory for each of {len(crew)}? Ask for fewer --workers"
                    )
                if left and not isinstance(result, Stopped):
                    _give(worker, left.popleft(), items)
                    continue
                crew.remove(worker)
                _end(worker)
                if left:
                    crew.append(_hire(calls))
    finally:
        for worker in crew:
            _end(worker)


def _hire(calls: Calls) -> _Worker:
    # Processes fork from one that has imported math-verify and has no threads: a new one is there
    # at once. Rejected: fork, which copies the locks of our threads.
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, calls), daemon=True)
    start_without(process, signal.SIGINT)
    theirs.close()  # only the process holds it: its end is seen as the end of the file
    return _Worker(process, ours)


def _give(worker: _Worker, index: int, items: Sequence[tuple[Any, ...]]) -> None:
    worker.index = index
    with suppress(OSError):  # it has ended: its pipe will tell
        worker.pipe.send(items[index])


def _take(worker: _Worker) -> Any:
    """What a process says; Stopped when it has ended."""
    try:
        result = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(PATIENCE)
        return Stopped(late=worker.process.exitcode == -signal.SIGPROF)
    if isinstance(result, _Error):
        raise RuntimeError(result.trace)
    return result


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _work(pipe: Connection, calls: Calls) -> None:
    """The life of a process: until its pipe is closed."""
    # the parent ends it; also where somebody else has started the server that it forks from
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a handler would wait for the library's end
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = calls.limits.memory
    resource.setrlimit(
        resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )
    calls.start()
    with suppress(EOFError, OSError):  # nobody is there any more
        pipe.send(None)
        while True:
            pipe.send(_limited(calls, pipe.recv()))


def _limited(calls: Calls, item: tuple[Any, ...]) -> Any:
    signal.setitimer(signal.ITIMER_PROF, calls.limits.seconds)
    try:
        return calls.call(*item)
    except MemoryError:
        return Stopped(late=False)
    except Exception:
        return _Error(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
