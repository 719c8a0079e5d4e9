"""Two ranks in every layout: gradients and metrics are still those of the formulas."""

import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)
NAMES = ("data", "micro_batch", "tensor", "pipeline")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@pytest.fixture(scope="module")
def trained(
    data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Where each rank has left a mark for each layout, and what was written to stderr."""
    folder = tmp_path_factory.mktemp("layouts")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [
            *command, "--nproc-per-node=2", "-m", "tests.nemo.training", folder, data, tokenizer,
            *(f"{name}={port}" for name, port in zip(NAMES, free_ports(len(NAMES)), strict=True)),
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    return folder, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_metrics(name: str, trained: tuple[Path, str]) -> None:
    """After a layout that fails the others are not trained."""
    folder, errors = trained
    assert all((folder / f"{name}-{rank}").exists() for rank in range(2)), errors[-6000:]
