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
        "from megatron_deft import launch as module\n"
        "from megatron_deft.launch import Nodes, launch\n"
        "module.PATIENCE = 1  # these ranks do not listen to SIGTERM\n"
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


def test_a_rank_that_dies_is_named_and_all_start_again():
    result = start(
        "import os, signal, sys, time\n"
        "restart = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "if restart == 0 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if restart == 1 and os.environ['RANK'] == '0': sys.exit(7)\n"
        "if restart < 2: time.sleep(30)\n"
        "print(f'whole at restart {restart}\\n', end='')",
        "Nodes(2, restarts=2)",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "whole at restart 2\n" * 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("megatron-deft")]
    assert lines == [
        "megatron-deft: failed: rank 1 with SIGKILL; restart 1 of 2",
        "megatron-deft: failed: rank 0 with exit code 7; restart 2 of 2",
    ]


def test_a_users_mistake_is_not_made_again():
    worker = "print('started\\n', end='', flush=True)\n" + MISTAKE.format(ranks=(0, 1), slow=None)
    result = start(worker, "Nodes(2, restarts=3)")
    assert result.returncode == 2
    assert result.stderr.strip() == "oh no, a mistake"
    assert result.stdout == "started\n" * 2


def test_ranks_that_died_too_often_end_the_run():
    result = start("import sys\nsys.exit(3)", "Nodes(1, restarts=1)")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "megatron-deft: failed: rank 0 with exit code 3; restart 1 of 1",
        "megatron-deft: the run failed: rank 0 with exit code 3; see above",
    ]


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


SPEAK = (
    "import os, torch.distributed as dist\n"
    "dist.init_process_group('gloo')\n"
    "got = [None] * dist.get_world_size()\n"
    "dist.all_gather_object(got, (dist.get_rank(), os.environ['GROUP_RANK']))\n"
    "print(sorted(got))\n"
    "dist.destroy_process_group()\n"
)


@pytest.mark.parametrize("ranks", [(None, None), (1, 0)], ids=["by name", "as they are told"])
def test_two_nodes_meet_at_the_endpoint(ranks):
    port = quiet_port()
    processes = [
        subprocess.Popen(
            command(SPEAK, f"Nodes(1, 2, {rank}, 'localhost:{port}')"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ranks
    ]  # fmt: skip
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert out.strip() == "[(0, '0'), (1, '1')]"


def test_who_waits_for_other_machines_stops_at_once():
    process = subprocess.Popen(
        command("pass", f"Nodes(1, 2, 0, 'localhost:{quiet_port()}')"),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(8)  # or it has not begun to wait: it stops all the same
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0
    assert err == "megatron-deft: stopped while it waited for the other machines\n"


def test_ranks_that_do_not_listen_are_killed_by_a_second_sigterm():
    worker = "import time\nprint('ready', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen(
        command(worker, "Nodes(1)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "rank 0 with SIGKILL" in err
    assert time.monotonic() - begun < 55  # the rank did not sleep to its end


def test_a_users_mistake_on_one_node_ends_the_other():
    port = quiet_port()
    worker = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit(2)\n"
        "time.sleep(5)\n"
        "sys.exit(1)  # as a rank does that lost the other\n"
    )
    nodes = "Nodes(1, 2, {}, 'localhost:{}', restarts=3)"
    processes = [
        subprocess.Popen(
            command(worker, nodes.format(rank, port)), stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert errors[0].splitlines() == [
        "megatron-deft: failed: rank 0 with exit code 1; restart 1 of 3",
        "megatron-deft: the run failed: another machine ended it: see there",
    ]


def test_an_endpoint_without_a_machine_is_an_error():
    code = (
        "import sys\n"
        "from megatron_deft import launch\n"
        "launch.STORE_SECONDS = 1\n"
        f"nodes = launch.Nodes(1, 2, 1, 'localhost:{quiet_port()}')\n"
        "sys.exit(launch.launch(['-c', 'pass'], nodes))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert result.returncode == 1
    assert "nothing answers at localhost" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "--nproc-per-node 0"),
        ((1, 0), "--nnodes 0"),
        ((1, 2, 2, "h:1"), "--node-rank 2"),
        ((1, 1, 0, None, -1), "--max-restarts -1"),
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
