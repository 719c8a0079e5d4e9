"""Hugging Face folders of a run's checkpoints, written beside the training in a process of its own.

Training never waits for an export: not at a save, where the other ranks would wait too (their
collectives have timeouts), and not for its failure, which is told at once and again at the end.
What a killed run leaves unexported is exported when it is resumed.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_deft.checkpoint_folder import candidates, drop_oldest, is_export_of, verify
from megatron_deft.errors import UserError
from megatron_deft.files import remove_abandoned
from megatron_deft.platform import TORCHRUN_ENVIRONMENT
from megatron_deft.processes import signals_held

NICENESS = 10
POLL_SECONDS = 0.2
BACKLOG = 2  # checkpoints that may be kept for their exports alone before it is told
FOLDER, LOG = "hf", "export.log"  # RUN/hf/step_00000020, RUN/hf/export.log


@dataclass(frozen=True)
class Running:
    """One export: its checkpoint, its process, and where in the log its own lines begin."""

    checkpoint: Path
    process: subprocess.Popen[bytes]
    log_begin: int


class Exports:
    """The checkpoints of one run that are to be exported, one after the other; rank 0's alone.

    Args:
        run_dir: the run's folder.
        mode: checkpoint.export_hf.
        keep: exports to keep, the newest; None for all.
    """

    def __init__(self, run_dir: Path, mode: str, keep: int | None) -> None:
        self._checkpoints, self._root = run_dir / "checkpoints", run_dir / FOLDER
        self._mode, self._keep = mode, keep
        self._newest: Path | None = None  # checkpoint
        self._waiting: list[Path] = []
        self._running: Running | None = None
        self._told_backlog = BACKLOG
        self._failed: dict[Path, str] = {}  # checkpoint -> why
        self._told_prune = ""

    def saved(self, checkpoint: Path, is_last: bool) -> None:
        """A checkpoint was written; export it if the mode says so."""
        self._newest = checkpoint
        if self._mode == "every_save" or (self._mode == "last" and is_last):
            self._waiting.append(checkpoint)
            self.poll()
            self._tell_backlog()

    def resumed(self, checkpoint: Path, is_last: bool) -> None:
        """The run goes on from `checkpoint`, or had ended there: export what is still to be.

        An export that is there counts only when it was made of the checkpoint of its name as that
        is now: the run may have gone another way before, and its export may have appeared late.
        """
        self._newest = checkpoint
        for entry in self._root.glob(".step_*"):  # of exports that were killed with their run
            _clear_up(self._root / entry.name.split(".")[1])
        due = {checkpoint.name: checkpoint} if is_last and self._mode != "never" else {}
        if self._mode == "every_save":
            found, _ = candidates(self._checkpoints)
            due = {path.name: path for path in found if path.name <= checkpoint.name} | due
        self._waiting += [path for _, path in sorted(due.items()) if self._is_due(path)]
        self.poll()

    def _is_due(self, checkpoint: Path) -> bool:
        try:
            if problems := verify(checkpoint, checksums=False):
                _warn(f"{checkpoint} is damaged and not exported: {'; '.join(problems)}")
                return False
            return not is_export_of(self._root / checkpoint.name, checkpoint)
        except (OSError, UserError) as error:
            self._fail(checkpoint, str(error))
            return False

    def needed(self) -> list[Path]:
        """Checkpoints that must not be removed yet, in the order of their exports."""
        return [*([self._running.checkpoint] if self._running else []), *self._waiting]

    def poll(self) -> None:
        """Start the next export when the last one has ended."""
        while self._running or self._waiting:
            if self._running is None:
                self._start(self._waiting.pop(0))
            elif (code := self._running.process.poll()) is not None:
                ended, self._running = self._running, None
                self._collect(ended, code)
            else:
                return

    def finish(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for what is left, unless told to stop. Errors: UserError naming what failed."""
        if self.needed():
            print(f"waiting for the export of {self.needed()[-1].name}", flush=True)
        while self.needed():
            if should_stop():
                self.abandon()
                return
            self.poll()
            time.sleep(POLL_SECONDS)
        faults = []
        if self._failed:
            named = [f"{p.name} ({why}{self._again(p)})" for p, why in self._failed.items()]
            faults.append(f"{len(named)} of its exports failed: {'; '.join(named)}")
        if self._mode != "never" and (why := self._prune()):
            faults.append(f"train.keep_checkpoints is not kept to: {why}")
        if faults:
            raise UserError(f"the run is whole, but {'; and '.join(faults)}")

    def abandon(self) -> None:
        """Stop at once; what is left is exported when the run is resumed."""
        if self.needed():
            names = ", ".join(path.name for path in self.needed())
            print(f"not exported yet: {names}; the resumed run does it", flush=True)
        self._waiting.clear()
        if self._running is not None:
            self._running.process.terminate()
            self._running.process.wait()
            _clear_up(self._root / self._running.checkpoint.name)
            self._running = None

    def _start(self, checkpoint: Path) -> None:
        command = [sys.executable, "-m", "megatron_deft", *self._command(checkpoint)]
        environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN_ENVIRONMENT}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the training's memory is not ours
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with open(self._root / LOG, "ab") as log:
                begin = log.seek(0, os.SEEK_END)
                with signals_held(signal.SIGUSR1):  # a scheduler's, for the ranks
                    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        except OSError as error:  # a full disk, no memory for a process, another's folder
            self._fail(checkpoint, str(error))
            return
        self._running = Running(checkpoint, process, begin)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)

    def _command(self, checkpoint: Path) -> list[str]:
        # What is there came from a run that went another way.
        target = self._root / checkpoint.name
        return ["convert", "export", str(checkpoint), str(target), "--overwrite"]

    def _collect(self, ended: Running, code: int) -> None:
        target = self._root / ended.checkpoint.name
        if code == 0:
            print(f"exported {target}", flush=True)
            self._prune(ended.checkpoint)
        else:
            self._fail(ended.checkpoint, _reason(code, self._root / LOG, ended.log_begin))
            _clear_up(target)  # a killed one could not
            self._prune()

    def _prune(self, exported: Path | None = None) -> str:
        """Remove what train.keep_checkpoints drops and no export needs any more.

        exported: exports of later steps, there already when the run was resumed, are not counted:
            this one would be removed at once; None: those up to the newest checkpoint are
        returns: what went wrong, empty if nothing did
        """
        if self._newest is None:
            return ""
        wrong = []
        for root, newest, spare in (
            (self._root, exported or self._newest, []),
            (self._checkpoints, self._newest, self.needed()),
        ):
            try:
                drop_oldest(root, root / newest.name, self._keep, spare)
            except OSError as error:  # someone reads it over a network file system
                wrong.append(str(error))
        why = "; ".join(wrong)
        if why not in ("", self._told_prune):
            _warn(f"what train.keep_checkpoints drops could not be removed: {why}")
        self._told_prune = why
        return why

    def _tell_backlog(self) -> None:
        spared = len(self.needed()) - (self._keep or len(self.needed()))
        if spared > self._told_backlog:
            self._told_backlog = spared
            _warn(
                f"{spared} checkpoints more than train.keep_checkpoints={self._keep} are on the "
                "disk, waiting for their exports, which take longer than train.save_every steps: "
                "resume with a larger train.save_every, or with checkpoint.export_hf=last"
            )

    def _fail(self, checkpoint: Path, why: str) -> None:
        self._failed[checkpoint] = why
        _warn(f"the export of {checkpoint} failed: {why}")

    def _again(self, checkpoint: Path) -> str:
        if not checkpoint.exists():
            return "; train.keep_checkpoints has removed that checkpoint since"
        return f"; again: megatron-deft {shlex.join(self._command(checkpoint))}"


def _clear_up(target: Path) -> None:
    with suppress(OSError):
        remove_abandoned(target, "tmp")


def _warn(message: str) -> None:
    print(f"warning: {message}", flush=True)


def _reason(code: int, log: Path, begin: int) -> str:
    """Why an export failed: the last thing it said itself, or the signal that killed it."""
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code}{hint}"
    try:
        with open(log, "rb") as handle:
            handle.seek(begin)
            lines = handle.read().decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return (lines or [f"exit code {code}"])[-1].removeprefix("megatron-deft: error: ")
