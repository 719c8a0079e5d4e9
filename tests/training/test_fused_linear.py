"""Whole runs whose loss never has logits: the same numbers, step by step, as from logits."""

from pathlib import Path
from typing import Any

import pytest

from megatron_deft.errors import UserError
from tests.distributed import run_ranks
from tests.training.ranks import (
    STEPS,
    config,
    metrics,
    train_all,
    train_and_hear,
)

TP2 = {"parallel.tensor": 2}
RUNS: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "TP2xPP2": (4, ("deft", "cayley(floor=data_parallel)"), {**TP2, "parallel.pipeline": 2}),
    "TP2 sequence, packed": (
        2,
        ("deft",),
        {**TP2, "parallel.sequence": "true", "data.pack": "true", "data.max_length": 128},
    ),
    "CP2, mean of each sample": (2, ("cayley",), {"parallel.context": 2, "reduction": "sample"}),
    "DP2, mean of each micro-batch": (2, ("eaft",), {"reduction": "micro_batch"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_twenty_steps_are_those_of_the_logits_path(base: Path, tmp_path: Path, name: str) -> None:
    world, objectives, keys = RUNS[name]
    # 3 rows of logits at a time: many tiles of every micro-batch
    paths = {
        "logits": {"loss.fused_linear": "false"},
        "fused": {"loss.fused_linear": "true", "loss.chunk_tokens": 3},
    }
    runs = {
        (path, spec): config(base, tmp_path / path / spec, objective=spec, **keys, **choice)
        for path, choice in paths.items()
        for spec in objectives
    }
    run_ranks(world, train_all, list(runs.values()))
    for spec in objectives:
        want, got = (metrics(tmp_path / path / spec) for path in paths)
        assert len(got) == len(want) == STEPS
        assert want[0]["loss"] != pytest.approx(want[-1]["loss"], rel=1e-3), "nothing learned"
        for name in ("loss", "grad_norm", "ce", "entropy"):
            # the first step has the very same weights; then fp32 rounding is amplified by Adam
            assert got[0][name] == pytest.approx(want[0][name], rel=1e-5), (spec, name)
            for mine, theirs in zip(got, want, strict=True):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (spec, name)


def test_the_log_names_the_path(base: Path, tmp_path: Path) -> None:
    for choice, words in (
        ("true", "hidden states, without logits (fused_linear)\n"),
        ("auto", "logits (the output layer is small, 304 x 32)\n"),
        ("false", "logits\n"),
    ):
        cfg = config(base, tmp_path / choice, **{"train.steps": 1, "loss.fused_linear": choice})
        assert f"loss from {words}" in run_ranks(1, train_and_hear, cfg)[0]


def test_values_that_are_not_legal(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss\.fused_linear=sometimes.*auto, true, false"):
        config(base, tmp_path, **{"loss.fused_linear": "sometimes"})
    with pytest.raises(UserError, match=r"loss\.chunk_tokens=4 with loss\.fused_linear=false"):
        config(base, tmp_path, **{"loss.chunk_tokens": 4, "loss.fused_linear": "false"})
    with pytest.raises(UserError, match=r"loss\.chunk_tokens=0: must be >= 1"):
        config(base, tmp_path, **{"loss.chunk_tokens": 0})
