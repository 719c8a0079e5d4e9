"""checkpoint.export_hf: what a run leaves in run_dir/hf, and what becomes of a failed export."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_deft.checkpoint_folder import MANIFEST, is_export_of, read_manifest
from megatron_deft.config import RunConfig
from megatron_deft.convert.hf import export_hf
from megatron_deft.errors import UserError
from megatron_deft.training.exports import Exports, Running
from tests.convert.tiny_models import assert_same_tensors, tensors
from tests.distributed import run_ranks
from tests.training.test_trainer import config, train_all


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def run_with(base: Path, run_dir: Path, mode: str, **settings: object) -> RunConfig:
    return config(
        base, run_dir,
        **{"checkpoint.export_hf": mode, "train.steps": 3, "train.save_every": 1,
           "train.save_at_end": "true", **settings},
    )  # fmt: skip


def test_every_save_and_last(base: Path, tmp_path: Path) -> None:
    """train.keep_checkpoints counts for exports too, but none is removed before it was exported,
    though saving is faster than exporting. Paths are words of no shell."""
    odd = tmp_path / "$(touch pwned); touch pwned `touch pwned`"
    odd.mkdir()
    (odd / "weights").symlink_to(base / "megatron")
    every, last = odd / "every", tmp_path / "last"
    settings = {"train.keep_checkpoints": 2, "model.load": odd / "weights"}
    kept = run_with(base, every, "every_save", **settings)
    run_ranks(2, train_all, [kept, run_with(base, last, "last")])
    steps = [f"step_{step:08d}" for step in (1, 2, 3)]
    log = (every / "hf" / "export.log").read_text()
    assert [log.count(f"{step}: a Hugging Face folder, logits equal") for step in steps] == [1] * 3
    assert names(every / "hf") == ["export.log", *steps[1:]]
    assert names(every / "checkpoints") == ["latest", *steps[1:]], "none waits any more"
    assert names(last / "hf") == ["export.log", steps[-1]]
    for step in (every / "hf" / name for name in steps[1:]):
        again = export_hf(every / "checkpoints" / step.name, tmp_path / step.name, verify=False)
        assert_same_tensors(tensors(step), tensors(again))
        assert (step / "tokenizer.json").exists()
    assert not Path("pwned").exists()


def test_what_a_run_left_unexported_is_exported_when_it_is_resumed(
    base: Path, tmp_path: Path
) -> None:
    """After a crash, a failed export, or when the wish came late."""
    run = tmp_path / "run"
    run_ranks(1, train_all, [run_with(base, run, "never", **{"train.steps": 1})])
    assert names(run / "hf") == []
    litter = run / "hf" / f".step_00000009.tmp-{10**7}"  # no process has that number
    litter.mkdir(parents=True)
    again = {"train.steps": 2, "train.resume": "must"}
    run_ranks(1, train_all, [run_with(base, run, "every_save", **again)])
    both = [run / "hf" / f"step_0000000{step}" for step in (1, 2)]
    assert names(run / "hf") == ["export.log", *(folder.name for folder in both)]
    for folder in both:
        shutil.rmtree(folder)
    run_ranks(1, train_all, [run_with(base, run, "last", **again)])  # nothing is left to train
    assert names(run / "hf") == ["export.log", "step_00000002"]


def test_the_other_way_a_run_went_is_set_aside(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_ranks(1, train_all, [run_with(base, run, "never", **{"train.steps": 2})])
    for step in (run / "checkpoints").glob("step_*"):
        export_hf(step, run / "hf" / step.name, verify=False)
    back = {"train.resume": run / "checkpoints" / "step_00000001", "train.steps": 2}
    run_ranks(1, train_all, [run_with(base, run, "last", objective="nll", **back)])
    steps = ["step_00000001", "step_00000002", "step_00000002.abandoned"]
    assert names(run / "hf") == ["export.log", *steps]
    for name in steps:
        assert is_export_of(run / "hf" / name, run / "checkpoints" / name), name
    assert "- Objective: nll" in (run / "hf" / "step_00000002" / "README.md").read_text()


def kill(exports: Exports) -> None:
    """Its process, as the system does when memory is short; then the next one starts."""
    assert exports._running is not None
    exports._running.process.kill()
    exports._running.process.wait()
    exports.poll()


def checkpoint(base: Path, run: Path, step: int, objective: str = "deft") -> Path:
    """A folder that can be exported; what a run wrote differs in its manifest, as here."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    shutil.copytree(base / "megatron", folder)
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"step": step, "objective": objective}))
    return folder


def test_an_export_of_another_checkpoint_of_that_name_does_not_count(
    base: Path, tmp_path: Path
) -> None:
    """The other way's appeared when the run had gone back already."""
    step = checkpoint(base, tmp_path, 1)
    export_hf(step, tmp_path / "hf" / step.name, verify=False)
    exports = Exports(tmp_path, "last", None)
    exports.resumed(step, is_last=True)
    assert exports.needed() == [], "it has been exported"
    shutil.rmtree(step)
    checkpoint(base, tmp_path, 1, objective="nll")
    exports.resumed(step, is_last=False)
    assert exports.needed() == [], "it is not the last"
    exports.resumed(step, is_last=True)
    assert exports.needed() == [step]
    kill(exports)


def test_damaged_checkpoints_are_named_when_a_run_is_resumed(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, newest = checkpoint(base, tmp_path, 1), checkpoint(base, tmp_path, 2)
    next((bad / "state").glob("*.distcp")).unlink()
    shutil.rmtree(newest)
    exports = Exports(tmp_path, "every_save", None)
    exports.resumed(newest, is_last=False)
    assert exports.needed() == []
    assert f"warning: {bad} is damaged and not exported: state/" in capsys.readouterr().out


def no_program(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(run / "no_python"))


def no_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "hf").write_text("in the way")


