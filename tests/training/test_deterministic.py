"""deterministic=true: the same numbers to the last bit, from run to run and after a resume."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft.config import RunConfig
from megatron_deft.errors import UserError
from megatron_deft.platform import deterministic
from megatron_deft.platform.deterministic import ENVIRONMENT
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, train_all
from tests.training.test_layouts import step_folder
from tests.training.test_trainer import same_but_time

Keys = dict[str, Any]
COMMON: Keys = {
    "deterministic": "true",
    "data.pack": "true",
    "data.max_length": 128,
    "model.hidden_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "train.steps": 6,
    "train.save_every": 3,
    "train.micro_batch": 1,
}
RUNS: dict[str, Keys] = {
    "DP2 bf16 fused": {"model.dtype": "bf16", "loss.fused_linear": "true"},
    "TP2 eaft": {"parallel.tensor": 2, "objective": "eaft"},
}


def train_twice_and_resume(
    rank: int, world: int, rounds: list[list[RunConfig]]
) -> list[tuple[bool, bool]]:
    """Each round's runs; whether torch's flag was set during, and after, each model was built."""
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    seen = []
    build = VocabParallelEmbedding.__init__

    def spied(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        seen.append((torch.are_deterministic_algorithms_enabled(), self.deterministic_mode))

    VocabParallelEmbedding.__init__ = spied
    try:
        for configs in rounds:
            train_all(rank, world, configs)
    finally:
        VocabParallelEmbedding.__init__ = build
    assert not torch.are_deterministic_algorithms_enabled()
    return seen


def test_runs_repeat_to_the_last_bit(base: Path, tmp_path: Path) -> None:
    def runs(place: str, **more: Any) -> list[RunConfig]:
        return [config(base, tmp_path / place / n, **COMMON, **k, **more) for n, k in RUNS.items()]

    resumed = [
        config(base, tmp_path / "resumed" / name, **COMMON, **keys,
               **{"train.resume": step_folder(tmp_path / "first" / name, 3)})
        for name, keys in RUNS.items()
    ]  # fmt: skip
    anew = [config(base, tmp_path / "anew" / n, **COMMON, **k, seed=7) for n, k in RUNS.items()]
    rounds = [runs("first"), runs("second"), resumed, anew]
    for seen in run_ranks(2, train_twice_and_resume, rounds):
        assert seen == [(True, True)] * len(seen)
        assert len(seen) >= 6
    for name in RUNS:
        first, second, third, other = (
            same_but_time(metrics(tmp_path / place / name))
            for place in ("first", "second", "resumed", "anew")
        )
        assert first == second
        assert third == first[3:]
        assert [line["loss"] for line in other] != [line["loss"] for line in first]


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_an_environment_that_forbids_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "7")
    said = f"deterministic=true, but the environment has {name}=7"
    with pytest.raises(UserError, match=said), deterministic(True):
        pass
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv(name)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
