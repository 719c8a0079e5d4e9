"""checkpoint.export_hf: what a run leaves in run_dir/hf, and what becomes of a failed export."""

import shutil
from pathlib import Path

import pytest

from megatron_deft.config import RunConfig
from megatron_deft.convert.hf import export_hf
from megatron_deft.errors import UserError
from megatron_deft.training.exports import Exports
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
    though saving is faster than exporting."""
    every, last = tmp_path / "every", tmp_path / "last"
    kept = run_with(base, every, "every_save", **{"train.keep_checkpoints": 2})
    run_ranks(2, train_all, [kept, run_with(base, last, "last")])
    steps = [f"step_{step:08d}" for step in (1, 2, 3)]
    log = (every / "hf" / "export.log").read_text()
    assert [log.count(f"{step}: a Hugging Face folder, logits equal") for step in steps] == [1] * 3
    assert names(every / "hf") == ["export.log", *steps[1:]]
    assert names(last / "hf") == ["export.log", steps[-1]]
    for step in (every / "hf" / name for name in steps[1:]):
        again = export_hf(every / "checkpoints" / step.name, tmp_path / step.name, verify=False)
        assert_same_tensors(tensors(step), tensors(again))
        assert (step / "tokenizer.json").exists()


def test_a_finished_run_that_was_not_exported_is(base: Path, tmp_path: Path) -> None:
    """The rerun after a failed export, or after the wish came late."""
    run_ranks(1, train_all, [run_with(base, tmp_path / "run", "never")])
    assert names(tmp_path / "run" / "hf") == []
    again = run_with(base, tmp_path / "run", "last", **{"train.resume": "must"})
    run_ranks(1, train_all, [again])
    assert names(tmp_path / "run" / "hf") == ["export.log", "step_00000003"]


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
    assert exports.needed() == [good, bad], "neither may be removed yet"
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
