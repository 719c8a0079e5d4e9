"""Checkpoints that are written while training goes on, and writes that fail; on real ranks."""

import errno
import os
import resource
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig
from megatron_deft.convert.state import StateReader
from megatron_deft.errors import UserError
from megatron_deft.training.run import run
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics

TP2 = {"parallel.tensor": 2, "model.attention_dropout": 0.1, "model.dtype": "bf16"}
# its tensors own their memory; views, as of a sharded optimizer, megatron-core copies by itself
OWN = {**TP2, "parallel.distributed_optimizer": "false"}
EIGHT = {**OWN, "train.steps": 8, "train.save_every": 4}
FOUR = {**TP2, "train.steps": 4, "train.save_every": 2}


def heard(world: int, cfg: RunConfig) -> str:
    """What the run says, or its error."""
    os.environ["WORLD_SIZE"] = str(world)
    with redirect_stdout(StringIO()) as said:
        try:
            run(cfg)
        except UserError as error:
            return str(error)
    return said.getvalue()


def slowly(stack: ExitStack, wait: Callable[[int, int], None]) -> list[tuple[str, int]]:
    """Have each rank's files of tensors written when `wait(step to save, steps done)` returns.

    returns: what happens: ("begin" or "end", step to save), file by file
    """
    from megatron_deft.training import saving, trainer

    happened: list[tuple[str, int]] = []
    done = {"step": 0}
    write, train = saving._write, trainer.Trainer.step

    def step(self: Any) -> Any:
        if self.position.step in (6, 7):  # seen to be whole before the end
            futures.wait(self.saver._current.work if self.saver._current else [])
        metrics = train(self)
        done["step"] = self.position.step
        return metrics

    def wait_and_write(bucket: Any) -> Any:
        number = int(Path(bucket[0]).parents[1].name.split("_")[1].split(".")[0])
        happened.append(("begin", number))
        while wait(number, done["step"]):
            time.sleep(0.01)
        written = write(bucket)
        happened.append(("end", number))
        return written

    stack.enter_context(mock.patch.object(saving, "_write", wait_and_write))
    stack.enter_context(mock.patch.object(trainer.Trainer, "step", step))
    return happened


def save_both_ways(rank: int, world: int, configs: list[RunConfig]) -> Any:
    """Waited for; in the background, written two steps later; one save after the other."""
    waited, late, crowded = configs
    read_by_others = OSError(errno.ENOTEMPTY, "Directory not empty")
    with (
        mock.patch("megatron_deft.training.trainer.little_room", return_value="no room") as asked,
        mock.patch.object(checkpoint_folder, "drop_oldest", side_effect=read_by_others),
    ):
        warned = heard(world, waited)
    sizes = [call.args[1] for call in asked.call_args_list]
    with ExitStack() as stack:
        happened = slowly(stack, lambda saved, done: saved == 4 and done < 6)
        said = heard(world, late)
    with ExitStack() as stack:
        deadline: dict[int, float] = {}
        crowd = slowly(
            stack,
            lambda saved, _: time.monotonic() < deadline.setdefault(saved, time.monotonic() + 0.2),
        )
        heard(world, crowded)
    return said, happened, crowd, warned, sizes


def test_what_is_saved_in_the_background_is_the_step_it_was_saved_at(
    base: Path, tmp_path: Path
) -> None:
    """Bit for bit the files that a run writes which waits: weights, optimizer, generators."""
    crowded = {**TP2, "train.steps": 3, "train.save_every": 1, "train.keep_checkpoints": 2}
    configs = [
        config(base, tmp_path / "waited", **EIGHT),
        config(base, tmp_path / "late", **EIGHT, **{"checkpoint.async_save": "true"}),
        config(base, tmp_path / "crowded", **crowded, **{"checkpoint.async_save": "true"}),
    ]
    answers = run_ranks(2, save_both_ways, configs)
    for step in ("step_00000004", "step_00000008"):
        folders = [tmp_path / name / "checkpoints" / step for name in ("waited", "late")]
        waited, late = (checkpoint_folder.read_manifest(folder) for folder in folders)
        assert checkpoint_folder.verify(folders[1]) == []
        names = [name for name in waited["files"] if not name.endswith(".metadata")]  # has an id
        assert sum(name.endswith(".distcp") for name in names) == 4
        assert waited["files"].keys() == late["files"].keys()
        for name in names:
            assert waited["files"][name] == late["files"][name], (step, name)
        assert (waited["consumed"], waited["tokens"]) == (late["consumed"], late["tokens"])
    lines = [metrics(tmp_path / name) for name in ("waited", "late")]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert ["save_seconds" in line for line in lines[0]] == [False] * 4 + [True] + [False] * 3
    assert ["save_seconds" in line for line in lines[1]] == [False] * 7 + [True]
    assert 0 < lines[1][7]["save_seconds"] < lines[1][7]["save_total_seconds"]
    stored = StateReader(tmp_path / "waited" / "checkpoints" / "step_00000004" / "state").tensors
    tensors = sum(t.size.numel() * t.properties.dtype.itemsize for t in stored.values())
    _, _, _, warned, (expected, *measured) = answers[0]
    assert warned.count("warning: no room") == 3, "when it starts and after each save"
    assert warned.count("drops could not be removed: [Errno 39] Directory not empty") == 2
    assert tensors <= expected < 1.1 * tensors
    assert all(tensors < size < 2 * tensors for size in measured)
    for said, happened, crowd, *_ in answers:
        assert happened[:4] == [("begin", 4)] * 2 + [("end", 4)] * 2
        steps = [step for _, step in crowd]
        assert steps == sorted(steps) == [1] * 4 + [2] * 4 + [3] * 4, "one at a time"
        if said:
            assert said.index("step 7/8") < said.index("step_00000004 in")
            assert "training waited" in said
    root = tmp_path / "crowded" / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000002", "step_00000003"]
    assert (root / "latest").read_text() == "step_00000003\n"


