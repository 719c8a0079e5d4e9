"""Hugging Face folders of a run's checkpoints, written beside the training in a process of its own.

Training never waits for an export: not at a save, where the other ranks would wait too (their
collectives have timeouts), and not for its failure, which is told at once and again at the end.
"""

import os
import subprocess
import sys
from pathlib import Path

from megatron_deft.checkpoint_folder import drop_oldest
from megatron_deft.errors import UserError
from megatron_deft.platform import TORCHRUN_ENVIRONMENT

NICENESS = 10
FOLDER, LOG = "hf", "export.log"  # RUN/hf/step_00000020, RUN/hf/export.log


class Exports:
    """The checkpoints of one run that are to be exported, one after the other; rank 0's alone.

    Args:
        run_dir: the run's folder.
        mode: checkpoint.export_hf.
        keep: exports to keep, the newest; None for all.
    """

    def __init__(self, run_dir: Path, mode: str, keep: int | None) -> None:
        self._root, self._mode, self._keep = run_dir / FOLDER, mode, keep
        self._waiting: list[Path] = []
        self._running: tuple[Path, subprocess.Popen[bytes]] | None = None
        self._failed: list[str] = []

    def saved(self, checkpoint: Path, is_last: bool) -> None:
        """A checkpoint was written; export it if the mode says so."""
        if self._mode == "every_save" or (self._mode == "last" and is_last):
            self._waiting.append(checkpoint)
            self.poll()

    def ended(self, checkpoint: Path) -> None:
        """The run had ended at `checkpoint` before it was started; export it if nobody has."""
        if not (self._root / checkpoint.name / "config.json").exists():
            self.saved(checkpoint, is_last=True)

    def needed(self) -> list[Path]:
        """Checkpoints that must not be removed yet."""
        return [*self._waiting, *([self._running[0]] if self._running else [])]

    def poll(self, wait: bool = False) -> None:
        """Start the next export when the last one has ended; with `wait`, until none is left."""
        while self._running or self._waiting:
            if self._running is None:
                self._start(self._waiting.pop(0))
            elif wait or self._running[1].poll() is not None:
                self._collect(*self._running)
                self._running = None
            else:
                return

    def finish(self) -> None:
        """Wait for what is left. Errors: UserError naming the exports that failed."""
        if self.needed():
            print(f"waiting for the export of {self.needed()[-1].name}", flush=True)
        self.poll(wait=True)
        if self._failed:
            raise UserError(
                f"the run is whole, but {len(self._failed)} of its exports failed: "
                f"{'; '.join(self._failed)}"
            )

    def _start(self, checkpoint: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_deft", *self._command(checkpoint)]
        environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN_ENVIRONMENT}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the training's memory is not ours
        with open(self._root / LOG, "ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        self._running = checkpoint, process

    def _command(self, checkpoint: Path) -> list[str]:
        # What is there came from a run that went another way.
        target = self._root / checkpoint.name
        return ["convert", "export", str(checkpoint), str(target), "--overwrite"]

    def _collect(self, checkpoint: Path, process: subprocess.Popen[bytes]) -> None:
        code, log = process.wait(), self._root / LOG
        if code == 0:
            print(f"exported {self._root / checkpoint.name}", flush=True)
            drop_oldest(self._root, self._root / checkpoint.name, self._keep)
            return
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = (lines or [""])[-1].removeprefix("megatron-deft: error: ") or f"exit code {code}"
        again = f"again: megatron-deft {' '.join(self._command(checkpoint))}"
        self._failed.append(f"{checkpoint.name} ({why}; {again})")
        print(f"warning: the export of {checkpoint} failed: {why}", flush=True)
