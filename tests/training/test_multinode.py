"""The example scripts for several machines, as two agents on this one."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.training.killing import PATIENCE, last_step, values, write_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, BATCH = ROOT / "examples/torchrun_multinode.sh", ROOT / "examples/slurm.sbatch"
STEPS, EVERY = 30, 5


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(base, tmp_path_factory.mktemp("multinode"), STEPS, EVERY)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> list[dict[str, float]]:
    run_dir = config.parent / "undisturbed"
    command = [sys.executable, "-m", "megatron_deft", "train", str(config), f"run_dir={run_dir}"]
    subprocess.run([*command, "--nproc-per-node", "2"], check=True, timeout=PATIENCE)
    return values(run_dir)


def environment(**more: str) -> dict[str, str]:
    """Ours, with this python's programs first on the PATH."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": programs, "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "1", **more}


def port() -> int:
    """A free one, not of those that the system deals out."""
    for number in random.sample(range(20_000, 29_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", number))
            return number
    raise AssertionError("a hundred ports are taken")


def start_script(arguments: list[str], log: Path, **more: str) -> psutil.Popen:
    with open(log, "ab") as out:
        return psutil.Popen(
            ["bash", str(SCRIPT), *arguments], env=environment(**more), stdout=out, stderr=out
        )


def kill_all(process: psutil.Process) -> None:
    """What the loss of a machine does: the agent and its ranks are gone at once."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGSTOP)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def wait_for_step(run_dir: Path, step: int, *alive: psutil.Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline, f"no step {step}"
        for process in alive:
            assert process.status() != psutil.STATUS_ZOMBIE, "it has ended"
        time.sleep(0.01)


def start_command(arguments: list[str], log: Path, **meeting: str) -> psutil.Popen:
    """`megatron-deft train` in place of the script."""
    command = [sys.executable, "-m", "megatron_deft", "train", *arguments, "--max-restarts", "3"]
    options = ["--nnodes", "2", "--rdzv-endpoint", meeting["ENDPOINT"]]
    with open(log, "ab") as out:
        return psutil.Popen(
            [*command, *options, "--node-rank", meeting["NODE_RANK"]],
            env=environment(), stdout=out, stderr=out,
        )  # fmt: skip


@pytest.mark.parametrize("start", [start_script, start_command], ids=["script", "command"])
def test_a_machine_that_is_lost_comes_back(config, undisturbed, tmp_path, start):
    run_dir = tmp_path / "lost"
    arguments = [str(config), f"run_dir={run_dir}"]
    meeting = {"NNODES": "2", "ENDPOINT": f"localhost:{port()}"}
    logs = [tmp_path / f"agent{number}.log" for number in range(2)]
    agents = [start(arguments, logs[0], **meeting, NODE_RANK="0")]
    try:
        agents.append(start(arguments, logs[1], **meeting, NODE_RANK="1"))
        wait_for_step(run_dir, 13, *agents)
        kill_all(agents[1])
        agents.append(start(arguments, logs[1], **meeting, NODE_RANK="1"))
        assert agents[2].wait(PATIENCE) == 0, logs[1].read_text()[-5000:]
        assert agents[0].wait(PATIENCE) == 0, logs[0].read_text()[-5000:]
    finally:
        for agent in agents:
            kill_all(agent)
    said = "".join(log.read_text() for log in logs)
    assert "attempt 2 of this job: train.resume is auto, not no as for the first" in said
    assert "resumed from" in said
    assert values(run_dir) == undisturbed
    if start is start_script:
        files = {path.name for path in (run_dir / "logs" / socket.gethostname()).rglob("*.log")}
        assert files == {"agent.log", "stdout.log", "stderr.log"}


SRUN = """#!/usr/bin/env bash
# A task on each node, signals handed on, the worst exit code: what slurm.sbatch wants of srun.
while [[ $1 == --* ]]; do shift; done
for _ in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do
  until wait "$task"; code=$?; ! kill -0 "$task" 2> /dev/null; do :; done
  ((code > worst)) && worst=$code
done
exit "${worst:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) for _ in $(seq "$SLURM_JOB_NUM_NODES"); do echo "$3"; done ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def test_a_slurm_job_that_is_told_to_stop_goes_on_from_the_queue(config, undisturbed, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job, requeued, log = str(port() - 20_000), tmp_path / "requeued", tmp_path / "slurm.out"
    slurm = environment(
        SLURM_JOB_ID=job, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="localhost",
        SLURM_SUBMIT_DIR=str(ROOT), REQUEUED=str(requeued),
    )  # fmt: skip
    slurm["PATH"] = f"{tmp_path}:{slurm['PATH']}"
    run_dir = config.parent / "slurm"
    command = ["bash", str(BATCH), str(config), f"run_dir={run_dir}"]

    def submit() -> psutil.Popen:
        with open(log, "ab") as out:
            return psutil.Popen(command, env=slurm, stdout=out, stderr=out)

    batch = submit()
    try:
        wait_for_step(run_dir, 12, batch)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(PATIENCE) == 0, log.read_text()[-5000:]
        assert requeued.read_text() == f"{job}\n"
        batch = submit()
        assert batch.wait(PATIENCE) == 0, log.read_text()[-5000:]
    finally:
        kill_all(batch)
    assert requeued.read_text() == f"{job}\n"
    assert values(run_dir) == undisturbed


def test_a_signal_before_srun_is_there_is_kept() -> None:
    text = BATCH.read_text()
    head = text[text.index("preempted=") : text.index("# When one agent")]
    script = f'set -euo pipefail\n{head}\nkill -USR1 $$\necho "$preempted"'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "yes\n"), result.stderr


def test_what_the_ranks_get_to_see(config: Path, tmp_path: Path) -> None:
    """A torchrun that only tells; the run's folder has a name that a shell would run."""
    told, made = tmp_path / "told", tmp_path / "made"
    (tmp_path / "torchrun").write_text(f'#!/bin/sh\nenv > {told}\nprintf "%s\\n" "$@" >> {told}\n')
    (tmp_path / "torchrun").chmod(0o755)
    own = environment(IFNAME="eth7", NCCL_IB_HCA="mlx5_3", GRACE="77")
    own["PATH"] = f"{tmp_path}:{own['PATH']}"
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "OMP_NUM_THREADS"):
        own.pop(name, None)
    run_dir = tmp_path / f"a run; touch {made} $(touch {made})"
    command = ["bash", str(SCRIPT), str(config), f"run_dir={run_dir}"]
    subprocess.run(command, env=own, check=True, timeout=PATIENCE)
    lines = told.read_text().splitlines()
    assert {
        "NCCL_SOCKET_IFNAME=eth7", "GLOO_SOCKET_IFNAME=eth7", "NCCL_IB_HCA=mlx5_3",
        "NCCL_DEBUG=WARN", "CUDA_DEVICE_MAX_CONNECTIONS=1", "OMP_NUM_THREADS=1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=77",
        f"run_dir={run_dir}", f"--log-dir={run_dir}/logs/{socket.gethostname()}",
    } <= set(lines)  # fmt: skip
    assert not made.exists()
    assert (run_dir / "logs").is_dir()


