"""Attempts of one job: what ranks know of those before them that died.

torchrun's agent starts all ranks again when one dies. They must go on where the run was, whatever
train.resume said when it began, but never in a folder that another job has left. So rank 0 records
in RUN/.job which agents its ranks belong to, once the run's folder is its own; an attempt that has
one of them is of the same job. (TORCHELASTIC_RESTART_COUNT alone does not tell: an agent that takes
the place of a lost one begins at 0, and the first attempt may die before it has looked at the
folder.)
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_deft import checkpoint_folder
from megatron_deft.files import atomic_write
from megatron_deft.training.data import on_rank_0

NAME = ".job"
LOCK_SECONDS = 120  # until a shared disk takes the lock from a machine that is lost (NFSv4: 90)


@dataclass(frozen=True)
class Attempt:
    """One start of a job's ranks.

    run_dir: the run's folder
    agents:  those of all ranks, empty where there are none (one process, srun)
    number:  1 for the job's first, and for any before which none got hold of the run's folder
    has_own: whether the folder has checkpoints
    """

    run_dir: Path
    agents: frozenset[str] = frozenset()
    number: int = 1
    has_own: bool = False

    def resume(self, asked: str) -> str:
        """What train.resume means to this attempt: "auto" in place of "no" after the first.

        asked: train.resume; a folder counts until the run has a checkpoint of its own
        """
        if self.number == 1 or asked == "must":
            return asked
        return "auto" if asked in ("no", "auto") or self.has_own else asked

    def notes(self, asked: str) -> list[str]:
        """Lines for the log."""
        if self.number == 1:
            return []
        used = self.resume(asked)
        why = "" if used == asked else f", not {asked} as for the first"
        return [f"attempt {self.number} of this job: train.resume is {used}{why}"]

    def begin(self) -> None:
        """Record that the run's folder is this job's from now on. Rank 0 calls it."""
        if self.agents:
            with atomic_write(self.run_dir / NAME) as handle:
                json.dump({"agents": sorted(self.agents), "attempt": self.number}, handle)
                handle.write("\n")


def this_attempt(run_dir: Path) -> Attempt:
    """Which attempt this is, the same on every rank; all of them call it."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _agent())
    agents = frozenset(name for name in found if name is not None)
    # another machine may see the folder as it was a moment ago
    number, has_own = on_rank_0(
        lambda: (_number(run_dir, agents), bool(checkpoint_folder.candidates(run_dir)[0])),
        is_quick=True,
    )
    return Attempt(run_dir, agents, number, has_own)


def _agent() -> str | None:
    """The agent that started this rank: its machine and its folder of logs, which only it has."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_0/0/error.json
    return f"{socket.gethostname()}:{Path(file).parents[2]}" if file else None


def _number(run_dir: Path, agents: frozenset[str]) -> int:
    try:
        before = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        return int(before["attempt"]) + 1 if agents & set(before["agents"]) else 1
    except (OSError, ValueError, KeyError, TypeError):
        return 1  # no attempt got so far
