"""A newest checkpoint that is damaged, in each of its files: the one before is gone on from."""

import errno
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_deft import checkpoint_folder
from megatron_deft.checkpoint_folder import MANIFEST
from megatron_deft.config import RunConfig
from megatron_deft.convert import state
from megatron_deft.convert.pickles import require_safe
from megatron_deft.hashing import hash_file
from tests.distributed import run_ranks
from tests.training.ranks import (
    config,
    metrics,
    train_all,
    train_and_hear,
)
from tests.training.test_trainer import flip_a_byte, refused

LAYOUT = {
    "parallel.tensor": 2,
    "model.hidden_dropout": 0.1,
    "train.steps": 3,
    "train.save_every": 1,
}
NEWEST, BEFORE = "step_00000002", "step_00000001"
LATEST = "../latest"  # seen from the newest


def flip_a_digit(path: Path) -> None:
    """The number of samples: JSON as good as before."""
    text = path.read_text()
    assert '"consumed": 16,' in text
    path.write_text(text.replace('"consumed": 16,', '"consumed": 18,'))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def not_a_name(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\0bad")


def half_written(path: Path) -> None:
    path.rename(path.with_name(f".{path.name}.tmp-77"))


def unreadable(path: Path) -> None:
    """Whoever opens it hears of a bad disk; see `hear_all`."""
    path.with_name(f"{path.name}.unreadable").touch()


def read(path: Path) -> dict[str, Any]:
    if path.with_name(f"{path.name}.unreadable").exists():
        raise OSError(errno.EIO, "Input/output error")
    return hash_file(path)


# File of the checkpoint -> what is done to it, what is said of it.
DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("state/__0_0.distcp", flip_a_byte, "does not match its checksum"),
    ("state/__1_1.distcp", flip_a_byte, "does not match its checksum"),
    ("state/common.pt", flip_a_byte, "does not match its checksum"),
    ("state/.metadata", flip_a_byte, "does not match its checksum"),
    ("state/metadata.json", flip_a_byte, "does not match its checksum"),
    ("hf/tokenizer.json", flip_a_byte, "does not match its checksum"),
    (MANIFEST, flip_a_digit, "does not match its own checksum"),
    (MANIFEST, cut_short, "is not readable JSON"),
    (MANIFEST, Path.unlink, f"has no {MANIFEST}"),
    ("state/__1_0.distcp", cut_short, "bytes instead of"),
    ("state/__0_1.distcp", Path.unlink, "is missing"),
    ("hf/config.json", Path.unlink, "is missing"),
    ("", half_written, "half-written"),
    ("", shutil.rmtree, "missing, though latest names it"),
    ("state/__0_0.distcp", unreadable, "cannot be read (Input/output error)"),
    (LATEST, not_a_name, "not the name of a checkpoint"),
]


def hear_all(rank: int, world: int, configs: list[RunConfig]) -> list[str]:
    answers = []
    for cfg in configs:
        faulty = mock.patch.object(checkpoint_folder, "hash_file", read)
        with faulty, redirect_stdout(StringIO()) as said:
            train_all(rank, world, [cfg])
        answers.append(said.getvalue())
    return answers


def test_the_run_ends_as_if_nothing_had_been_damaged(base: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_ranks(2, train_all, [config(base, whole, **LAYOUT)])
    shutil.copytree(whole, tmp_path / "cut")
    root = tmp_path / "cut" / "checkpoints"
    shutil.rmtree(root / "step_00000003")
    (root / "latest").write_text(f"{NEWEST}\n")
    runs = []
    for number, (name, damage, _) in enumerate(DAMAGE):
        run_dir = tmp_path / str(number)
        shutil.copytree(tmp_path / "cut", run_dir)
        damage(run_dir / "checkpoints" / NEWEST / name)
        runs.append(config(base, run_dir, **LAYOUT, **{"train.resume": "auto"}))
    answers = run_ranks(2, hear_all, runs)[0]
    losses = [(line["step"], line["loss"]) for line in metrics(whole)]
    for cfg, said, (name, _, why) in zip(runs, answers, DAMAGE, strict=True):
        warning = next(line for line in said.splitlines() if line.startswith("warning:"))
        start = NEWEST if name == LATEST else BEFORE
        for part in (NEWEST, name.removeprefix("../"), why, f"going on from {start}"):
            assert part in warning, (name, why)
        run_dir = Path(cfg.run_dir)
        assert [(line["step"], line["loss"]) for line in metrics(run_dir)] == losses, (name, why)
        assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000003\n"


def becomes_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What happens to a file of the newest checkpoint once its checksum was found right.
LATER: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut": ("__1_0.distcp", cut_short, "rank 1: "),
    "no file": ("__0_0.distcp", becomes_a_folder, "rank 0: "),
    "no common state": ("common.pt", becomes_a_folder, "common.pt: Is a directory"),
}


