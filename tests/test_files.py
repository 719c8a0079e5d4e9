"""Atomic files and folders: whole or not there, whatever happens in the middle."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder, atomic_write, require_space


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def interrupted_write(target: Path) -> None:
    with atomic_write(target, "wb") as handle:
        handle.write(b"half")
        raise KeyboardInterrupt


def interrupted_folder(target: Path, overwrite: bool = False) -> None:
    with atomic_folder(target, overwrite) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError("stop")


def test_file_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with atomic_write(target) as handle:
        handle.write("ünï")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "ünï"
    assert names(target.parent) == {"a.txt"}


def test_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(target)
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"a.bin"}


def test_folder_appears_only_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert folder.parent == tmp_path, "another file system would make the rename a copy"
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == {"out"}


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        interrupted_folder(tmp_path / "out")
    assert names(tmp_path) == set()


def test_existing_folder_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(UserError, match=r"exists already.*--overwrite"), atomic_folder(target):
        pass
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert names(target) == {"old"}
    assert names(target) == {"new"}
    assert names(tmp_path) == {"out"}


def test_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError, match="stop"):
        interrupted_folder(target, overwrite=True)
    assert names(target) == {"old"}
    assert names(tmp_path) == {"out"}


def test_rubbish_of_an_earlier_attempt_is_not_published(tmp_path: Path) -> None:
    stale = tmp_path / f".out.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "rubbish").write_text("")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path / "out") == {"x"}


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path, dead: int) -> None:
    for name in (f".out.tmp-{dead}", f".out.old-{dead}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    others = {
        f".out.tmp-{os.getppid()}",  # alive
        f".other.tmp-{dead}",
        f".out.tmp-{dead}x",
        f".out.tmp.{dead}",
        ".out.tmp-99999999999999999999",  # no process has such a number
    }
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "out"):
        assert f".out.tmp-{dead}" not in names(tmp_path)
        assert f".out.old-{dead}" in names(tmp_path), "it may be the only copy until we are done"
    assert names(tmp_path) == others | {"out"}


def test_a_folder_that_is_held_on_another_machine_stays(tmp_path: Path, dead: int) -> None:
    """Its process is not among ours, but its lock is."""
    held = tmp_path / f".out.tmp-{dead}"
    held.mkdir()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out", held.name}
    os.close(descriptor)
    with atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == {"out"}


def test_a_folder_is_locked_while_it_is_written(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    target = tmp_path / "deep" / "out"
    says = rf"{target} needs \d+\.\d\d GB, its disk has \d+\.\d\d GB left: free some, or name"
    with pytest.raises(UserError, match=says), atomic_folder(target, needs=2 * free):
        pass
    assert names(tmp_path) == set()
    require_space(target, free // 2)
