"""examples/quickstart.sh, whole, with a few steps instead of hundreds."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def quickstart(folder: Path, **sizes: str) -> "subprocess.CompletedProcess[str]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "examples" / "quickstart.sh", folder],
        env={**os.environ, "PATH": path, **sizes},
        capture_output=True,
        text=True,
    )


def test_the_whole_road(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    done = quickstart(out, WARMUP_STEPS="6", STEPS="8", TRAIN_SIZE="300", TEST_SIZE="20")
    assert done.returncode == 0, done.stderr[-3000:]
    # every command is printed before it runs
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert len(commands) == 12  # of which two convert to Megatron and two back
    assert any(line.startswith("$ env OMP_NUM_THREADS=1 torchrun ") for line in commands)
    assert "⟦" in done.stdout  # the mask of the first sample
    assert "step 8/8 | loss " in done.stdout
    lines = (out / "deft-run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["base", "deft"]
    assert (out / "report.html").is_file()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (out / "deft" / name).is_file()


def test_it_does_not_overwrite_a_strangers_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    done = quickstart(tmp_path)
    assert done.returncode == 2
    assert "name another folder" in done.stderr
    assert (tmp_path / "mine").read_text() == "precious"
