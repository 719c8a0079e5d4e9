"""nemo-run's own command finds the factory by the entry point of the installed package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)


def test_dry_run(tmp_path: Path) -> None:
    words = [
        "llm",
        "finetune",
        "--factory",
        "deft(model=llama-3.1-8b, dataset=medical)",
        "--dryrun",
    ]
    changes = ["optim.config.lr=1.25e-6", "trainer.callbacks[0].objective=eaft"]
    result = subprocess.run(
        [Path(sys.executable).parent / "nemo", *words, *changes],
        env={**os.environ, "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    for expected in (
        "Dry run for task nemo.collections.llm.api:finetune", "ObjectiveCallback",
        "objective='eaft'", "lr=1.25e-06", "data/nemo/medical", "max_steps=91",
        "Llama31Config8B", "calculate_per_token_loss=True",
    ):  # fmt: skip
        assert expected in result.stdout, result.stdout
