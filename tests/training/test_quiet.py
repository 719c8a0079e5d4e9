"""A run that goes well says nothing on stderr: no warning of packages that it is made of."""

import os
import subprocess
import sys
from pathlib import Path

from megatron_deft.config import dump_yaml
from tests.training.layouts import EP4, ETP1, make_models
from tests.training.ranks import config


def test_nothing_on_stderr(base: Path, tmp_path: Path) -> None:
    """Where megatron-core has most to warn of: tensor ranks, sequence parallel, whole experts."""
    make_models(base, tmp_path, "experts")
    keys = {**ETP1, **EP4, "train.steps": 2, "train.save_every": 1, "model.dtype": "bf16"}
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config(tmp_path / "experts", tmp_path / "run", **keys)))
    command = [sys.executable, "-m", "megatron_deft", "train", str(file), "--nproc-per-node", "4"]
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