def refused_late(rank: int, world: int, configs: dict[str, RunConfig]) -> list[str]:
    """What is said when files change between their checksums and the load."""
    answers = []
    for kind, cfg in configs.items():
        name, damage, _ = LATER[kind]

        def vet_then_damage(folder: Path, name: str = name, damage: Any = damage) -> None:
            require_safe(folder)
            torch.distributed.barrier()
            if rank == 0:
                damage(folder / name)
            torch.distributed.barrier()

        with mock.patch.object(state, "require_safe", vet_then_damage):
            answers.append(refused(rank, world, cfg))
    return answers


def unreadable_root(rank: int, world: int, cfg: RunConfig) -> str:
    """What is said when the folder of checkpoints cannot be listed, by rank 0 alone."""
    listed = Path.iterdir

    def iterdir(path: Path) -> Any:
        if path.name == "checkpoints" and rank == 0:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listed(path)

    with (
        mock.patch.object(Path, "iterdir", iterdir),
        pytest.raises(OSError, match="Input/output error") as caught,
    ):
        train_all(rank, world, [cfg])
    return f"{caught.value.filename}: {caught.value.strerror}"


def test_what_breaks_while_it_is_loaded_is_one_line_on_every_rank(
    base: Path, tmp_path: Path
) -> None:
    """And no reason to go on from another checkpoint: the next start compares everything again."""
    whole = tmp_path / "whole"
    run_ranks(2, train_all, [config(base, whole, **{**LAYOUT, "train.steps": 2})])
    runs = {}
    for kind in LATER:
        shutil.copytree(whole, tmp_path / kind)
        more = {**LAYOUT, "train.resume": "auto"}
        runs[kind] = config(base, tmp_path / kind, **more)
    heard = run_ranks(2, refused_late, runs)
    assert heard[0] == heard[1]
    for said, (kind, (_, _, cause)) in zip(heard[0], LATER.items(), strict=True):
        folder = tmp_path / kind / "checkpoints" / NEWEST
        assert said.startswith(f"{folder / 'state'} cannot be loaded (")
        assert cause in said
        assert folder.is_dir()
    more = config(base, whole, **LAYOUT, **{"train.resume": "auto"})
    heard = run_ranks(2, unreadable_root, more)
    assert heard == [f"{whole / 'checkpoints'}: Input/output error"] * 2
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "latest", BEFORE, NEWEST
    ]  # fmt: skip


def test_checkpoints_after_a_fallback(base: Path, tmp_path: Path) -> None:
    """keep_checkpoints never drops what was just written, and damaged later ones are set aside."""
    run_dir = tmp_path / "run"
    common = {"train.save_every": 1, "train.steps": 4}
    run_ranks(1, train_all, [config(base, run_dir, **common)])
    for step in (3, 4):
        (run_dir / "checkpoints" / f"step_0000000{step}" / "megatron_deft.json").unlink()
    again = {**common, "train.resume": "auto", "train.keep_checkpoints": 1, "train.steps": 5}
    said = run_ranks(1, train_and_hear, config(base, run_dir, **again))[0]
    assert "resumed from" in said
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == [
        "latest",
        "step_00000003.abandoned",
        "step_00000004.abandoned",
        "step_00000005",
    ]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000005\n"
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5]
