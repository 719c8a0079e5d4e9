"""Start the processes of a run with torchrun's own agent, and bring back one exit code.

`megatron-deft train --nproc-per-node N` is torchrun without its command line: the same environment
variables, rendezvous and supervision (one rank fails, the others are stopped, and with
--max-restarts all are started again; training/restarts.py is what the ranks make of it).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_deft.errors import UserError
from megatron_deft.processes import ECHO, STOPS, signals_held

if TYPE_CHECKING:  # torch is not for `--help`
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous import RendezvousHandler

PATIENCE = 10  # seconds that ranks have to end after one of them has failed
USER_ERROR = 2  # exit code of a UserError, of a rank as of the whole
JOIN_SECONDS = 900  # for all machines to come, at the start and after one was lost
STORE_SECONDS = 300  # for the machine of the endpoint to answer


@dataclass(frozen=True)
class Nodes:
    """How many processes, on how many machines, and how often they may be started again.

    processes: ranks on this node
    count:     number of nodes
    rank:      0 where the endpoint is, another number where it is not; None: found out by the
               endpoint's name. Ranks are numbered by the nodes' names.
    endpoint:  HOST:PORT on one of the nodes, reachable from all; needed when count > 1
    restarts:  how often ranks of this node may fail and all ranks be started again
    """

    processes: int = 1
    count: int = 1
    rank: int | None = None
    endpoint: str | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        """Errors: UserError naming the option."""
        if self.processes < 1:
            raise UserError(f"--nproc-per-node {self.processes}: must be >= 1")
        if self.count < 1:
            raise UserError(f"--nnodes {self.count}: must be >= 1")
        if self.rank is not None and not 0 <= self.rank < self.count:
            raise UserError(f"--node-rank {self.rank}: must be >= 0 and < --nnodes {self.count}")
        if self.restarts < 0:
            raise UserError(f"--max-restarts {self.restarts}: must be >= 0")
        if self.count == 1:
            return
        host, _, port = (self.endpoint or "").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(
                f"--nnodes {self.count} needs --rdzv-endpoint HOST:PORT on one of the nodes, the "
                f"same on every node; got {self.endpoint}"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks over all nodes."""
        return self.processes * self.count


def is_rank() -> bool:
    """Whether a launcher (torchrun, srun, `launch` below) started this process as one of many."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(command: Sequence[str], nodes: Nodes) -> int:
    """Run `python *command` as `nodes.processes` ranks on this machine; the exit code.

    A rank that ends with USER_ERROR has nothing to explain beyond its message: that is printed
    once (see `report_user_error`), and torchrun's failure report not at all. Any other failure is
    named by rank and exit code, after the traceback that the rank printed itself.
    """
    stopping = _Stopping(nodes)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    if nodes.processes > 1:
        # As torchrun: the ranks would otherwise each start one thread per core.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if nodes.count > 1:
        # A store in the agent outlives its ranks, and torch 2.13 has the others look for it where
        # it was when its node was lost. Rank 0 makes a new one at every start instead.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="megatron_deft_") as folder:
        try:
            agent = _agent(command, nodes, folder, stopping)
            stays_open = False
            try:
                result = agent.run()
            except SignalException as error:
                stays_open = True  # for the agent that takes this one's place
                return 128 + int(error.sigval)
            finally:
                if not stays_open:
                    agent.get_worker_group().spec.rdzv_handler.shutdown()
        except RendezvousError as error:
            return _explain_rendezvous(error, nodes)
        if result is None:
            print("megatron-deft: the other machines go on without this one", file=sys.stderr)
            return 1
        return _explain(result.failures) if result.is_failed() else 0


def _rendezvous(nodes: Nodes) -> RendezvousHandler:
    """One node finds a free port itself; several meet at the endpoint.

    By c10d: static rendezvous cannot let an agent back in that was lost.
    """
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    several: dict[str, Any] = {"join_timeout": JOIN_SECONDS, "read_timeout": STORE_SECONDS}
    if nodes.rank is not None:
        several["is_host"] = nodes.rank == 0
    alone = nodes.count == 1
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="c10d",
            endpoint="localhost:0" if alone else str(nodes.endpoint),
            run_id=uuid.uuid4().hex if alone else "megatron_deft",
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            local_addr="localhost" if alone else None,
            **({} if alone else several),
        )
    )


class _Stopping:
    """Hands SIGTERM and SIGUSR1 on to the ranks, those too that are started after it came.

    torchrun's agent would kill them 30 seconds later, however long the save takes, and fail. A
    second SIGTERM goes on to them as well: they end at once, or are killed if they do not listen,
    and so does the agent. While it waits for other machines there is nobody to tell, and it ends.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.asked: list[int] = []
        self._nodes = nodes
        self._terminated: float | None = None  # when it first was
        for number in STOPS:
            signal.signal(number, self._forward)

    def _forward(self, number: int, frame: object) -> None:
        self.asked.append(number)
        has_ranks, now = self.tell(number), time.monotonic()
        if not has_ranks and self._nodes.count > 1:
            print("megatron-deft: stopped while it waited for the other machines", file=sys.stderr)
            sys.exit(0)
        if number != signal.SIGTERM:
            return
        if self._terminated is None:
            self._terminated = now
        elif now > self._terminated + ECHO:
            if not has_ranks:
                sys.exit(128 + number)
            killing = threading.Timer(PATIENCE, self.tell, (signal.SIGKILL,))
            killing.daemon = True
            killing.start()

    def tell(self, number: int) -> bool:
        """Whether there are ranks to tell."""
        import psutil

        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        return bool(ranks)


