"""Atomic files and folders: whole or not there, whatever happens in the middle."""

import fcntl
import multiprocessing
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


def overtaken(target: Path, thesis: Path) -> None:
    with atomic_folder(target) as folder:
        (folder / "x").write_text("ours")
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("years of work")


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


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appears_under_the_final_name_is_not_touched(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    thesis = target / "thesis.txt" if kind == "folder" else target
    with pytest.raises(UserError, match=rf"{target} has appeared .* left as it is.*another"):
        overtaken(target, thesis)
    assert thesis.read_text() == "years of work"
    assert names(tmp_path) == {"out"}


def test_a_link_leads_to_the_folder_that_is_replaced(tmp_path: Path) -> None:
    """A weights folder linked to a large disk stays there."""
    big, link = tmp_path / "big", tmp_path / "here" / "out"
    (big / "weights").mkdir(parents=True)
    (big / "weights" / "old").write_text("old")
    link.parent.mkdir()
    link.symlink_to(big / "weights")
    with atomic_folder(link, overwrite=True) as folder:
        assert folder.parent == big
        (folder / "new").write_text("new")
    assert link.is_symlink()
    assert names(link) == {"new"}
    assert names(big) == {"weights"}
    assert names(link.parent) == {"out"}


def test_a_link_to_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "weights")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path / "big" / "weights") == {"x"}
    assert (tmp_path / "out").is_symlink()


def test_overwriting_asks_for_the_marker_at_the_end_too(tmp_path: Path) -> None:
    """Nothing was there at the start, and what came meanwhile is not of this kind."""
    target = tmp_path / "out"

    def overwriting() -> None:
        with atomic_folder(target, overwrite=True, marker="config.json") as folder:
            (folder / "config.json").write_text("ours")
            target.mkdir()
            (target / "thesis.txt").write_text("theirs")

    with pytest.raises(UserError, match=r"has appeared .* choose another name$"):
        overwriting()
    assert names(target) == {"thesis.txt"}
    assert names(tmp_path) == {"out"}
    (target / "config.json").write_text("theirs")
    with atomic_folder(target, overwrite=True, marker="config.json") as folder:
        (folder / "config.json").write_text("ours")
    assert names(target) == {"config.json"}


def _replace(target: Path, turns: int) -> None:
    for _ in range(turns):
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "x").write_text(str(os.getpid()))


def test_writers_that_overwrite_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_replace, args=(tmp_path / "out", 150)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert (tmp_path / "out" / "x").read_text() in {str(writer.pid) for writer in writers}


def test_a_file_is_not_overwritten_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("notes")
    with (
        pytest.raises(UserError, match="out is a file: remove it, or choose another"),
        atomic_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    assert (tmp_path / "out").read_text() == "notes"


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_another_container_may_have_our_pid(tmp_path: Path, kind: str) -> None:
    """What it is writing is locked and stays; once it is dead, it goes."""
    target = tmp_path / "out"
    held = tmp_path / f".out.{kind}-{os.getpid()}"
    for folder in (held, target):
        folder.mkdir()
        (folder / "x").write_text("theirs")
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "x").write_text("ours")
    assert (held / "x").read_text() == "theirs"
    assert (target / "x").read_text() == "ours"
    assert names(tmp_path) == {"out", held.name}
    os.close(descriptor)
    with atomic_folder(target, overwrite=True):
        pass
    assert names(tmp_path) == {"out"}


def test_counted_leftovers_are_removed(tmp_path: Path, dead: int) -> None:
    for name in (f".out.tmp-{dead}-1", f".out.old-{dead}-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    with atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == {"out"}
