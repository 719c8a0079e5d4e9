"""tools/gpu_suite.sh where there is no GPU, and its stages with a stand-in for Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).parents[2] / "tools" / "gpu_suite.sh"
STAND_IN = """#!/bin/bash
case "${1/-m/$2}" in
    -) echo "9.0 Some GPU/X" ;;
    setup.py) echo "error: no compiler"; exit 3 ;;
    tools/bench_loss.py | megatron_deft) echo table; echo '{}' >"${@: -1}" ;;
    *) echo "called: $TORCH_CUDA_ARCH_LIST" ;;
esac
"""


def suite(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SUITE, *arguments], capture_output=True, text=True, env={**os.environ, "PYTHON": python}
    )


def test_help():
    done = suite("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: tools/gpu_suite.sh [--wheels DIR] [--out DIR]")
    assert "Exit codes: 0, 1 (a stage failed), 2 (no GPU, or a wrong argument)." in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = suite("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu_suite: error: no GPU that torch of ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--wat"], ["--out"], ["--wheels", "/no/such/folder"]])
def test_wrong_arguments(arguments):
    done = suite(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_suite: error: ")
    assert done.stderr.count("\n") == 1


def test_a_failed_stage_does_not_stop_the_later_ones(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = suite("--out", str(tmp_path / "out"), python=str(python))
    assert done.returncode == 1, done.stderr
    summary = [line.strip() for line in done.stdout.splitlines()[-8:]]
    assert summary[0] == "wheels     skipped: no wheels given"
    assert summary[1].startswith("build      FAILED: exit code 3")
    assert summary[2].startswith("tests      ok")
    assert summary[5].startswith("benchmark  ok")
    assert summary[6].startswith("head       ok")
    assert summary[7].startswith("train      ok")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "gpu_suite.log" in names
    measured = sorted(name for name in names if name.endswith(".json"))
    assert [name[:11] for name in measured] == ["Some-GPU-X-", "head-Some-G", "train-Some-"]
    log = (tmp_path / "out" / "gpu_suite.log").read_text()
    assert "error: no compiler" in log
    assert "called: 9.0" in log
