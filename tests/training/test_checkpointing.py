"""What a run finds in its folder, and how it makes way, without any training."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from megatron_deft import checkpoint_folder as folders
from megatron_deft.errors import UserError
from megatron_deft.training import checkpointing
from megatron_deft.training.checkpointing import Position
from megatron_deft.training.exports import FOLDER
from megatron_deft.training.restarts import Attempt


def test_later_checkpoints_and_their_exports_make_way(tmp_path: Path) -> None:
    for root in (tmp_path / "checkpoints", tmp_path / FOLDER):
        for step in (1, 2, 3):
            (root / folders.step_name(step)).mkdir(parents=True)
    half = tmp_path / "checkpoints" / ".step_00000004.tmp-1"
    half.mkdir()
    notes = checkpointing.clear_the_way(tmp_path, Position(2, 16))
    assert [note.rpartition("/")[2] for note in notes] == [
        "step_00000003 is not of this run: kept as step_00000003.abandoned"
    ] * 2
    kept = {"step_00000001", "step_00000002", "step_00000003.abandoned"}
    assert {path.name for path in (tmp_path / FOLDER).iterdir()} == kept
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == kept | {folders.LATEST}
    assert (tmp_path / "checkpoints" / folders.LATEST).read_text().strip() == "step_00000002"


def test_nothing_makes_way_in_a_new_folder(tmp_path: Path) -> None:
    assert checkpointing.clear_the_way(tmp_path, Position(0, 0)) == []
    assert list(tmp_path.iterdir()) == []


def test_two_runs_are_not_mixed_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "_from_rank_0", lambda look: look())
    monkeypatch.setattr(checkpointing, "_problems", lambda folder: [])
    run, other, logged, new = (tmp_path / name for name in ("run", "other", "logged", "new"))
    for run_dir in (run, other):
        folders.write_manifest(make(run_dir / "checkpoints" / "step_00000005"), kind="training",
                               spec={})  # fmt: skip
    (make(logged) / "metrics.jsonl").write_text("{}\n")
    theirs = str(other / "checkpoints" / "step_00000005")
    for run_dir in (run, logged):
        with pytest.raises(UserError, match=f"run_dir={run_dir} .*choose another run_dir"):
            checkpointing.find(Attempt(run_dir), theirs)
    # an earlier attempt of the same job, the run's own, a new folder
    for attempt in (Attempt(logged, number=2), Attempt(other), Attempt(new)):
        assert checkpointing.find(attempt, theirs) == (Path(theirs), [])


@pytest.mark.parametrize(
    ("asked", "lines", "is_same"),
    [
        ("{}", '{"step": 6, "loss": 1.0}\n{"step": 7', True),
        ("{}", '{"step": 6, "lo', True),
        ("{}/checkpoints/step_00000005", '{"step": 6}\n', True),
        ("{}", '{"step": 5}\n{"step": 6}\n', False),  # went on from an earlier one of that run
        ("auto", '{"step": 6}\n', False),
        ("{}/elsewhere", '{"step": 6}\n', False),
    ],
)
def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, lines: str, is_same: bool
) -> None:
    """In a folder that holds no more than the metrics of the dead one, by the same command."""
    monkeypatch.setattr(checkpointing, "_from_rank_0", lambda look: look())
    monkeypatch.setattr(checkpointing, "_problems", lambda folder: [])
    theirs = make(tmp_path / "other" / "checkpoints" / "step_00000005")
    folders.write_manifest(theirs, kind="training", spec={}, step=5)
    run_dir = make(tmp_path / "run")
    (run_dir / "metrics.jsonl").write_text(lines)
    begun = yaml.safe_dump({"train": {"resume": asked.format(tmp_path / "other")}})
    (run_dir / "config.yaml").write_text(begun)
    with nullcontext() if is_same else pytest.raises(UserError, match="choose another run_dir"):
        found = checkpointing.find(Attempt(run_dir), str(tmp_path / "other"))
        assert found == (theirs, [])
    for text in ("", "train: 3", "[", "train: {resume: null}", None):
        (run_dir / "config.yaml").unlink()
        if text is not None:
            (run_dir / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="choose another run_dir"):
            checkpointing.find(Attempt(run_dir), str(tmp_path / "other"))
        (run_dir / "config.yaml").touch()


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
