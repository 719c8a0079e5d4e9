"""Landscapes of whole runs: when they are logged, and that no layout changes them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.errors import UserError
from megatron_deft.training.statistics import HISTOGRAMS
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, train_all

SHORT = {"objective": "deft", "train.steps": 5, "monitor.landscape_every": 2}


def landscapes(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line["landscape"] for line in metrics(run_dir) if "landscape" in line}


def whole_table(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (40 - len(row)) for row in rows], dtype=torch.double)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(1, train_all, [config(base, run_dir, **SHORT)])
    return run_dir


def test_first_last_and_every_so_many_steps(base: Path, whole: Path, tmp_path: Path) -> None:
    assert list(landscapes(whole)) == [1, 2, 4, 5]
    none = config(base, tmp_path / "none", **{**SHORT, "monitor.landscape_every": 0})
    run_ranks(1, train_all, [none])
    assert landscapes(tmp_path / "none") == {}
    lines = [{k: v for k, v in line.items() if k != "landscape"} for line in metrics(whole)]
    for with_landscapes, without in zip(lines, metrics(tmp_path / "none"), strict=True):
        assert with_landscapes["loss"] == without["loss"]
        assert with_landscapes.keys() == without.keys()


def test_it_holds_the_tokens_of_its_step(whole: Path) -> None:
    lines = metrics(whole)
    for step, found in landscapes(whole).items():
        line = lines[step - 1]
        assert sum(map(sum, found["tokens"])) == line["kept_tokens"]
        assert found["vocab_size"] == 301
        p = [sum(row) / line["kept_tokens"] for row in found["tokens"]]
        assert p == pytest.approx([line[f"p_histogram_{i}"] for i in range(HISTOGRAMS["p"])])
        # of an untrained model: nothing is likely, and every prediction is nearly flat
        if step == 1:
            assert p[0] == pytest.approx(1)
            assert sum(row[39] for row in found["tokens"] if row) > 0.9 * line["kept_tokens"]


LAYOUTS = {
    "DP2": (2, {}),
    "CP2": (2, {"parallel.context": 2}),
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_logs_the_same(base: Path, whole: Path, tmp_path: Path, name: str) -> None:
    world, layout = LAYOUTS[name]
    run_ranks(world, train_all, [config(base, tmp_path / "run", **SHORT, **layout)])
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        for i in range(HISTOGRAMS["p"]):
            key = f"p_histogram_{i}"
            assert mine[key] == pytest.approx(theirs[key], abs=1e-3), (mine["step"], key)
    # of the first step, whose weights are the very same; later a token may cross an edge
    mine, theirs = landscapes(tmp_path / "run")[1], landscapes(whole)[1]
    assert (whole_table(mine["tokens"]) - whole_table(theirs["tokens"])).abs().sum() <= 2
    pulls = [whole_table(found["gate_error"]).sum().item() for found in (mine, theirs)]
    assert pulls[0] == pytest.approx(pulls[1], rel=1e-5)
    assert pulls[0] > 0


def collectives_of_steps(rank: int, world: int, cfg: RunConfig) -> list[int]:
    """How many all-reduces each of two steps makes; a landscape is due in the first alone."""
    from megatron_deft.training.base import read_base
    from megatron_deft.training.trainer import Trainer

    os.environ["WORLD_SIZE"] = str(world)
    base = read_base(cfg.model)
    platform.initialize()
    trainer = Trainer(cfg, base)
    counts, all_reduce = [0], dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[-1] += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted
    due = []
    for _ in range(2):
        trainer.step()
        due.append(trainer.landscape is not None)
        counts.append(0)
    assert due == [True, False]
    return counts[:2]


def test_a_landscape_costs_no_collective(base: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, collectives_of_steps, config(base, tmp_path / "run"))[0]
    assert first == second > 0


def test_a_negative_distance_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"monitor\.landscape_every=-1: must be >= 0"):
        config(base, tmp_path / "run", **{"monitor.landscape_every": -1})