def test_a_run_dir_may_begin_with_a_dash(config: Path, tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    torchrun.chmod(0o755)
    path = f"{tmp_path}:{environment()['PATH']}"
    command = ["bash", str(SCRIPT), str(config), "run_dir=-x/y"]
    subprocess.run(
        command, env=environment(PATH=path), cwd=tmp_path, check=True, timeout=PATIENCE
    )  # fmt: skip
    logs = Path("-x/y/logs", socket.gethostname())
    assert f"--log-dir={logs}\n" in (tmp_path / logs / "agent.log").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "more", "message"),
    [
        (SCRIPT, [], {}, "usage: NNODES=4"),
        (SCRIPT, ["run.yaml"], {"NNODES": "2"}, "NNODES=2 needs ENDPOINT=HOST:PORT"),
        (SCRIPT, ["absent.yaml"], {}, "absent.yaml"),
        (SCRIPT, ["run.yaml"], {"PATH": str(Path(sys.executable).parent)}, "install procps"),
        (BATCH, [], {}, "usage: sbatch"),
        (BATCH, ["run.yaml"], {"SLURM_SUBMIT_DIR": "/"}, "submit from the folder of the repo"),
    ],
)
def test_a_mistake_is_one_line(script, arguments, more, message):
    result = subprocess.run(
        [shutil.which("bash") or "bash", str(script), *arguments],
        env=environment(**more), capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
