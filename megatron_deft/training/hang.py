"""Ends a run in which a rank hangs, and names the rank: the others only wait in their collectives.

A thread of each rank watches that its main thread gets on. Once one of them has waited for too
long, all tell where theirs stands, through the store that torch.distributed started with; who
waits in no collective, or does not answer, is the culprit. Nothing is sent but one question every
few seconds. Before there is a store a rank is alone (platform/store.py), and after (`limit_end`).
"""

import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import count
from typing import Any

import torch.distributed as dist

SLOW = 4  # timeouts for the start, the first step, which connects and compiles, a save, the end
COLLECTIVES = "distributed_c10d.py"  # torch's file of collectives
# What the main thread calls when it waits for a GPU, and so for the collectives queued there.
WAITS = re.compile(r"\.(wait|item|tolist|cpu|numpy|synchronize)\(")
DEPTH = 12  # innermost calls of a stack that are shown

_runs = count()  # of this process: each has its own keys in the store


class HangWatch(AbstractContextManager["HangWatch"]):
    """Inside the block the process ends with code 1 when `progress` is not called in time.

    timeout: seconds; None: never
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._stop, self._step = threading.Event(), 0
        self._main = threading.main_thread().ident
        self.progress(SLOW)

    def progress(self, times: float = 1, step: int | None = None) -> None:
        """The main thread gets on; its next call follows within so many timeouts.

        step: the last that was finished, for the message
        """
        self._begin, self._times = time.monotonic(), times
        self._step = self._step if step is None else step

    def __enter__(self) -> "HangWatch":
        """Watch."""
        if self._timeout is None:
            return self
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # a connection of its own: on the process group's, the main thread may be waiting
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._key = f"megatron_deft/hang/{next(_runs)}"
        self._period = min(5.0, self._timeout / 10)
        self._set(f"who/{self._rank}", this_process())
        self.progress(SLOW)
        self._thread = threading.Thread(target=self._watch, args=(self._timeout,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch no longer."""
        self._stop.set()
        if self._timeout is not None:
            self._thread.join(self._period)

    def limit_end(self) -> threading.Timer:
        """Nobody waits for this rank from now on but its launcher: it is to end in time.

        returns: what `cancel()` lifts the limit of
        """
        seconds = SLOW * (self._timeout or 0)
        timer = threading.Timer(seconds, self._end_alone, (seconds,))
        timer.daemon = True
        if self._timeout is not None:
            timer.start()
        return timer

    def _end_alone(self, seconds: float) -> None:
        print(
            f"megatron-deft: rank {self._rank} ({this_process()}) hangs: it has not ended "
            f"{seconds / 60:.3g} minutes after the last step (train.hang_timeout)\n"
            f"{_report(self._main)['stack']}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _watch(self, timeout: float) -> None:
        while True:
            begin = time.monotonic()
            if self._stop.wait(self._period):
                return
            now = time.monotonic()
            if now - begin > 3 * self._period + 1:
                self._begin = now  # this process was stopped itself, and goes on
            is_late = now - self._begin > self._times * timeout
            try:
                if is_late or self._store.check([f"{self._key}/asked"]):
                    self._end(self._times * timeout)
            except Exception as error:
                if is_late:
                    self._give_up(self._times * timeout, error)

    def _end(self, waited: float) -> None:
        """All ranks come here once one of them has: tell, let the first one speak, and end."""
        self._set(f"rank/{self._rank}", json.dumps(_report(self._main)))
        speaks = self._store.add(f"{self._key}/asked", 1) == 1
        answered = [f"{self._key}/rank/{rank}" for rank in range(self._world)]
        self._wait_for(answered if speaks else [f"{self._key}/said"], 2 if speaks else 4)
        if speaks:
            reports = {
                rank: json.loads(self._store.get(key)) if self._store.check([key]) else None
                for rank, key in enumerate(answered)
            }
            who = {r: self._store.get(f"{self._key}/who/{r}").decode() for r in range(self._world)}
            print(verdict(reports, who, waited, self._step), file=sys.stderr, flush=True)
            self._set("said", "")
            self._wait_for([], 1)  # the others hear it before the launcher stops them
        os._exit(1)

    def _wait_for(self, keys: list[str], times: int) -> None:
        """Until the store has all `keys`, but not for ever: times (2 periods + 2 s)."""
        end = time.monotonic() + times * (2 * self._period + 2)
        while time.monotonic() < end and not (keys and self._store.check(keys)):
            time.sleep(self._period / 4)

    def _give_up(self, waited: float, error: Exception) -> None:
        print(
            f"megatron-deft: rank {self._rank}: {_late(waited, self._step)}, and the store of the "
            "run, on the machine of rank 0, does not answer: that machine or process is stopped "
            f"or gone ({error})\n{_report(self._main)['stack']}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _set(self, name: str, value: str) -> None:
        self._store.set(f"{self._key}/{name}", value)


def _report(main: int | None) -> dict[str, Any]:
    """Where the main thread stands: "waits" in a collective or for a GPU, and its "stack"."""
    frame = sys._current_frames().get(main or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    innermost = (stack[-1].line or "") if stack else ""
    waits = any(call.filename.endswith(COLLECTIVES) for call in stack)
    shown = "".join(traceback.format_list(stack[-DEPTH:]))
    return {"waits": waits or bool(WAITS.search(innermost)), "stack": shown}


def this_process() -> str:
    """Where to find it."""
    return f"host {socket.gethostname()}, process {os.getpid()}"


def _late(waited: float, step: int) -> str:
    return f"nothing was finished for {waited / 60:.3g} minutes after step {step}"


def verdict(
    reports: Mapping[int, Mapping[str, Any] | None],
    who: Mapping[int, str],
    waited: float,
    step: int,
) -> str:
    """The message that names who hangs.

    reports: of each rank, {"waits": bool, "stack": str}; None: it does not answer
    who:     host and process of each rank
    """
    silent = [rank for rank, report in reports.items() if report is None]
    busy = [rank for rank, report in reports.items() if report and not report["waits"]]
    culprits = sorted(silent + busy)
    why = f"{_late(waited, step)} (train.hang_timeout)"
    if not culprits:
        head = f"every rank waits in a collective, and for different ones: {why}"
        culprits = sorted(reports)
    else:
        names = ", ".join(f"rank {rank} ({who[rank]})" for rank in culprits)
        head = f"{names} {'hangs' if len(culprits) == 1 else 'hang'}: {why}"
    lines = [f"megatron-deft: {head}"]
    for rank in culprits:
        report = reports[rank]
        if report is None:
            lines.append(f"rank {rank} does not answer: it is stopped, or its machine is gone")
        else:
            lines.append(f"rank {rank} stands in\n{report['stack'].rstrip()}")
    return "\n".join(lines)