def _agent(
    command: Sequence[str], nodes: Nodes, folder: str, stopping: _Stopping
) -> LocalElasticAgent:
    """torchrun's agent, which also says why it starts ranks again, and knows a user's mistake."""
    from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    # The agent logs every failure at length; what a user needs of it is printed below. Its loggers
    # have levels of their own, so silencing their parent would not do.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    class Agent(LocalElasticAgent):
        _failures: Mapping[int, Any] = {}

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            self._failures = result.failures if result.is_failed() else {}
            codes = [failure.exitcode for failure in self._failures.values()]
            if stopping.asked or USER_ERROR in codes:  # it would make the same mistake again
                self._remaining_restarts = 0
            return result

        def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
            with signals_held(*STOPS):  # until the rank can note them: training/preemption.py
                started = super()._start_workers(worker_group)
            context: Any = self._pcontext
            close = context.close
            # for those that outlive another torch has 30 s, and no option
            context.close = lambda number=None, timeout=PATIENCE: close(number, timeout)
            for number in stopping.asked[:1]:
                stopping.tell(number)
            return started

        def _restart_workers(self, worker_group: WorkerGroup) -> None:
            if self._failures:
                number = nodes.restarts - self._remaining_restarts
                why = f"failed: {_ended(self._failures)}; restart {number} of {nodes.restarts}"
            else:
                why = "a machine came or went: all ranks start again"
            print(f"megatron-deft: {why}", file=sys.stderr, flush=True)
            super()._restart_workers(worker_group)

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"
    spec = WorkerSpec(
        role="default",
        local_world_size=nodes.processes,
        entrypoint=sys.executable,
        args=tuple(command),
        rdzv_handler=_rendezvous(nodes),
        max_restarts=nodes.restarts,
        monitor_interval=0.1,  # seconds
    )
    return Agent(spec, DefaultLogsSpecs(log_dir=folder), shutdown_timeout=PATIENCE)


def _explain_rendezvous(error: Exception, nodes: Nodes) -> int:
    """The exit code of a run whose machines did not meet; prints why."""
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousTimeoutError

    if isinstance(error, RendezvousClosedError):
        why = "another machine ended it: see there"
    elif isinstance(error, RendezvousTimeoutError):
        why = f"{nodes.count} machines were not there within {JOIN_SECONDS} s"
    else:
        why = (
            f"nothing answers at {nodes.endpoint}: did the run end there (see there), is the port "
            "open? When that machine is lost, start all again with --resume"
        )
    print(f"megatron-deft: the run failed: {why}", file=sys.stderr)
    return 1


def _culprits(failures: Mapping[int, Any]) -> Mapping[int, Any]:
    """Those that the agent stopped fell because of the others, by SIGTERM or for want of an end."""
    late = min(f.timestamp for f in failures.values()) + PATIENCE
    return {
        rank: f
        for rank, f in failures.items()
        if f.exitcode != -signal.SIGTERM and f.timestamp < late
    } or failures


def _ended(failures: Mapping[int, Any]) -> str:
    """Such as `rank 0 with exit code 1, rank 3 with SIGKILL`."""
    ends = [
        f"rank {rank} with " + (f"exit code {f.exitcode}" if f.exitcode > 0 else f.signal_name())
        for rank, f in sorted(_culprits(failures).items())
    ]
    return ", ".join(ends)


def _explain(failures: Mapping[int, Any]) -> int:
    """The exit code of the run; prints what is not on the terminal yet about the failed ranks."""
    culprits = _culprits(failures)
    if mistaken := [rank for rank, f in culprits.items() if f.exitcode == USER_ERROR]:
        # Rank 0 has printed its own, even if it was stopped before it could end.
        if not (0 in failures and os.path.isfile(failures[0].error_file)):
            print(failures[min(mistaken)].message, file=sys.stderr)
        return USER_ERROR
    print(f"megatron-deft: the run failed: {_ended(failures)}; see above", file=sys.stderr)
    return 1


def report_user_error(message: str) -> None:
    """Print a mistake once per run: rank 0 prints it, another rank leaves it to its agent.

    Mostly all ranks fail alike, and any of them may be stopped before it speaks. So each writes
    torchrun's error file; the agent prints a message from there unless rank 0 came to speak.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE") if is_rank() else None
    if file:
        with open(file, "w", encoding="utf-8") as handle:
            json.dump({"message": message, "timestamp": int(time.time())}, handle)
    if not file or os.environ["RANK"] == "0":
        print(message, file=sys.stderr, flush=True)
