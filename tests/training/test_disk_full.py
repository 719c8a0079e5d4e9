"""A disk that is really full: a small file system of its own, in a namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deft import checkpoint_folder
from megatron_deft.config import dump_yaml
from tests.training.ranks import config, metrics

MOUNT = 'mount -t tmpfs -o size=64m none "$1" && shift && exec "$@"'
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh"]
# `megatron-deft train` of argv[1], whose disk somebody fills just before (argv[2]) or after it is
# found to have room for the second checkpoint; then copied to argv[3], for it goes with the process
FILLING = """
import os, shutil, sys
from pathlib import Path
from megatron_deft.training import saving

def fill(folder):
    with open(folder / "of-somebody-else", "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError as error:
            print("full:", error.strerror, flush=True)
        file.truncate(file.tell() - 2**18)  # room for a message, and for part of a file

def require_space(path, needed, whole=saving.require_space):
    second = path.name.endswith("2")
    if second and sys.argv[2] == "before":
        fill(path.parents[2])
    whole(path, needed)
    if second and sys.argv[2] == "after":
        fill(path.parents[2])

saving.require_space = require_space
from megatron_deft.cli import main
code = main(["train", sys.argv[1]])
shutil.copytree(Path(sys.argv[1]).parent / "disk" / "run", sys.argv[3])
sys.exit(code)
"""


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    try:
        return subprocess.run([*UNSHARE, folder, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("in_background", ["false", "true"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(
    base: Path, tmp_path: Path, when: str, in_background: str
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    if not may_mount(disk):
        pytest.skip("needs Linux that lets users make namespaces")
    cfg = config(
        base,
        disk / "run",
        **{"train.steps": 4, "train.save_every": 1, "checkpoint.async_save": in_background},
    )
    (tmp_path / "run.yaml").write_text(dump_yaml(cfg))
    script = [sys.executable, "-c", FILLING, tmp_path / "run.yaml", when, kept]
    done = subprocess.run([*UNSHARE, disk, *script], capture_output=True, text=True, timeout=300)

    assert "full: No space left on device" in done.stdout
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "could not be written" in line)
    assert "the checkpoint of step 2 (" in line
    assert ("No space left on device" in line) == (when == "after")
    assert line.endswith(
        "the newest is step_00000001: free some space, or lower train.keep_checkpoints, "
        "then go on with --resume"
    )
    root = kept / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001"]
    assert (root / "latest").read_text() == "step_00000001\n"
    assert checkpoint_folder.verify(root / "step_00000001") == []
    assert 2 <= len(metrics(kept)) <= 3
