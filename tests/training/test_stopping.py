"""Runs that are told to stop, or hang: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_deft.config import dump_yaml
from megatron_deft.training.hang import verdict
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, train_all
from tests.training.test_trainer import same_but_time

TIMEOUT = 240  # seconds; each run takes some 15
# the number of steps and of processes does not matter to what a step computes
ENDLESS: dict[str, Any] = {
    "train.steps": 100_000,
    "optim.schedule": "constant",
    "optim.warmup_ratio": 0,
    "monitor.landscape_every": 0,
}
# `megatron-deft train` of argv[1], where rank argv[2] halts for ten minutes before its third step
HALTING = """
import os, sys, time
from megatron_deft.data import loader

def halting(*args, whole=loader.load_steps):
    for number, step in enumerate(whole(*args)):
        if number == 2 and os.environ.get("RANK", "0") == sys.argv[2]:
            print("halts", flush=True)
            time.sleep(600)
        yield step

loader.load_steps = halting
from megatron_deft.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""
LAUNCH = "import sys; from megatron_deft.launch import *; sys.exit(launch(sys.argv[1:], Nodes({})))"


@contextmanager
def started(run_dir: Path, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """The process; it and its ranks are gone at the end of the block. They talk to run_dir.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, text=True, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(), process]:
                one.kill()
            process.wait()


def said(run_dir: Path) -> str:
    return run_dir.with_suffix(".log").read_text()


def wait_for(what: Callable[[], Any], run_dir: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < end, said(run_dir)
        time.sleep(0.05)


def has_steps(run_dir: Path, count: int) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= count


def rank(agent: subprocess.Popen[str], number: int) -> psutil.Process:
    children = psutil.Process(agent.pid).children()
    return next(one for one in children if one.environ().get("RANK") == str(number))


def yaml_of(base: Path, run_dir: Path, **keys: Any) -> str:
    path = run_dir.with_suffix(".yaml")
    path.write_text(dump_yaml(config(base, run_dir, **keys)))
    return str(path)


def terminate_all(agent: subprocess.Popen[str]) -> None:
    """As a scheduler does: the agent, which hands it on, each rank, and who reads its data."""
    processes = psutil.Process(agent.pid).children(recursive=True)
    assert len(processes) >= 4
    for one in processes:
        one.send_signal(signal.SIGTERM)
    agent.send_signal(signal.SIGTERM)


STOPS: dict[str, tuple[tuple[str, ...], Callable[[subprocess.Popen[str]], None] | None]] = {
    "SIGTERM": ((), terminate_all),
    "SIGUSR1": (("--resume",), lambda agent: rank(agent, 1).send_signal(signal.SIGUSR1)),
    "train.exit_duration": (("--resume", "--exit-duration", "1s"), None),
}


def test_stopped_runs_save_end_with_0_and_resume_exactly(base: Path, tmp_path: Path) -> None:
    """One run in three parts, each stopped in another way, against the same in one."""
    run_dir = tmp_path / "run"
    path = yaml_of(base, run_dir, **ENDLESS, **{"model.hidden_dropout": 0.1, "data.workers": 1})
    ends = [0]
    for reason, (arguments, stop) in STOPS.items():
        command = ["-m", "megatron_deft", "train", path, "--nproc-per-node", "2", *arguments]
        with started(run_dir, command) as agent:
            if stop is not None:
                wait_for(lambda: has_steps(run_dir, ends[-1] + 2), run_dir)
                stop(agent)
            assert agent.wait(TIMEOUT) == 0, said(run_dir)
        lines = [line for line in said(run_dir).splitlines() if line.startswith("stopped")]
        ends.append(len(metrics(run_dir)))
        assert lines == [
            f"stopped after step {ends[-1]} of 100000 ({reason}); go on with the same command and "
            "--resume"
        ]
        assert f"saved {run_dir}/checkpoints/step_{ends[-1]:08d} in " in said(run_dir)
    assert ends == sorted(set(ends))
    assert ends[3] == ends[2] + 1  # a second was over before the first step
    whole = config(base, tmp_path / "whole", **{**ENDLESS, "model.hidden_dropout": 0.1,
                                                "train.steps": ends[-1]})  # fmt: skip
    run_ranks(2, train_all, [whole])
    assert same_but_time(metrics(run_dir)) == same_but_time(metrics(tmp_path / "whole"))


def test_a_second_sigterm_ends_at_once(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, ["-c", HALTING, yaml_of(base, run_dir, **ENDLESS), "0"]) as process:
        wait_for(lambda: "halts" in said(run_dir), run_dir)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)  # it would finish its step
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not (run_dir / "checkpoints").exists()


def test_ranks_that_hang_are_named(base: Path, tmp_path: Path) -> None:
    """Of TP2 x PP2, rank 1 sleeps and rank 2 is stopped; ranks 0 and 3 only wait for them."""
    run_dir = tmp_path / "run"
    keys = {"parallel.tensor": 2, "parallel.pipeline": 2, "train.hang_timeout": "8s"}
    path = yaml_of(base, run_dir, **ENDLESS, **keys)
    with started(run_dir, ["-c", LAUNCH.format(4), "-c", HALTING, path, "1"]) as agent:
        wait_for(lambda: "halts" in said(run_dir), run_dir)
        stopped = rank(agent, 2)
        sleeper = rank(agent, 1)
        stopped.send_signal(signal.SIGSTOP)
        assert agent.wait(TIMEOUT) == 1
        assert not stopped.is_running()
    text = said(run_dir)
    (head,) = (line for line in text.splitlines() if " hang: " in line)
    assert f"process {sleeper.pid})" in head
    assert f"process {stopped.pid})" in head
    assert "rank 1 (host" in head
    assert "rank 2 (host" in head
    assert "rank 0" not in head
    assert "rank 3" not in head
    assert "after step 2 (train.hang_timeout)" in head
    assert "rank 2 does not answer: it is stopped, or its machine is gone" in text
    assert "in halting" in text


def test_the_verdict_on_ranks_that_wait_for_each_other() -> None:
    waits = {"waits": True, "stack": "all_reduce"}
    text = verdict({0: waits, 1: waits}, {0: "a", 1: "b"}, 90, 7)
    assert "every rank waits in a collective, and for different ones" in text
    assert "1.5 minutes after step 7" in text
    assert text.count("all_reduce") == 2
    only = verdict({0: waits, 1: None}, {0: "a", 1: "host b"}, 90, 7)
    assert only.startswith("megatron-deft: rank 1 (host b) hangs: ")
    assert "all_reduce" not in only


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (1.5, 90),
        ("1000d", 86_400_000),
        ("90s", 90),
        ("3h50m", 13800),
        ("1d12h", 129600),
        ("45m", 2700),
    ],
)
def test_durations(base: Path, tmp_path: Path, text: Any, seconds: float) -> None:
    cfg = config(base, tmp_path / "run", **{"train.exit_duration": text})
    assert cfg.train.exit_seconds == seconds


TOO_LONG = ["1e12", "99999999999999999999d", "9" * 5000 + "s", "1000d1s", "1440000.1"]


@pytest.mark.parametrize("text", ["soon", "0", "0h", "5 m", "m", "-3", "''", *TOO_LONG])
def test_what_is_no_duration_is_refused(base: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.hang_timeout=.*3h50m"):
        config(base, tmp_path / "run", **{"train.hang_timeout": text})
