"""Start the processes of a run with torchrun's own agent, and bring back one exit code.

`megatron-deft train --nproc-per-node N` is torchrun without its command line: the same environment
variables, rendezvous and supervision (one rank fails, the others are stopped).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_deft.errors import UserError

PATIENCE = 10  # seconds that ranks have to end after one of them has failed
USER_ERROR = 2  # exit code of a UserError, of a rank as of the whole


@dataclass(frozen=True)
class Nodes:
    """How many processes, and where this machine stands among the others.

    processes: ranks on this node
    count:     number of nodes
    rank:      of this node, 0 <= rank < count
    endpoint:  HOST:PORT on node 0, reachable from all; needed when count > 1
    """

    processes: int = 1
    count: int = 1
    rank: int = 0
    endpoint: str | None = None

    def __post_init__(self) -> None:
        """Errors: UserError naming the option."""
        if self.processes < 1:
            raise UserError(f"--nproc-per-node {self.processes}: must be >= 1")
        if self.count < 1:
            raise UserError(f"--nnodes {self.count}: must be >= 1")
        if not 0 <= self.rank < self.count:
            raise UserError(f"--node-rank {self.rank}: must be >= 0 and < --nnodes {self.count}")
        if self.count == 1:
            return
        host, _, port = (self.endpoint or "").rpartition(":")
        if not host or not port.isdigit():
            raise UserError(
                f"--nnodes {self.count} needs --rdzv-endpoint HOST:PORT on node 0, the same on "
                f"every node; got {self.endpoint}"
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
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The agent logs every failure at length; what a user needs of it is printed below. Its loggers
    # have levels of their own, so silencing their parent would not do.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    if nodes.processes > 1:
        # As torchrun: the ranks would otherwise each start one thread per core.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="megatron_deft_") as folder:
        config = LaunchConfig(
            min_nodes=nodes.count,
            max_nodes=nodes.count,
            nproc_per_node=nodes.processes,
            max_restarts=0,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
            shutdown_timeout=PATIENCE,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **_rendezvous(nodes),
        )
        _forward_signals()
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return _explain(error.failures)
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _forward_signals() -> None:
    """Hand SIGTERM and SIGUSR1 on to the ranks, which save and end with exit code 0.

    torchrun's agent would kill them 30 seconds later, however long the save takes, and fail. A
    second SIGTERM goes on to them as well: they end at once, and so does the agent.
    """
    import psutil

    def forward(number: int, frame: object) -> None:
        ranks = psutil.Process().children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, forward)


def _rendezvous(nodes: Nodes) -> dict[str, Any]:
    """One node finds a free port itself; several meet at the endpoint, ranked as they are told."""
    if nodes.count == 1:
        return {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "run_id": uuid.uuid4().hex,
            "local_addr": "localhost",
        }
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": nodes.endpoint,
        "run_id": "megatron_deft",
        "rdzv_configs": {"rank": nodes.rank, "timeout": 900},
    }


def _explain(failures: dict[int, Any]) -> int:
    """The exit code of the run; prints what is not on the terminal yet about the failed ranks."""
    # Those that the agent stopped fell because of the others.
    culprits = {rank: f for rank, f in failures.items() if f.exitcode != -signal.SIGTERM}
    culprits = culprits or failures
    if mistaken := [rank for rank, f in culprits.items() if f.exitcode == USER_ERROR]:
        # Rank 0 has printed its own, even if it was stopped before it could end.
        if not (0 in failures and os.path.isfile(failures[0].error_file)):
            print(failures[min(mistaken)].message, file=sys.stderr)
        return USER_ERROR
    ended = [
        f"rank {rank} with " + (f"exit code {f.exitcode}" if f.exitcode > 0 else f.signal_name())
        for rank, f in sorted(culprits.items())
    ]
    print(f"megatron-deft: the run failed: {', '.join(ended)}; see above", file=sys.stderr)
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
