"""Learning-rate schedules: closed forms, transformers' and verl's schedules, edge cases."""

import itertools
import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from megatron_deft.config import OptimConfig
from megatron_deft.errors import UserError
from megatron_deft.training.schedule import SCHEDULES, learning_rate, warmup_length


def ours(total: int, **keys) -> list[float]:
    optim = OptimConfig(lr=5e-5, **keys)
    return [learning_rate(optim, total, step) for step in range(1, total + 1)]


def theirs(make, total: int, *args, **keys) -> list[float]:
    """Learning rates that transformers' scheduler applies at each of `total` updates."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=5e-5)
    scheduler = make(optimizer, *args, **keys)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("total", "warmup"), [(264, 26), (91, 9), (156, 15), (10, 0), (7, 7), (1, 0)]
)
def test_agrees_with_transformers(total, warmup):
    for schedule, make, arguments in (
        ("cosine", get_cosine_schedule_with_warmup, (warmup, total)),
        ("linear", get_linear_schedule_with_warmup, (warmup, total)),
        ("constant", get_constant_schedule_with_warmup, (warmup,)),
    ):
        expected = theirs(make, total, *arguments)
        assert ours(total, schedule=schedule, warmup_steps=warmup) == pytest.approx(
            expected, rel=1e-12, abs=1e-20
        )


def test_min_lr_agrees_with_transformers():
    expected = theirs(get_cosine_with_min_lr_schedule_with_warmup, 50, 5, 50, min_lr=1e-5)
    assert ours(50, warmup_steps=5, min_lr=1e-5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(264, 26), (91, 9), (10, 0)])
def test_wsd_agrees_with_verl(total, warmup):
    # verl: stable = int(0.9 * steps after the warm-up), cosine decay over the rest
    stable = int((total - warmup) * 0.9)
    expected = theirs(get_wsd_schedule, total, warmup, total - warmup - stable, total)
    assert ours(total, schedule="wsd", warmup_steps=warmup) == pytest.approx(expected, rel=1e-12)


def test_closed_forms():
    keys = {"warmup_steps": 4, "min_lr": 1e-5}
    assert ours(12, schedule="cosine", **keys)[:5] == pytest.approx(
        [0.0, 1.25e-5, 2.5e-5, 3.75e-5, 5e-5]
    )
    assert ours(12, schedule="cosine", **keys)[8] == pytest.approx(3e-5)  # half way
    assert ours(12, schedule="cosine", **keys)[11] == pytest.approx(
        1e-5 + 4e-5 * 0.5 * (1 + math.cos(math.pi * 7 / 8))
    )
    assert ours(12, schedule="linear", **keys)[8] == pytest.approx(3e-5)
    assert ours(12, schedule="linear", **keys)[11] == pytest.approx(1e-5 + 4e-5 / 8)
    assert ours(12, schedule="constant", **keys)[4:] == [5e-5] * 8
    wsd = ours(24, schedule="wsd", wsd_decay_ratio=0.5, **keys)
    assert wsd[4:15] == [5e-5] * 11
    assert wsd[19] == pytest.approx(3e-5)  # half of the decay of 10 steps


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 3, 11, 100])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1.0])
def test_every_rate_is_between_the_bounds_and_falls(schedule, total, decay):
    rates = ours(total, schedule=schedule, warmup_ratio=0.2, min_lr=1e-6, wsd_decay_ratio=decay)
    warmup = warmup_length(OptimConfig(warmup_ratio=0.2), total)
    assert rates[warmup] == pytest.approx(5e-5)
    assert all(early <= late for early, late in itertools.pairwise(rates[: warmup + 1]))
    after = rates[warmup:]
    assert all(late <= early for early, late in itertools.pairwise(after))
    assert min(after) >= 1e-6


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [(0.1, 264, 26), (0.1, 9, 0), (0.1, 10, 1), (0.07, 100, 7), (0.29, 100, 29), (1.0, 5, 5)],
)
def test_warmup_ratio_is_rounded_down(ratio, total, expected):
    assert warmup_length(OptimConfig(warmup_ratio=ratio), total) == expected


def test_warmup_edge_cases():
    assert warmup_length(OptimConfig(warmup_steps=0, warmup_ratio=0.5), 10) == 0
    assert ours(1) == [5e-5]
    with pytest.raises(UserError, match=r"optim\.warmup_steps=11: must be <= the run's 10 steps"):
        learning_rate(OptimConfig(warmup_steps=11), 10, 1)
    for step in (0, 11):
        with pytest.raises(AssertionError):
            learning_rate(OptimConfig(), 10, step)


def test_the_table_is_what_the_configuration_allows():
    for name in SCHEDULES:
        OptimConfig(schedule=name)
    with pytest.raises(UserError) as caught:
        OptimConfig(schedule="none")
    assert all(name in str(caught.value) for name in SCHEDULES)
