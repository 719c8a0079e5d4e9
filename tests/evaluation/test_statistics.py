"""Intervals against published values and against theory; pass@k against counting."""

import math
from itertools import combinations

import numpy as np
import pytest

from megatron_deft.evaluation.statistics import bootstrap, pass_at_k, wilson


@pytest.mark.parametrize(("ones", "count"), [(0, 10), (5, 10), (10, 10), (1, 1), (300, 1000)])
def test_wilson_solves_its_equation(ones: int, count: int) -> None:
    """Its bounds are the shares p from which the one seen is 1.96 standard errors away."""
    interval = wilson([1.0] * ones + [0.0] * (count - ones))
    assert interval.mean == ones / count
    for bound, edge in ((interval.low, 0.0), (interval.high, 1.0)):
        if interval.mean == edge:
            assert bound == edge
        else:
            error = math.sqrt(bound * (1 - bound) / count)
            assert abs(interval.mean - bound) == pytest.approx(1.959964 * error, abs=1e-9)


def test_wilson_as_published() -> None:
    interval = wilson([1.0] * 81 + [0.0] * 182)  # Newcombe (1998), table I
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).random(2000)
    interval = bootstrap(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_repeats_itself_and_has_no_width_without_spread() -> None:
    assert bootstrap([0.1, 0.9, 0.4]) == bootstrap([0.1, 0.9, 0.4])
    constant = bootstrap([0.25] * 5)
    assert constant.low == constant.mean == constant.high == 0.25


def test_every_set_counts_the_same() -> None:
    draw = np.random.default_rng(2)
    few, many = draw.random(100), draw.random(1000) / 2
    interval = bootstrap(few.tolist(), many.tolist())
    assert interval.mean == pytest.approx((few.mean() + many.mean()) / 2)
    half = 1.96 * math.sqrt(few.var() / 100 + many.var() / 1000) / 2
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)


@pytest.mark.parametrize(("right", "count"), [(0, 4), (1, 4), (2, 4), (4, 4), (3, 7), (1, 1)])
def test_pass_at_k_counts_the_choices_with_a_right_one(right: int, count: int) -> None:
    answers = [1] * right + [0] * (count - right)
    for k in range(1, count + 1):
        choices = list(combinations(answers, k))
        share = sum(any(choice) for choice in choices) / len(choices)
        assert pass_at_k(right, count, k) == pytest.approx(share)
