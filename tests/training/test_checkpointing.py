"""What a run finds in its folder, and how it makes way, without any training."""

from pathlib import Path

from megatron_deft import checkpoint_folder as folders
from megatron_deft.training import checkpointing
from megatron_deft.training.checkpointing import Position
from megatron_deft.training.exports import FOLDER


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