def limit_files_of_rank_1(rank: int, limit: int) -> None:
    """From here on the system refuses it larger files, as it does when a quota is used up."""
    if rank == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def put_in_the_way_of_latest(root: Path) -> None:
    (root / "latest").unlink()
    (root / "latest").mkdir()


def fail_to_save(rank: int, world: int, runs: dict[str, RunConfig]) -> dict[str, Any]:
    """What each run says whose second save is hindered, and what it leaves."""
    from megatron_deft.training.saving import Saver

    start = Saver.start
    answers = {}
    for name, cfg in runs.items():
        root = Path(cfg.run_dir) / "checkpoints"

        def hindered(self: Any, *args: Any, name: str = name, root: Path = root) -> None:
            full: Any = ExitStack()
            if args[2].step == 4 and name.endswith("large"):
                limit_files_of_rank_1(rank, 2**16)
            if args[2].step == 4 and name == "latest" and rank == 0:
                put_in_the_way_of_latest(root)
            if args[2].step == 4 and name == "no room":
                full = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=10**4))
            with full:
                start(self, *args)

        with mock.patch.object(Saver, "start", hindered):
            said = heard(world, cfg)
        limit_files_of_rank_1(rank, resource.RLIM_INFINITY)
        latest = "" if name == "latest" else (root / "latest").read_text()
        answers[name] = said, latest, sorted(path.name for path in root.iterdir())
    heard(world, resumed(runs["too large"]))
    return answers


def resumed(cfg: RunConfig) -> RunConfig:
    from dataclasses import replace

    return replace(cfg, train=replace(cfg.train, resume="must"))


def test_a_write_that_fails_ends_the_run_in_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path
) -> None:
    runs = {
        name: config(base, tmp_path / name, **FOUR, **{"checkpoint.async_save": in_background})
        for name, in_background in {
            "too large": "false",
            "async too large": "true",
            "latest": "true",
            "no room": "false",
        }.items()
    }
    answers = run_ranks(2, fail_to_save, runs)
    for name, (said, latest, left) in answers[0].items():
        assert answers[1][name][0] == said, "on every rank"
        assert "\n" not in said, said
        assert said.startswith("the checkpoint of step 4 (0.001 GB) could not be written: ")
        assert "go on with --resume" in said
        if name == "latest":
            assert left == ["latest", "step_00000002", "step_00000004"]
            assert f"rank 0 could not write {tmp_path / name}/checkpoints/latest: Is a dir" in said
            continue
        assert left == ["latest", "step_00000002"], name
        root = tmp_path / name / "checkpoints"
        assert latest == "step_00000002\n"
        assert checkpoint_folder.verify(root / "step_00000002") == []
        assert "the newest is step_00000002: " in said
        if name == "no room":
            assert "needs 0.00 GB, its disk has 0.00 GB left" in said
        else:
            assert f"rank 1 could not write {root}/.step_00000004.tmp-" in said
            assert "/state/__1_" in said
            assert "File too large, with " in said
            assert "ulimit -f" in said
    ended = [line["loss"] for line in metrics(tmp_path / "too large")]
    assert len(ended) == 4
    assert ended == [line["loss"] for line in metrics(tmp_path / "no room")]
    assert (tmp_path / "too large" / "checkpoints" / "latest").read_text() == "step_00000004\n"
