"""What a run finds in its folder, and how it makes way, without any training."""

from pathlib import Path

import pytest

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


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
