"""Two ranks in every layout: gradients and metrics are still those of the formulas."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)
NAMES = ("data", "micro_batch", "tensor", "pipeline")  # LAYOUTS of tests.nemo.training


@pytest.fixture(scope="module")
def trained(
    data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Where each rank has left a mark for each layout, and what was written to stderr."""
    folder = tmp_path_factory.mktemp("layouts")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", "tests.nemo.training", folder, data, tokenizer],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    return folder, result.stderr


@pytest.mark.parametrize("name", NAMES)
def test_gradient_and_metrics(name: str, trained: tuple[Path, str]) -> None:
    """After a layout that fails the others are not trained."""
    folder, errors = trained
    assert all((folder / f"{name}-{rank}").exists() for rank in range(2)), errors[-6000:]
