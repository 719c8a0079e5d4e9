"""The real commands, killed, interrupted, out of room: nothing that looks finished stays behind."""

import fcntl
import os
import pty
import random
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_deft import checkpoint_folder as folders
from megatron_deft.benchmarks import synthetic
from megatron_deft.convert.hf import import_hf

ROOT = Path(__file__).parents[2]
SHAPE = "tiny"  # as large as takes long enough to be killed halfway


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hf and weights, the two sources."""
    root = tmp_path_factory.mktemp("models")
    synthetic.make(root / "hf", SHAPE)
    yield import_hf(root / "hf", root / "weights", verify=False).parent
    for path in root.rglob("*.*"):
        path.unlink()  # they are large


def start(models: Path, direction: str, out: Path, **how: Any) -> "subprocess.Popen[str]":
    source = models / ("hf" if direction == "import" else "weights")
    arguments = ["convert", direction, source, out, "--no-verify"]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_deft", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        **({"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | how),
    )  # fmt: skip


def wait_for(process: "subprocess.Popen[str]", out: Path, share: float) -> None:
    """Until the process has written that share of the model, and has not ended."""
    wanted = share * synthetic.model_bytes(SHAPE)
    while process.poll() is None:
        temporary = out.with_name(f".{out.name}.tmp-{process.pid}")
        try:
            size = sum(p.stat().st_size for p in temporary.rglob("*"))
        except FileNotFoundError:
            size = 0
        if temporary.exists() and size >= wanted:
            return
        time.sleep(0.002)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def whole(out: Path, direction: str) -> bool:
    if direction == "import":
        return folders.verify(out) == []
    return synthetic.different(out, SHAPE) == []


EARLY, ANY, LATE = (0.0, 0.05), (0.05, 0.9), (0.95, 1.0)


@pytest.mark.parametrize(
    ("direction", "moments"), [("import", (EARLY, ANY, LATE)), ("export", (ANY,))]
)
def test_killed_at_any_moment(
    models: Path, tmp_path: Path, direction: str, moments: tuple[tuple[float, float], ...]
) -> None:
    """Nothing under the final name, and the next run succeeds and clears up.

    moments: shares of the model that are written when the process is killed, from and to
    """
    out = tmp_path / "out"
    finished = []
    for number, moment in enumerate(moments):
        process = start(models, direction, out)
        wait_for(process, out, random.uniform(*moment))
        process.kill()
        process.communicate()
        if out.exists():  # it was too quick for us: then it is all there
            assert whole(out, direction)
            finished.append(out.rename(tmp_path / f"finished {number}").name)
        else:
            assert process.returncode == -signal.SIGKILL
            (left,) = names(tmp_path).difference(finished)  # and what the one before left is gone
            assert left == f".out.tmp-{process.pid}"
    assert len(finished) < len(moments)
    alive = tmp_path / f".out.tmp-{os.getpid()}"  # as if this process were converting too
    alive.mkdir()
    process = start(models, direction, out)
    _, said = process.communicate()
    assert process.returncode == 0, said
    warning, told = said.splitlines()  # and no bar, as nobody looks at it
    assert "has no tokenizer" in warning
    assert told.startswith(f"{direction}ing ")
    assert names(tmp_path).difference(finished) == {"out", alive.name}
    assert whole(out, direction)


def interruptible() -> None:
    """A shell starts what runs in the background deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_ctrl_c_leaves_nothing(models: Path, tmp_path: Path, direction: str) -> None:
    process = start(models, direction, tmp_path / "out", preexec_fn=interruptible)
    wait_for(process, tmp_path / "out", 0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert names(tmp_path) == set()


def small_files() -> None:
    """The system refuses to write files beyond 50 MB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))


def test_a_write_that_fails_is_one_line_that_names_the_file(models: Path, tmp_path: Path) -> None:
    process = start(models, "import", tmp_path / "out", preexec_fn=small_files)
    _, said = process.communicate()
    assert process.returncode == 2
    assert said.splitlines()[-1].endswith("/__0_0.distcp: File too large")
    assert "Traceback" not in said
    assert names(tmp_path) == set()


def test_a_terminal_gets_a_bar(models: Path, tmp_path: Path) -> None:
    """Which shows bytes and the time that is left."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = start(models, "import", tmp_path / "out", stderr=stderr)
    os.close(stderr)
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # how a terminal says that nobody writes to it any more
        pass
    os.close(terminal)
    assert process.wait() == 0, said
    assert b"import: " in said
    assert b"%|" in said
