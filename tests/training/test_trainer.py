"""Whole runs on real gloo ranks: layouts agree, resume is exact, numbers mean what they say."""

import json
import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft.config import RunConfig, load_config
from megatron_deft.errors import UserError
from megatron_deft.training.run import run
from tests.distributed import run_ranks

# Every family; of cayley the form whose mean does not depend on the data-parallel size.
LAYOUT_FREE = [
    "nll",
    "p",
    "tsallis(q=0.5)",
    "onlytopp(t=0.0037)",
    "onlybottomp(t=0.01)",
    "onlytoplogp(t=0.0037)",
    "onlybottomlogp(t=0.01)",
    "dft",
    "eaft",
    "eaft(entropy=exact)",
    "cayley",
    "deft",
]
STEPS = 20


def config(base: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    settings = {
        "run_dir": run_dir,
        "model.load": base / "megatron",
        "model.dtype": "fp32",
        "data.train_files": f"[{base / 'train.jsonl'}]",
        "data.show_sample": "false",
        "data.max_length": 64,
        "optim.lr": 0.002,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "train.steps": STEPS,
        "train.save_at_end": "false",
        "monitor.tensorboard": "false",
        "parallel.vocab_pad_multiple": 8,
        **overrides,
    }
    empty = run_dir.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    return load_config(empty, [f"{key}={value}" for key, value in settings.items()])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train_all(rank: int, world: int, configs: list[RunConfig]) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    for cfg in configs:
        run(cfg)


def losses_of(base: Path, folder: Path, world: int, **layout: Any) -> dict[str, list[float]]:
    configs = [config(base, folder / spec, objective=spec, **layout) for spec in LAYOUT_FREE]
    run_ranks(world, train_all, configs)
    return {spec: [line["loss"] for line in metrics(folder / spec)] for spec in LAYOUT_FREE}


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of every objective in one process."""
    return losses_of(base, tmp_path_factory.mktemp("tp1"), 1)


LAYOUTS = {
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "DP2": (2, {}),
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_process(
    base: Path, tmp_path: Path, whole: dict[str, list[float]], name: str
) -> None:
    world, layout = LAYOUTS[name]
    got = losses_of(base, tmp_path, world, **layout)
    for spec in LAYOUT_FREE:
        assert len(got[spec]) == STEPS
        assert whole[spec][0] != pytest.approx(whole[spec][-1], rel=1e-3), "nothing was learned"
        # fp32 rounding, amplified by 20 steps of Adam
        assert got[spec] == pytest.approx(whole[spec], rel=2e-4), spec


def test_objectives_are_different_runs(whole: dict[str, list[float]]) -> None:
    """No objective is quietly another: each has a trajectory of its own."""
    trajectories = {tuple(round(loss, 6) for loss in losses) for losses in whole.values()}
    assert len(trajectories) == len(LAYOUT_FREE)


def same_but_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "step_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


RESUMED = {
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "DP2 bf16 with dropout": (2, {"model.dtype": "bf16", "model.hidden_dropout": 0.1}),
    "TP2 sequence": (2, {"parallel.tensor": 2, "parallel.sequence": "true"}),
    "one process, no distributed optimizer": (1, {"parallel.distributed_optimizer": "false"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_uninterrupted_to_the_last_digit(
    base: Path, tmp_path: Path, name: str
) -> None:
    world, layout = RESUMED[name]
    common = {**layout, "train.steps": 6, "train.save_every": 3, "train.keep_checkpoints": 2}
    run_dir = tmp_path / "run"
    run_ranks(world, train_all, [config(base, run_dir, **common)])
    uninterrupted = metrics(run_dir)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000006",
    ]
    # lose the newest checkpoint: what is gone on from is step 3
    (run_dir / "checkpoints" / "step_00000006" / "megatron_deft.json").unlink()
    run_ranks(world, train_all, [config(base, run_dir, **common, **{"train.resume": "must"})])
    resumed = metrics(run_dir)
    assert [line["step"] for line in resumed] == list(range(1, 7))
    assert same_but_time(resumed) == same_but_time(uninterrupted)


def test_resume_at_another_layout(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = {"train.steps": 6, "train.save_every": 3}
    two = {"parallel.tensor": 2, "parallel.pipeline": 2}
    run_ranks(4, train_all, [config(base, run_dir, **common, **two)])
    uninterrupted = [line["loss"] for line in metrics(run_dir)]
    start = run_dir / "checkpoints" / "step_00000003"
    other = tmp_path / "other"
    run_ranks(2, train_all, [config(base, other, **common, **{"train.resume": start})])
    resumed = [line["loss"] for line in metrics(other)]
    assert resumed == pytest.approx(uninterrupted[3:], rel=1e-5)


def train_and_hear(rank: int, world: int, cfg: RunConfig) -> str:
    with redirect_stdout(StringIO()) as said:
        run(cfg)
    return said.getvalue()


def damage(checkpoint: Path, how: str) -> None:
    if how == "half-written":
        checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.tmp-77"))
    elif how == "flipped byte":
        path = next((checkpoint / "state").glob("*.distcp"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    else:
        next((checkpoint / "state").glob("*.distcp")).unlink()


@pytest.mark.parametrize("how", ["half-written", "flipped byte", "missing file"])
def test_a_damaged_newest_checkpoint_falls_back_and_names_both(
    base: Path, tmp_path: Path, how: str
) -> None:
    run_dir = tmp_path / "run"
    common = {"train.steps": 2, "train.save_every": 1}
    run_ranks(1, train_all, [config(base, run_dir, **common)])
    damage(run_dir / "checkpoints" / "step_00000002", how)
    resumed = config(base, run_dir, **common, **{"train.resume": "auto"})
    said = run_ranks(1, train_and_hear, resumed)[0]
    warning = next(line for line in said.splitlines() if line.startswith("warning:"))
    assert "step_00000002" in warning
    assert "going on from step_00000001" in warning
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]


def refused(rank: int, world: int, cfg: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        run(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_that_would_overwrite_or_cannot_resume_are_refused(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cfg = config(base, run_dir, **{"train.steps": 1, "train.save_at_end": "true"})
    run_ranks(1, train_all, [cfg])
    assert "pass --resume" in run_ranks(1, refused, cfg)[0]
    none = config(base, tmp_path / "none", **{"train.resume": "must"})
    assert "holds no whole checkpoint" in run_ranks(2, refused, none)[1]
    weights = config(base, tmp_path / "none", **{"train.resume": base / "megatron"})
    assert "model.load" in run_ranks(1, refused, weights)[0]


def test_reductions(base: Path, tmp_path: Path) -> None:
    """Each reduction's loss, from the per-sample losses of the same weights."""
    # learning rate ~0: every step sees the same weights
    still = {"optim.lr": 1e-30, "train.steps": 1, "train.micro_batch": 2, "objective": "nll"}
    runs = {
        name: config(base, tmp_path / name, reduction=name, **still)
        for name in ("token", "micro_batch", "sample")
    }
    single = {**still, "train.micro_batch": 1, "train.global_batch": 1, "train.steps": 8}
    samples = config(base, tmp_path / "each", **single)
    run_ranks(2, train_all, list(runs.values()))
    run_ranks(1, train_all, [samples])
    each = metrics(tmp_path / "each")
    count = torch.tensor([line["kept_tokens"] for line in each])
    mean = torch.tensor([line["loss"] for line in each])
    assert len(set(count.tolist())) > 1, "samples must differ in length"
    by_two = (mean * count).reshape(4, 2).sum(1) / count.reshape(4, 2).sum(1)
    want = {
        "token": (mean * count).sum() / count.sum(),
        "micro_batch": by_two.mean(),
        "sample": mean.mean(),
    }
    got = {name: metrics(tmp_path / name)[0]["loss"] for name in runs}
    assert got == pytest.approx({k: v.item() for k, v in want.items()}, rel=1e-6)
    assert len({round(v, 4) for v in got.values()}) == 3


def test_metrics_of_a_step(base: Path, tmp_path: Path) -> None:
    cfg = config(
        base,
        tmp_path / "run",
        objective="dft",
        **{"train.steps": 2, "data.val_files": f"[{base / 'val.jsonl'}]"},
    )
    run_ranks(2, train_all, [cfg])
    lines = metrics(tmp_path / "run")
    first = lines[0]
    assert first["gate"] == pytest.approx(first["p"])  # dft's gate is p
    histogram = [first[f"gate_histogram_{i}"] for i in range(10)]
    assert sum(histogram) == pytest.approx(1)
    assert 0 < first["collision"] < 1
    assert 0 < first["entropy"] <= torch.tensor(301.0).log().item()
    assert first["loss"] < first["ce"]  # dft looks far smaller than cross-entropy
    assert first["kept_tokens"] > 0
    assert "val_loss" not in first
    assert lines[1]["val_ce"] > 0  # after the last step, over all 13 samples
    assert lines[1]["samples"] == 16


def test_a_run_that_blows_up_stops_and_saves_nothing(base: Path, tmp_path: Path) -> None:
    wild = {"optim.lr": 1e30, "optim.warmup_ratio": 0, "optim.clip_grad": 0}
    cfg = config(base, tmp_path / "run", **wild, **{"train.save_every": 3})
    message = run_ranks(1, refused, cfg)[0]
    assert "stopped before anything was saved" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
