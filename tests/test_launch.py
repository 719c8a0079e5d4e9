"""Starting ranks: environment, exit codes, and who prints a user's mistake."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from megatron_deft.errors import UserError
from megatron_deft.launch import Nodes

TIMEOUT = 120  # seconds; a launch takes about 3


def command(worker: str, nodes: str) -> list[str]:
    """A process that launches ranks, each running the python code `worker`."""
    code = (
        "import sys\n"
        "from megatron_deft.launch import Nodes, launch\n"
        f"sys.exit(launch(['-c', {worker!r}], {nodes}))\n"
    )
    return [sys.executable, "-c", code]


def start(worker: str, nodes: str = "Nodes(2)") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(worker, nodes), capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


MISTAKE = (
    "import os, sys, time\n"
    "from megatron_deft.launch import report_user_error\n"
    "rank = int(os.environ['RANK'])\n"
    "if rank not in {ranks}: time.sleep(30)\n"
    "report_user_error('oh no, a mistake')\n"
    "if rank == {slow}: time.sleep(30)\n"
    "sys.exit(2)\n"
)


def test_every_rank_has_torchruns_environment():
    result = start(
        "import os\n"
        "names = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'OMP_NUM_THREADS']\n"
        "os.environ['MASTER_PORT'], os.environ['MASTER_ADDR']\n"
        "print(' '.join(os.environ[name] for name in names) + '\\n', end='')"
    )
    assert result.returncode == 0, result.stderr
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    assert sorted(result.stdout.splitlines()) == [f"0 0 2 2 {threads}", f"1 1 2 2 {threads}"]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("ranks", "slow"),
    [((1,), None), ((0, 1), 0)],
    ids=["rank 1 alone", "every rank, 0 stopped while it ends"],
)
def test_a_users_mistake_is_one_line_and_code_2(ranks, slow):
    result = start(MISTAKE.format(ranks=ranks, slow=slow))
    assert result.returncode == 2
    assert result.stderr.strip() == "oh no, a mistake"


def test_a_crash_names_the_rank_below_its_traceback():
    result = start(
        "import os, time\n"
        "if os.environ['RANK'] == '1': raise RuntimeError('broken')\n"
        "time.sleep(30)"
    )
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert "RuntimeError: broken" in lines
    assert lines[-1] == "megatron-deft: the run failed: rank 1 with exit code 1; see above"


def test_a_killed_rank_is_named_with_its_signal():
    result = start(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '0': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(30)"
    )
    assert result.returncode == 1
    assert "rank 0 with SIGKILL" in result.stderr


def test_an_interrupt_stops_the_ranks_and_is_130():
    worker = (
        "import sys, time\n"
        "try: print('ready', flush=True), time.sleep(60)\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    process = subprocess.Popen(
        command(worker, "Nodes(1)"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert err == ""
    assert time.monotonic() - begun < 55  # the rank did not sleep to its end


def quiet_port() -> int:
    """A free port, not of those that the system deals out: ranks of other tests ask it for many."""
    for port in random.sample(range(20_000, 29_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port
    raise AssertionError("a hundred ports are taken")


def test_two_nodes_meet_at_the_endpoint():
    port = quiet_port()
    worker = (
        "import os, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "got = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(got, (dist.get_rank(), os.environ['GROUP_RANK']))\n"
        "print(sorted(got))\n"
        "dist.destroy_process_group()\n"
    )
    processes = [
        subprocess.Popen(
            command(worker, f"Nodes(1, 2, {rank}, 'localhost:{port}')"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (1, 0)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == "[(0, '0'), (1, '1')]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--nproc-per-node 0"),
        ((1, 0), "--nnodes 0"),
        ((1, 2, 2, "h:1"), "--node-rank 2"),
        ((1, 2, 0), "--rdzv-endpoint HOST:PORT"),
        ((1, 2, 0, "host"), "got host"),
        ((1, 2, 0, ":29500"), "got :29500"),
    ],
)
def test_impossible_nodes(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Nodes(*arguments)


def test_world_size():
    assert Nodes(8, 2, 1, "h:1").world_size == 16
