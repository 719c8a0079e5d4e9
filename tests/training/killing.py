"""A run whose ranks are killed -9 at given moments, and what its log of metrics says in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.training.ranks import metrics

WALL_CLOCK = ("seconds", "per_second", "memory", "tflops", "mfu")  # metrics that are of the moment
PATIENCE = 240.0  # seconds without what is waited for


@dataclass(frozen=True)
class Kill:
    """When which rank dies.

    moment: "start", when the rank is alive; "step", when it trains and the step is logged; "save",
            when a save of that step or of a later one has begun
    delay:  seconds after that
    """

    moment: str
    step: int
    rank: int
    delay: float


# Seconds that a start, a step or a save take here, roughly.
SPANS = {"start": 5.0, "step": 0.2, "save": 0.1}


def draw(seed: int, moments: dict[str, int], ranks: int, last: int, every: int) -> list[Kill]:
    """So many kills of each moment, up to step `last`, in rising order."""
    dice = random.Random(seed)
    kills = []
    for moment, number in moments.items():
        for _ in range(number):
            step = dice.randrange(every, last + 1, every if moment == "save" else 1)
            rank, delay = dice.randrange(ranks), dice.uniform(0.0, SPANS[moment])
            kills.append(Kill(moment, step, rank, round(delay, 3)))
    return sorted(kills, key=lambda kill: kill.step)


def write_config(base: Path, folder: Path, steps: int, save_every: int) -> Path:
    """A configuration of two ranks that saves often and would not go on from anywhere."""
    path = folder / "run.yaml"
    path.write_text(f"""
objective: deft
model: {{load: {base / "megatron"}, dtype: fp32, hidden_dropout: 0.1}}
data: {{train_files: [{base / "train.jsonl"}], max_length: 64, show_sample: false}}
optim: {{lr: 0.002}}
parallel: {{vocab_pad_multiple: 8}}
train:
  {{global_batch: 8, micro_batch: 2, steps: {steps}, save_every: {save_every}, keep_checkpoints: 2}}
monitor: {{tensorboard: false, landscape_every: 0}}
""")
    return path


def values(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    return [
        {k: v for k, v in line.items() if not any(word in k for word in WALL_CLOCK)}
        for line in metrics(run_dir)
    ]


def ranks_of(agent: psutil.Process) -> dict[int, psutil.Process]:
    """The ranks that an agent has started and that are alive, by number."""
    found = {}
    for process in agent.children():
        try:
            environment = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if "RANK" in environment:
            found[int(environment["RANK"])] = process
    return found


def half_written(run_dir: Path) -> set[str]:
    """Names of the checkpoints that are being written, or were when their writer died."""
    return {path.name for path in (run_dir / "checkpoints").glob(".step_*.tmp-*")}


def last_step(run_dir: Path) -> int:
    """The last step that is logged; 0 before the first."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


@dataclass(frozen=True)
class Scene:
    """A run folder as the last kill left it; what comes later is of the attempt after it."""

    run_dir: Path
    began: float
    left: set[str]

    def is_due(self, kill: Kill) -> bool:
        """Whether the moment of `kill` is now."""
        if kill.moment == "save":
            begun = half_written(self.run_dir) - self.left
            return any(name >= f".step_{kill.step:08d}" for name in begun)
        file = self.run_dir / "metrics.jsonl"
        is_training = file.exists() and file.stat().st_mtime > self.began
        return kill.moment == "start" or (is_training and last_step(self.run_dir) >= kill.step)


def carry_out(kill: Kill, agent: psutil.Process, run_dir: Path) -> bool:
    """Kill as told; whether it came in time: while the rank lived, and within a save if asked."""
    deadline = time.monotonic() + PATIENCE
    scene = Scene(run_dir, time.time(), half_written(run_dir))
    while not scene.is_due(kill) or kill.rank not in (ranks := ranks_of(agent)):
        assert agent.is_running(), f"the run ended before {kill}"
        assert agent.status() != psutil.STATUS_ZOMBIE, f"the run ended before {kill}"
        assert time.monotonic() < deadline, f"nothing happens before {kill}"
        time.sleep(0.002)
    time.sleep(kill.delay)
    try:
        os.kill(ranks[kill.rank].pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    in_time = kill.moment != "save" or scene.is_due(kill)
    while any(rank.is_running() for rank in ranks.values()):  # the agent stops the others
        assert time.monotonic() < deadline, "a rank outlives the others"
        time.sleep(0.01)
    return in_time


def run_and_kill(command: list[str], run_dir: Path, log: Path, kills: list[Kill]) -> int:
    """Start `python -m *command`, an agent, and kill its ranks; returns its exit code."""
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        agent = psutil.Process(process.pid)
        for kill in kills:
            print(f"after step {last_step(run_dir)}: {kill}", flush=True)
            while not carry_out(kill, agent, run_dir):
                print("too late, once more")
        return process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