@pytest.mark.parametrize("obstacle", [no_program, no_folder])
def test_an_export_that_cannot_start_does_not_stop_the_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, obstacle: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:  # fmt: skip
    exports = Exports(tmp_path, "every_save", None)
    step = checkpoint(base, tmp_path, 1)
    obstacle(tmp_path, monkeypatch)
    exports.saved(step, is_last=False)
    assert f"warning: the export of {step} failed: [Errno " in capsys.readouterr().out
    assert exports.needed() == []
    with pytest.raises(UserError, match=r"1 of its exports failed: step_00000001 \(\[Errno "):
        exports.finish()


def test_what_cannot_be_removed_does_not_stop_the_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file has the name of a step, which is no folder that can be removed as one."""
    stuck, newer = (tmp_path / "hf" / f"step_0000000{step}" for step in (1, 2))
    newer.mkdir(parents=True)
    stuck.write_text("")
    exports = Exports(tmp_path, "every_save", keep=1)
    old, new = checkpoint(base, tmp_path, 1), checkpoint(base, tmp_path, 2)
    exports.saved(new, is_last=False)
    kill(exports)
    with pytest.raises(
        UserError, match=r"killed.*train\.keep_checkpoints is not kept to: .*step_00000001"
    ):
        exports.finish()
    said = capsys.readouterr().out
    assert said.count("warning: what train.keep_checkpoints drops could not be removed: ") == 1
    assert not old.exists(), "one that is stuck does not spare the others"


def test_killed_exports_and_a_backlog(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each waiting checkpoint is kept; what is told of a killed one is not another's last line."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "export.log").write_text("hf/step_00000000: logits equal to the source's\n")
    exports = Exports(tmp_path, "every_save", keep=1)
    said = []
    for step in range(1, 6):
        exports.saved(checkpoint(base, tmp_path, step), is_last=False)
        said.append(capsys.readouterr().out)
    assert said[:3] == ["", "", ""]
    for number, line in zip((3, 4), said[3:], strict=True):
        assert line.startswith(f"warning: {number} checkpoints more than train.keep_checkpoints=1 ")
        assert "resume with a larger train.save_every" in line
    assert len(names(tmp_path / "checkpoints")) == 5
    while exports.needed():
        kill(exports)
    assert names(tmp_path / "checkpoints") == ["step_00000005"]
    killed = r"\(killed by signal 9, perhaps for want of memory"
    with pytest.raises(
        UserError,
        match=rf"5 of its exports failed: step_00000001 {killed}; train\.keep_checkpoints has "
        rf"removed that checkpoint since\); .*step_00000005 {killed}; again: megatron-deft convert",
    ):
        exports.finish()
    assert names(tmp_path / "hf") == ["export.log"]


def test_a_run_that_is_told_to_stop_leaves_its_exports_to_the_next(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = Exports(tmp_path, "every_save", None)
    exports.saved(checkpoint(base, tmp_path, 1), is_last=False)
    exports.saved(checkpoint(base, tmp_path, 2), is_last=True)
    told = iter([False, False, True])
    exports.finish(lambda: next(told))
    assert exports.needed() == []
    assert "not exported yet: step_00000001, step_00000002; the resumed" in capsys.readouterr().out
    assert names(tmp_path / "hf") == ["export.log"], "nothing half-written"


def test_a_failure_is_told_at_once_and_in_the_end(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is to be exported is damaged; what comes after it is exported all the same."""
    good, bad = (tmp_path / "checkpoints" / f"step_0000000{i}" for i in (2, 1))
    for folder in (good, bad):
        shutil.copytree(base / "megatron", folder)
    next((bad / "state").glob("*.distcp")).write_bytes(b"")
    exports = Exports(tmp_path, "every_save", None)
    exports.saved(bad, is_last=False)
    exports.saved(good, is_last=True)
    assert exports.needed() == [bad, good], "neither may be removed yet"
    with pytest.raises(
        UserError,
        match=r"the run is whole, but 1 of its exports failed: "
        r"step_00000001 \(.*0 bytes instead of.*again: megatron-deft convert export",
    ):
        exports.finish()
    said = capsys.readouterr().out
    assert f"warning: the export of {bad} failed: " in said
    assert f"exported {tmp_path / 'hf' / good.name}" in said
    assert names(tmp_path / "hf") == ["export.log", good.name], "nothing half-written"


@pytest.mark.parametrize(
    ("mode", "settings", "expected"),
    [
        ("last", {"train.save_at_end": "false"}, "train.save_at_end=true"),
        (
            "every_save",
            {"train.save_at_end": "false", "train.save_every": "null"},
            "nothing is saved",
        ),
    ],
)
def test_an_export_of_nothing_is_refused(
    base: Path, tmp_path: Path, mode: str, settings: dict[str, str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        run_with(base, tmp_path / "run", mode, **settings).validate(1, None)


def test_a_run_that_is_stopped_does_not_wait_for_its_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports = Exports(tmp_path, "every_save", None)
    process = subprocess.Popen(["sleep", "600"])
    first, second = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    exports._running, exports._waiting = Running(first, process, 0), [second]
    exports.abandon()
    assert process.poll() == -signal.SIGTERM
    assert exports.needed() == []
    assert "step_00000001, step_00000002; the resumed run does it" in capsys.readouterr().out
