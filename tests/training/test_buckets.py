"""Gradients in several buckets: a checkpoint has of the optimizer what is each parameter's own."""

from pathlib import Path

import torch

from tests.distributed import run_ranks
from tests.training.ranks import (
    config,
    metrics,
    same_but_time,
    train_all,
    train_in_buckets,
)
from tests.training.test_layouts import state, step_folder


def test_the_optimizer_is_saved_as_it_is(base: Path, tmp_path: Path) -> None:
    """Each bucket is padded to a multiple of 128, which norms of 32 channels leave room for."""
    keys = {"parallel.overlap_grad_reduce": "true", "train.save_at_end": "true", "train.steps": 2}
    one, several = (config(base, tmp_path / name, **keys) for name in ("one", "several"))
    run_ranks(2, train_all, [one])
    run_ranks(2, train_in_buckets, [several], 1000)
    expected, found = (state(step_folder(Path(cfg.run_dir), 2)) for cfg in (one, several))
    names = [name for name in found if not name.startswith("optimizer.")]
    assert len(names) == 9
    for name in names:
        assert torch.equal(found[f"optimizer.state.param.{name}"], found[name]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            key = f"optimizer.state.{moment}.{name}"
            assert found[key].any(), key
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-9)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(base: Path, tmp_path: Path) -> None:
    keys = {"parallel.overlap_grad_reduce": "true", "train.save_every": 2, "train.steps": 4}
    whole = config(base, tmp_path / "whole", **keys)
    stopped = step_folder(tmp_path / "whole", 2)
    resumed = config(base, tmp_path / "resumed", **keys, **{"train.resume": stopped})
    run_ranks(2, train_in_buckets, [whole, resumed], 1000)
    assert (
        same_but_time(metrics(tmp_path / "resumed"))
        == same_but_time(metrics(tmp_path / "whole"))[2:]
    )
