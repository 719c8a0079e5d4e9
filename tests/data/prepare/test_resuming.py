"""What is interrupted goes on, and takes nothing that is not its own."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.data.prepare import tokenise
from megatron_deft.data.prepare.tokenise import RowSettings, prepare_set
from megatron_deft.errors import UserError
from tests.data.files import contents, write
from tests.data.prepare.sets import DROP, LONGEST, ROWS, TASK, hidden

SLOW = f"""
import sys, time
from megatron_deft.data import jsonl
from megatron_deft.data.prepare import tokenise
from megatron_deft.cli import main
jsonl.TASK_BYTES = {TASK}
write = tokenise.write_part
def slowly(folder, number, part):
    write(folder, number, part)
    time.sleep(60 if number > 2 else 0)  # until it is stopped, however busy the machine is
tokenise.write_part = slowly  # in the processes spawned too, which run this but not what follows
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""

INTERRUPTED = f"""
import os, signal, sys
from megatron_deft.data import jsonl
from megatron_deft.cli import main
jsonl.TASK_BYTES = {TASK}
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
os.kill(os.getpid(), signal.SIGINT)  # in a process that is being started
"""


def start_slowly(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, and a while from its end."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, str(script), "prepare", "chat", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what runs in the background deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (parts := list(tmp_path.glob(".set.parts-*/0*.npz"))) or len(parts) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path,
    tiny_folder: Path,
    file: str,
    small_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "set"
    common = ["--tokenizer", str(tiny_folder), "--max-length", str(LONGEST), "--truncation", "drop"]
    process = start_slowly(tmp_path, str(out), file, *common, "--workers", "1")
    process.kill()
    process.communicate()
    assert not out.exists()
    (work,) = tmp_path.glob(".set.parts-*")
    there = sorted(path.name for path in work.glob("0*.npz"))
    (work / there[1]).write_bytes(b"torn")
    again: list[int] = []
    write_part = tokenise.write_part
    monkeypatch.setattr(
        tokenise, "write_part", lambda f, n, p: (again.append(n), write_part(f, n, p))
    )
    caplog.set_level(logging.INFO, "megatron_deft")
    prepare_set(out, [file], tiny_folder, DROP)
    kept = {int(name.removesuffix(".npz")) for name in there} - {1}
    assert set(again).isdisjoint(kept)
    total = len(again) + len(kept)
    assert f"{len(kept)} of {total} parts are there from before: going on" in caplog.text
    prepare_set(tmp_path / "whole", [file], tiny_folder, DROP)
    assert contents(out) == contents(tmp_path / "whole")
    assert hidden(tmp_path) == []


def test_an_interrupt_ends_all_processes(tmp_path: Path, tiny_folder: Path, file: str) -> None:
    words = (str(tmp_path / "set"), file, "--tokenizer", str(tiny_folder), "--workers", "2")
    process = start_slowly(tmp_path, *words)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 30
    while is_alive(process.pid):  # Python's own helper process ends a moment later
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_interrupt_is_left_to_the_first_process(
    tmp_path: Path, tiny_folder: Path, file: str
) -> None:
    """Even while the others start: their imports take seconds, and one would print a trace."""
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    words = ("prepare", "chat", str(tmp_path / "set"), file, "--tokenizer", str(tiny_folder))
    done = subprocess.run(
        [sys.executable, str(script), *words, "--workers", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_other_settings_do_not_take_the_parts(
    tmp_path: Path,
    tiny_folder: Path,
    file: str,
    small_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_part = tokenise.write_part

    def fail_at_five(folder: Path, number: int, part: Any) -> None:
        if number == 5:
            raise KeyboardInterrupt
        write_part(folder, number, part)

    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "write_part", fail_at_five)
        with pytest.raises(KeyboardInterrupt):
            prepare_set(out, [file], tiny_folder, DROP)
    (left,) = hidden(tmp_path)
    caplog.set_level(logging.INFO, "megatron_deft")
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "write_part", fail_at_five)
        with pytest.raises(KeyboardInterrupt):
            prepare_set(
                out, [file], tiny_folder, RowSettings(max_length=LONGEST + 1, truncation="drop")
            )
    assert len(hidden(tmp_path)) == 2
    assert f"{left} is the unfinished work of other settings" in caplog.text
    assert "from before" not in caplog.text
    prepare_set(out, [file], tiny_folder, DROP)
    assert "5 of" in caplog.text
    assert hidden(tmp_path) == []


def test_after_a_bad_row_the_work_goes_on_without_it(
    tmp_path: Path,
    tiny_folder: Path,
    small_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "set"
    file = write(tmp_path / "a.jsonl", [*ROWS[:30], "bad", *ROWS])
    with pytest.raises(UserError, match="line 31: not JSON"):
        prepare_set(out, [file], tiny_folder)
    caplog.set_level(logging.INFO, "megatron_deft")
    with monkeypatch.context() as patch:
        patch.setattr(tokenise, "save_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_set(out, [file], tiny_folder, RowSettings(bad_rows="drop"))
    assert "parts are there from before" in caplog.text
    with pytest.raises(UserError, match="line 31: not JSON"):  # its part is not taken for good
        prepare_set(out, [file], tiny_folder)
    manifest = prepare_set(out, [file], tiny_folder, RowSettings(bad_rows="drop"))
    assert manifest["dropped"] == {"not JSON": {"count": 1, "places": [f"{file} line 31"]}}


def test_a_set_is_used_again_only_if_it_is_the_same_and_whole(
    tmp_path: Path, tiny_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    write_part = tokenise.write_part
    monkeypatch.setattr(
        tokenise, "write_part", lambda f, n, p: (made.append(n), write_part(f, n, p))
    )

    def times(settings: RowSettings) -> int:
        made.clear()
        prepare_set(tmp_path / "set", [file], tiny_folder, settings, reuse=True)
        return len(made)

    drop = RowSettings(bad_rows="drop")
    assert [times(s) for s in (DROP, DROP, drop, drop, RowSettings(), RowSettings())] == [
        1, 0, 1, 0, 1, 0,
    ]  # fmt: skip
    (tmp_path / "set" / "tokens.bin").write_bytes(b"torn")
    assert [times(RowSettings()), times(RowSettings())] == [1, 0]
    write(Path(file), ROWS[:9])
    assert times(RowSettings()) == 1


def test_the_work_is_one_process_s(
    tmp_path: Path, tiny_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*_: Any) -> None:
        with pytest.raises(UserError, match="another process is preparing"):
            prepare_set(tmp_path / "set", [file], tiny_folder, DROP)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenise, "write_part", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        prepare_set(tmp_path / "set", [file], tiny_folder, DROP)


def test_a_file_that_changes_meanwhile(
    tmp_path: Path, tiny_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_jobs = tokenise.run_jobs

    def then_append(*arguments: Any) -> Any:
        yield from run_jobs(*arguments)
        with open(file, "a") as handle:
            handle.write(json.dumps(ROWS[0]) + "\n")

    monkeypatch.setattr(tokenise, "run_jobs", then_append)
    with pytest.raises(UserError, match=r"a\.jsonl has changed while it was read"):
        prepare_set(tmp_path / "set", [file], tiny_folder, DROP)
    assert not (tmp_path / "set").exists()
