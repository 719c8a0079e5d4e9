"""Ranks that are told to stop, hang or are left alone before the first step, or after the last."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, train_all
from tests.training.test_multinode import SCRIPT, environment
from tests.training.test_stopping import (
    ENDLESS,
    LAUNCH,
    TIMEOUT,
    has_steps,
    rank,
    said,
    started,
    wait_for,
    yaml_of,
)

TWO = ("--nproc-per-node", "2")


def train(path: str, *more: str) -> list[str]:
    return ["-m", "megatron_deft", "train", path, *more]


def ranks(agent: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(agent.pid).children()
    return [one for one in children if "megatron_deft" in one.cmdline()]


def stopped_line(run_dir: Path) -> str:
    (line,) = (line for line in said(run_dir).splitlines() if line.startswith("stopped"))
    return line


def test_a_signal_in_the_first_instant_of_the_ranks_is_kept(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started(run_dir, train(yaml_of(base, run_dir, **ENDLESS), *TWO)) as agent:
        wait_for(lambda: ranks(agent), run_dir)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(TIMEOUT) == 0, said(run_dir)
    line = "stopped before its first step (SIGTERM): the same command goes on"
    assert stopped_line(run_dir) == line
    assert not (run_dir / "metrics.jsonl").exists()


def test_the_script_keeps_a_signal_that_comes_before_its_agent(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["bash", str(SCRIPT), yaml_of(base, run_dir, **ENDLESS)]
    with open(run_dir.with_suffix(".log"), "w") as log:
        script = psutil.Popen(arguments, env=environment(), stdout=log, stderr=log)
    wait_for(script.children, run_dir)  # its check of the configuration
    script.send_signal(signal.SIGUSR1)
    assert script.wait(TIMEOUT) == 0, said(run_dir)
    assert "stopped before its first step (SIGUSR1)" in said(run_dir)


# `megatron-deft train` of argv[1], which tokenises for ten minutes
TOKENISING = """
import sys, time
from megatron_deft.data.prepare import tokenise

def endless(*args, **options):
    print("tokenising", flush=True)
    time.sleep(600)

tokenise.prepare_set = endless
from megatron_deft.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def test_the_making_of_data_is_broken_off(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = yaml_of(base, run_dir, **ENDLESS)
    with started(run_dir, ["-c", LAUNCH.format(2), "-c", TOKENISING, path]) as agent:
        wait_for(lambda: "tokenising" in said(run_dir), run_dir)
        agent.send_signal(signal.SIGUSR1)
        assert agent.wait(TIMEOUT) == 0, said(run_dir)
    assert "stopped before its first step (SIGUSR1)" in said(run_dir)


def test_a_validation_does_not_delay_the_stop(base: Path, tmp_path: Path) -> None:
    """The validation data are as long as a thousand steps."""
    run_dir = tmp_path / "run"
    keys = {"train.val_every": 2, "data.val_files": f"[{base / 'train.jsonl'}]"}
    code = (
        "import sys\n"
        "from megatron_deft.data import sampler\n"
        "whole = sampler.full_pass\n"
        "def long(*args):\n"
        "    print('validating', flush=True)\n"
        "    for _ in range(1000): yield from whole(*args)\n"
        "sampler.full_pass = long\n"
        "from megatron_deft.cli import main\n"
        "sys.exit(main(['train', sys.argv[1]]))\n"
    )
    path = yaml_of(base, run_dir, **ENDLESS, **keys)
    with started(run_dir, ["-c", code, path]) as process:
        wait_for(lambda: "validating" in said(run_dir), run_dir)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0, said(run_dir)
    assert stopped_line(run_dir).startswith("stopped after step 2 of 100000 (SIGTERM)")
    assert not any(name.startswith("val_") for name in metrics(run_dir)[-1])
    assert (run_dir / "checkpoints" / "step_00000002").is_dir()


def test_ranks_end_with_their_launcher_and_are_named_until_then(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = yaml_of(base, run_dir, **ENDLESS)
    with started(run_dir, train(path, *TWO)) as agent:
        wait_for(lambda: has_steps(run_dir, 2), run_dir)
        again = subprocess.run(
            [sys.executable, *train(path)], capture_output=True, text=True, check=False
        )
        left = ranks(agent)
        agent.kill()
        assert psutil.wait_procs(left, 30)[1] == [], said(run_dir)
    assert again.returncode == 2
    named = [f"is written by process {one.pid} on " in again.stderr for one in left]
    assert sorted(named) == [False, True], again.stderr
    assert said(run_dir).count("its launcher is gone") >= 1


def test_a_rank_that_does_not_come_is_named(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = yaml_of(base, run_dir, **ENDLESS, **{"train.hang_timeout": "2s"})
    with started(run_dir, train(path, *TWO)) as agent:
        wait_for(lambda: len(ranks(agent)) == 2, run_dir)
        rank(agent, 1).send_signal(signal.SIGSTOP)
        assert agent.wait(TIMEOUT) == 1
    assert "rank 1 of 2 did not come to the start of the run within 0.133 minutes" in said(run_dir)


# `megatron-deft train` of argv[1], where rank 1 does not end
ENDING = """
import os, sys, time
from megatron_deft import platform

def halting(whole=platform.shutdown):
    whole()
    if os.environ["RANK"] == "1":
        time.sleep(600)

platform.shutdown = halting
from megatron_deft.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_rank_that_does_not_end_is_named(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = yaml_of(base, run_dir, **{"train.steps": 1, "train.hang_timeout": "8s"})
    with started(run_dir, ["-c", LAUNCH.format(2), "-c", ENDING, path]) as agent:
        assert agent.wait(TIMEOUT) == 1
    text = said(run_dir)
    assert "megatron-deft: rank 1 (host " in text
    assert "it has not ended 0.533 minutes after the last step (train.hang_timeout)" in text
    assert "in halting" in text
    assert len(metrics(run_dir)) == 1


# `megatron-deft train` of argv[1], whose rank 1 dies where the checkpoint is loaded, once
DYING = """
import os, signal, sys
from megatron_deft.platform import import_megatron
import_megatron()
from megatron_deft.convert import state

def dying(*args, whole=state.load_state):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*args)

state.load_state = dying
from megatron_deft.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_a_rank_that_dies_in_a_load_is_started_again(base: Path, tmp_path: Path) -> None:
    """What the other rank meets there is no user's mistake, which would be made again."""
    run_dir = tmp_path / "run"
    run_ranks(2, train_all, [config(base, run_dir, **{"train.steps": 1, "train.save_every": 1})])
    path = yaml_of(base, run_dir, **{"train.steps": 2, "train.resume": "must"})
    launch = LAUNCH.format("2, restarts=1")
    with started(run_dir, ["-c", launch, "-c", DYING, path]) as agent:
        assert agent.wait(TIMEOUT) == 0, said(run_dir)
    assert "restart 1 of 1" in said(run_dir)
    assert "rank 1 with SIGKILL" in said(run_dir)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
