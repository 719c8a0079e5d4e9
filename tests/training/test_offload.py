"""An optimizer in host memory: megatron-core's own on an emulated GPU, bit by bit the usual one."""

from pathlib import Path
from typing import Any

import pytest

from megatron_deft.training.resume import changes
from tests.convert.tiny_models import assert_same_tensors
from tests.distributed import run_ranks
from tests.training.layouts import EP2, make_models
from tests.training.offload_ranks import Sizes, train_emulated
from tests.training.ranks import config, metrics, same_but_time
from tests.training.test_layouts import state, step_folder

RANKS = 2
DTYPES = ("bf16", "fp16", "fp32")
SHARES = (1.0, 0.4)
KEYS: dict[str, Any] = {**EP2, "train.steps": 4, "train.save_every": 2, "optim.warmup_ratio": 0}
RESUMED = ((0, 0.4), (1.0, 0))  # from a checkpoint with that share, with this one


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of a model whose experts are the second part of its optimizer."""
    root = tmp_path_factory.mktemp("offload")
    make_models(base, root, "experts")
    return root


def folder(root: Path, dtype: str, share: float, before: float | None = None) -> Path:
    return root / f"{dtype} {share:g}{'' if before is None else f' after {before:g}'}"


@pytest.fixture(scope="module")
def sizes(root: Path) -> list[Sizes]:
    """What train_emulated returns of every run, by its folder's name, on each rank."""
    runs = {}
    for dtype in DTYPES:
        keys = {**KEYS, "model.dtype": dtype}
        for share in (0, *SHARES):
            path = folder(root, dtype, share)
            runs[path.name] = config(root / "experts", path, **keys, **{"optim.cpu_offload": share})
        for before, share in RESUMED:
            path = folder(root, dtype, share, before)
            start = step_folder(folder(root, dtype, before), 2)
            resumed = {"optim.cpu_offload": share, "train.resume": start}
            runs[path.name] = config(root / "experts", path, **keys, **resumed)
    return run_ranks(RANKS, train_emulated, runs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_checkpoints_are_those_without(
    root: Path, sizes: list[Sizes], dtype: str
) -> None:
    usual = folder(root, dtype, 0)
    lines = same_but_time(metrics(usual))
    assert lines[0]["loss"] != pytest.approx(lines[-1]["loss"], rel=1e-3), "nothing learned"
    for share in SHARES:
        offloaded = folder(root, dtype, share)
        assert same_but_time(metrics(offloaded)) == lines
        for step in (2, 4):
            assert_same_tensors(
                state(step_folder(offloaded, step)), state(step_folder(usual, step))
            )
        for rank in sizes:
            assert len(rank[offloaded.name]) == 2, "experts have a part of their own"
            for (on_cpu, on_gpu), (_, total) in zip(
                rank[offloaded.name], rank[usual.name], strict=True
            ):
                assert on_cpu + on_gpu == total
                assert (on_gpu > 0) == (share < 1)
                assert on_cpu >= share * total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("before", "share"), RESUMED)
def test_a_run_goes_on_exactly_with_another_share(
    root: Path, sizes: list[Sizes], dtype: str, before: float, share: float
) -> None:
    usual, resumed = folder(root, dtype, 0), folder(root, dtype, share, before)
    assert same_but_time(metrics(resumed)) == same_but_time(metrics(usual))[2:]
    assert_same_tensors(state(step_folder(resumed, 4)), state(step_folder(usual, 4)))


def test_another_share_is_no_other_run() -> None:
    """Nor is a checkpoint from before there was a share to name."""
    now = {"optim": {"lr": 0.1, "cpu_offload": 0.5}}
    assert changes({"optim": {"lr": 0.1, "cpu_offload": 1.0}}, now) == []
    assert changes({"optim": {"lr": 0.1}}, now) == []
