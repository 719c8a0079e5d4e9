"""fp16: the gradients of fp32 whatever the loss scale, overflows left out, and exact resuming."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.errors import UserError
from megatron_deft.platform import cpu_platform
from megatron_deft.training.loss_scale import PATIENCE, LossScale
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, same_but_time, train_all

FP16 = {"model.dtype": "fp16"}
OBJECTIVES = ("deft", "dft", "cayley")
SCALES = (16, 1024)
ROUNDING = 2e-3  # some units of fp16's 2^-11, over a model of two layers


def test_gradients_are_those_of_fp32_at_any_scale(base: Path, tmp_path: Path) -> None:
    """Over logits and without; the scale is in the gradient once, and out of it again."""
    runs: dict[tuple[str, Any, str], Any] = {}
    common = {"train.steps": 2, "optim.warmup_ratio": 0, "train.global_batch": 4}
    for spec in OBJECTIVES:
        keys = {**common, "objective": spec}
        runs[spec, None, "false"] = config(base, tmp_path / spec / "fp32", **keys)
        for scale in SCALES:
            for fused in ("true", "false"):
                fp16 = {**FP16, "optim.loss_scale": scale, "loss.fused_linear": fused}
                folder = tmp_path / spec / f"{scale}-{fused}"
                runs[spec, scale, fused] = config(base, folder, **keys, **fp16)
    run_ranks(1, train_all, list(runs.values()))
    found = {key: metrics(Path(cfg.run_dir)) for key, cfg in runs.items()}
    for (spec, scale, fused), lines in found.items():
        whole = found[spec, None, "false"]
        for line, exact in zip(lines, whole, strict=True):
            assert line["loss"] == pytest.approx(exact["loss"], rel=ROUNDING), (spec, scale, fused)
            assert line["grad_norm"] == pytest.approx(exact["grad_norm"], rel=2 * ROUNDING)
        if scale is not None:
            assert [line["loss_scale"] for line in lines] == [scale, scale]
            assert lines[-1]["overflow_steps"] == 0


def test_overflows_are_left_out_and_resuming_is_exact(base: Path, tmp_path: Path) -> None:
    """The scale falls into fp16's range, grows out of it and falls again; at two layouts."""
    moving = {"optim.initial_loss_scale": 2.0**18, "optim.loss_scale_window": 3}
    keys = {**FP16, **moving, "optim.hysteresis": 1, "train.steps": 16, "train.save_every": 8}
    two = {"parallel.tensor": 2}
    run_dir = tmp_path / "run"
    run_ranks(2, train_all, [config(base, run_dir, **keys, **two)])
    lines = metrics(run_dir)
    scales = [line["loss_scale"] for line in lines]
    overflows = [line["overflow_steps"] for line in lines]
    assert scales[0] == 2.0**18
    assert 1 <= overflows[0] < overflows[7] < overflows[-1] < 16
    factors = [after / before for before, after in pairwise(scales)]
    for factor, (seen, now) in zip(factors, pairwise([0, *overflows[:-1]]), strict=True):
        assert factor in ((0.5,) if now > seen else (1.0, 2.0))
    assert 2.0 in factors
    start = run_dir / "checkpoints" / "step_00000008"
    manifest = read_manifest(start)
    assert manifest["skipped"] == overflows[7] == manifest["loss_scale"]["overflows"]
    again = {**keys, "train.resume": start}
    run_ranks(2, train_all, [config(base, tmp_path / "again", **again, **two)])
    assert same_but_time(metrics(tmp_path / "again")) == same_but_time(lines)[8:]
    run_ranks(1, train_all, [config(base, tmp_path / "one", **again)])
    moved = metrics(tmp_path / "one")
    assert [line["loss_scale"] for line in moved[:2]] == scales[8:10]
    assert moved[1]["loss"] == pytest.approx(lines[9]["loss"], rel=ROUNDING)


def scaled(*found: bool, lowest: float = 4.0) -> tuple[Any, LossScale]:
    """An optimizer of as many parts, of which those overflow; on one rank alone."""
    with cpu_platform():
        scalers = [DynamicGradScaler(16.0, lowest, 2.0, 0.5, 2, 1) for _ in found]
    parts = [SimpleNamespace(grad_scaler=scaler) for scaler in scalers]

    def prepare() -> bool:
        for part, overflows in zip(parts, found, strict=True):
            part.grad_scaler.update(overflows)  # as each part does
        return any(found)

    optimizer: Any = SimpleNamespace(chained_optimizers=parts, prepare_grads=prepare)
    return optimizer, LossScale(optimizer, SimpleNamespace())


@pytest.mark.parametrize("found", [(False, True), (True, False), (True,), (True, True)])
def test_parts_share_a_scale_that_moves_once(
    found: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    optimizer, scale = scaled(*found)
    assert optimizer.prepare_grads() is True
    assert scale.value == 8.0
    assert {float(part.grad_scaler.scale) for part in optimizer.chained_optimizers} == {8.0}
    assert float(scale.scale_loss(torch.tensor(3.0))) == 24.0
    assert scale.overflows == 1


def test_an_overflow_on_another_rank_is_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def another_has_one(tensor: torch.Tensor, op: Any) -> None:
        tensor.fill_(1.0)

    monkeypatch.setattr(torch.distributed, "all_reduce", another_has_one)
    optimizer, scale = scaled(False, False)
    assert optimizer.prepare_grads() is True
    assert scale.value == 8.0


def test_a_loss_that_is_not_finite_moves_no_scale() -> None:
    optimizer, scale = scaled(True)
    scale.is_loss_finite = False
    assert optimizer.prepare_grads() is True
    assert (scale.value, scale.overflows) == (16.0, 0)


def test_a_scale_that_cannot_fall_ends_the_run() -> None:
    optimizer, scale = scaled(True)
    for step in range(2 + PATIENCE):
        scale.stop_if_stuck(step)
        optimizer.prepare_grads()
    assert scale.value == 4.0
    with pytest.raises(UserError, match=r"loss scale of 4, 10 steps.*model\.dtype=bf16"):
        scale.stop_if_stuck(13)
