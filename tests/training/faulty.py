"""What ranks do whose gradients go wrong; apart from the tests: they need not load transformers."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize


class Poison(NamedTuple):
    """On one rank, what the gradient of the first parameter of that name is multiplied by."""

    rank: int
    name: str
    factor: float


class Outcome(NamedTuple):
    """Of one rank: metrics of each step, and whether the poisoned one left everything alone."""

    metrics: list[dict[str, float]]
    is_untouched: bool
    is_trained_on: bool
    updates: set[int]
    saved: int | None


def poisoned_steps(
    rank: int, world: int, cases: Mapping[str, tuple[RunConfig, Poison, int]]
) -> dict[str, Outcome]:
    """Three steps of each run, the one of that number poisoned, and a save after it."""
    os.environ["WORLD_SIZE"] = str(world)
    return {name: _three_steps(rank, *case) for name, case in cases.items()}


def _three_steps(rank: int, cfg: RunConfig, poison: Poison, bad: int) -> Outcome:
    base = read_base(cfg.model)
    initialize(cfg)
    from megatron_deft.training.optimizer import steps
    from megatron_deft.training.trainer import Trainer

    try:
        trainer = Trainer(cfg, base)
        metrics, states = [], [state(trainer)]
        for number in (1, 2, 3):
            with poisoned(trainer, poison, number == bad and rank == poison.rank):
                metrics.append(trainer.step())
            states.append(state(trainer))
            if number == bad:
                trainer.save()
        same = [equal(old, new) for old, new in pairwise(states)]
        return Outcome(
            metrics,
            same[bad - 1],
            not any(is_same for i, is_same in enumerate(same) if i != bad - 1),
            steps(trainer.optimizer),
            trainer.position.skipped,
        )
    finally:
        platform.shutdown()


@contextmanager
def poisoned(trainer: Any, poison: Poison, is_on: bool) -> Iterator[None]:
    named = [
        parameter
        for chunk in trainer.model
        for name, parameter in chunk.named_parameters()
        if poison.name in name
    ]
    if not is_on:
        yield
        return
    hook = named[0].register_hook(lambda gradient: gradient * poison.factor)
    yield
    hook.remove()


def state(trainer: Any) -> list[Tensor]:
    """Copies of all that a step changes on this rank: weights, their fp32 copies, moments, counts.

    The moments are there from the first step on.
    """
    tensors = [p for chunk in trainer.model for p in chunk.parameters()]
    for part in trainer.optimizer.chained_optimizers:
        tensors += part.get_parameters()
        for values in part.optimizer.state.values():
            tensors += [value for value in values.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit by bit: nan equals itself."""
    return len(one) == len(other) and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


def nonfinite(metrics: Mapping[str, float]) -> bool:
    return not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))
