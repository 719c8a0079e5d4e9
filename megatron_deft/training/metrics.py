"""Metrics of a run: metrics.jsonl always, TensorBoard and Weights & Biases on top, and the line on
the terminal. Made by one rank; knows nothing of megatron.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from megatron_deft.config import MonitorConfig
from megatron_deft.files import atomic_write
from megatron_deft.training.obstacles import is_installed, obstacles_to_monitors, refuse

Metrics = Mapping[str, float]


class Monitor(Protocol):
    """A place metrics go to beside the file."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of one step."""

    def close(self) -> None:
        """Write out what is buffered."""


class TensorBoard:
    """Event files in RUN/tensorboard; a resumed run hides the steps it does again."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandB:
    """A W&B run in RUN/wandb; its id is kept in RUN/wandb_id, so a resumed run is the same run."""

    def __init__(
        self,
        run_dir: Path,
        monitor: MonitorConfig,
        resume_step: int,
        config: Mapping[str, Any] | None,
    ) -> None:
        import wandb

        remembered = run_dir / "wandb_id"
        known = remembered.read_text().strip() if resume_step and remembered.exists() else None
        self._run = wandb.init(
            project=monitor.project,
            name=monitor.experiment or run_dir.resolve().name,
            dir=str(run_dir),
            config=dict(config or {}),
            id=known,
            resume="allow" if known else None,
        )
        with atomic_write(remembered) as handle:
            handle.write(self._run.id + "\n")

    def log(self, step: int, metrics: Metrics) -> None:
        """Send one step. W&B itself ignores steps that the resumed run had before."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run (offline: leave it ready for `wandb sync`)."""
        self._run.finish()


def _monitors(
    run_dir: Path, monitor: MonitorConfig, resume_step: int, config: Mapping[str, Any] | None
) -> Iterator[Monitor]:
    """The monitors that were asked for. Errors: UserError naming the package that is missing."""
    refuse(obstacles_to_monitors(monitor))
    if monitor.tensorboard is not False and is_installed("tensorboard"):
        yield TensorBoard(run_dir, resume_step)
    if monitor.wandb:
        yield WandB(run_dir, monitor, resume_step, config)


class MetricsLog(AbstractContextManager["MetricsLog"]):
    """Records the metrics of a run, one call per step, in rising order of steps.

    run_dir:      folder of the run; metrics.jsonl is in it, made if absent
    monitor:      which monitors run beside the file
    resume_step:  last step of the checkpoint the run continues from, 0 for a new run. Lines of
                  later steps are dropped, so that no step appears twice (0 drops them all).
    config:       the run's configuration as plain values, recorded by W&B

    A line of metrics.jsonl is {"step": 12, "loss": 1.25, ...}; a value that is not finite stands
    there as null, its name listed under "nonfinite", so that every line is strict JSON. A landscape
    stands there as it is, and goes nowhere else. Each line is handed to the operating system at
    once: a killed process loses none.

    Errors: UserError when a monitor that was asked for is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        monitor: MonitorConfig,
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._last_step = resume_step
        self._monitors = list(_monitors(run_dir, monitor, resume_step, config))
        _drop_lines_after(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: Metrics, landscape: Mapping[str, Any] | None = None) -> None:
        """Record one step. Values are numbers or 0-dimensional tensors; all of a step at once."""
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        self._last_step = step
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line(step, values, landscape) + "\n")
        self._file.flush()
        for monitor in self._monitors:
            monitor.log(step, values)

    def close(self) -> None:
        """Close the file and the monitors."""
        self._file.close()
        for monitor in self._monitors:
            monitor.close()

    def __exit__(self, *_: object) -> None:
        """Close, also when the block failed."""
        self.close()


def _line(step: int, values: Mapping[str, float], landscape: Mapping[str, Any] | None) -> str:
    record: dict[str, Any] = {"step": step}
    record |= {name: value if math.isfinite(value) else None for name, value in values.items()}
    if nonfinite := [name for name, value in values.items() if not math.isfinite(value)]:
        record["nonfinite"] = nonfinite
    if landscape is not None:
        record["landscape"] = landscape
    return json.dumps(record, allow_nan=False)


def _drop_lines_after(path: Path, last_step: int) -> None:
    """Keep the lines of steps <= `last_step`; a line torn by a killed process goes too."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        kept = [line for line in lines if step_of(line) <= last_step]
    with atomic_write(path) as handle:
        handle.writelines(kept)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl, infinite for a torn one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _short(value: float) -> str:
    """12345 -> 12.3k, 1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


PROGRESS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("ce", lambda value: f"ce {value:.4g}"),
    ("p", lambda value: f"p {value:.3g}"),
    ("gate", lambda value: f"gate {value:.3g}"),
    ("accuracy", lambda value: f"acc {value:.3g}"),
    ("grad_norm", lambda value: f"grad {value:.3g}"),
    ("loss_scale", lambda value: f"scale {_short(value)}"),
    ("overflow_steps", lambda value: f"{value:.0f} overflowed"),
    ("lr", lambda value: f"lr {value:.1e}"),
    ("tokens_per_second", lambda value: f"{_short(value)} tok/s"),
    ("tflops", lambda value: f"{_short(value * 1e12)}FLOP/s"),
    ("mfu", lambda value: f"mfu {value:.1%}"),
    ("val_loss", lambda value: f"val loss {value:.4f}"),
    ("val_ce", lambda value: f"val ce {value:.4g}"),
)
"""Metrics on the progress line, in order; a metric that a step does not have is left out."""


def progress_line(
    metrics: Metrics, step: int, total_steps: int, seconds_per_step: float | None = None
) -> str:
    """One readable line, such as

    `step 12/200 | loss 1.2345 | ce 2.1 | p 0.31 | gate 0.45 | acc 0.5 | grad 1.02 | lr 1.0e-05 |
    12.3k tok/s | eta 0:03:12`

    metrics:           values under the names of PROGRESS; others are not shown
    seconds_per_step:  for the time left, h:mm:ss; left out when None
    """
    parts = [f"step {step}/{total_steps}"]
    parts += [spell(float(metrics[name])) for name, spell in PROGRESS if name in metrics]
    if seconds_per_step is not None:
        minutes, seconds = divmod(round((total_steps - step) * seconds_per_step), 60)
        parts.append(f"eta {minutes // 60}:{minutes % 60:02}:{seconds:02}")
    return " | ".join(parts)
