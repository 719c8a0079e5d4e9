"""Metrics: the file, resuming, TensorBoard read back, W&B offline, and the progress line."""

import json
import subprocess
import sys

import pytest
import torch

from megatron_deft.config import MonitorConfig
from megatron_deft.errors import UserError
from megatron_deft.training.metrics import MetricsLog, progress_line

QUIET = MonitorConfig(tensorboard=False)


def records(run_dir) -> list[dict]:
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def scalars(run_dir, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=True)
    accumulator.Reload()
    events = accumulator.Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def test_one_line_per_step_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run", QUIET)
    log.log(1, {"loss": 1.5, "lr": 1e-5})
    assert records(tmp_path / "new" / "run") == [{"step": 1, "loss": 1.5, "lr": 1e-5}]
    log.log(2, {"loss": torch.tensor(0.5)})
    assert records(tmp_path / "new" / "run")[1] == {"step": 2, "loss": 0.5}
    log.close()


def test_nonfinite_values_are_null_and_named(tmp_path):
    with MetricsLog(tmp_path, QUIET) as log:
        log.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 1.0})
    assert records(tmp_path) == [
        {"step": 1, "loss": None, "grad_norm": None, "lr": 1.0, "nonfinite": ["loss", "grad_norm"]}
    ]


def test_resume_drops_later_and_torn_lines(tmp_path):
    with MetricsLog(tmp_path, QUIET) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 2')  # what a power cut leaves
    with MetricsLog(tmp_path, QUIET, resume_step=3) as log:
        log.log(4, {"loss": 40})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    with MetricsLog(tmp_path, QUIET) as log:
        log.log(1, {"loss": 7})
    assert records(tmp_path) == [{"step": 1, "loss": 7.0}]


def test_a_step_cannot_be_logged_twice(tmp_path):
    with MetricsLog(tmp_path, QUIET, resume_step=3) as log:
        for step in (3, 2):
            with pytest.raises(AssertionError):
                log.log(step, {})


def test_the_file_survives_a_killed_process(tmp_path):
    code = (
        "import os, sys\n"
        "from megatron_deft.config import MonitorConfig\n"
        "from megatron_deft.training.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], MonitorConfig(tensorboard=False))\n"
        "log.log(1, {'loss': 1.0})\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("setting", ["auto", True])
def test_tensorboard_holds_every_step_once_after_a_resume(tmp_path, setting):
    monitor = MonitorConfig(tensorboard=setting)
    with MetricsLog(tmp_path, monitor) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step, "lr": 0.5})
    assert scalars(tmp_path, "loss") == {step: float(step) for step in range(1, 6)}
    with MetricsLog(tmp_path, monitor, resume_step=3) as log:
        log.log(4, {"loss": 40.0, "lr": 0.25})
        log.log(5, {"loss": 50.0, "lr": 0.25})
    assert scalars(tmp_path, "loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0}
    assert scalars(tmp_path, "lr")[5] == 0.25


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with MetricsLog(tmp_path, MonitorConfig()) as log:
        log.log(1, {"loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()
    with pytest.raises(UserError, match=r"monitor\.tensorboard=true.*pip install tensorboard"):
        MetricsLog(tmp_path, MonitorConfig(tensorboard=True))


def test_without_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"monitor\.wandb=true.*pip install wandb"):
        MetricsLog(tmp_path, MonitorConfig(tensorboard=False, wandb=True))
    # nothing was lost or begun by the refusal
    assert list(tmp_path.iterdir()) == []


def test_wandb_offline_keeps_one_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monitor = MonitorConfig(tensorboard=False, wandb=True, project="p", experiment="e")
    with MetricsLog(tmp_path, monitor, config={"optim": {"lr": 1e-5}}) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 2.0})
    first = (tmp_path / "wandb_id").read_text()
    with MetricsLog(tmp_path, monitor, resume_step=1) as log:
        log.log(2, {"loss": 3.0})
    assert (tmp_path / "wandb_id").read_text() == first
    runs = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert all(name.endswith(first.strip()) for name in runs)


def test_progress_line():
    metrics = {
        "loss": 1.23449, "ce": 2.1, "p": 0.31, "gate": 0.45, "accuracy": 0.5, "grad_norm": 1.02,
        "lr": 1e-5, "tokens_per_second": 12345.6, "unknown": 3.0,
    }  # fmt: skip
    assert progress_line(metrics, 12, 200, seconds_per_step=192 / 188) == (
        "step 12/200 | loss 1.2345 | ce 2.1 | p 0.31 | gate 0.45 | acc 0.5 | grad 1.02 | "
        "lr 1.0e-05 | 12.3k tok/s | eta 0:03:12"
    )


def test_progress_line_shows_what_there_is():
    assert progress_line({}, 1, 2) == "step 1/2"
    assert progress_line({"loss": float("nan")}, 2, 2, 1.0) == "step 2/2 | loss nan | eta 0:00:00"
    line = progress_line({"loss": torch.tensor(0.5), "val_loss": 0.25}, 1, 100001, 1.0)
    assert line == "step 1/100001 | loss 0.5000 | val loss 0.2500 | eta 27:46:40"
    assert "950 tok/s" in progress_line({"tokens_per_second": 950.0}, 1, 2)
    line = progress_line({"tflops": 411.6, "mfu": 0.4162}, 1, 2)
    assert line == "step 1/2 | 412TFLOP/s | mfu 41.6%"
    line = progress_line({"loss_scale": 65536.0, "overflow_steps": 3}, 1, 2)
    assert line == "step 1/2 | scale 65.5k | 3 overflowed"
    assert "1.24GFLOP/s" in progress_line({"tflops": 1.24e-3}, 1, 2)
    assert "1.5M tok/s" in progress_line({"tokens_per_second": 1.5e6}, 1, 2)


def test_a_landscape_stands_in_the_file_alone(tmp_path):
    found = {"vocab_size": 7, "tokens": [[1, 2.5]], "gate_error": [[0.5, None]]}
    with MetricsLog(tmp_path, MonitorConfig(tensorboard=True)) as log:
        log.log(1, {"loss": float("nan")}, found)
        log.log(2, {"loss": 1.0})
    first, second = records(tmp_path)
    assert first == {"step": 1, "loss": None, "nonfinite": ["loss"], "landscape": found}
    assert second == {"step": 2, "loss": 1.0}
    assert scalars(tmp_path, "loss")[2] == 1.0
