"""From metrics to arrays, with numbers told by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_deft.errors import UserError
from megatron_deft.report.runs import Run
from megatron_deft.report.series import (
    Curve,
    curve,
    entropy_limits,
    history,
    landscapes,
    last_value,
    late,
    number,
    positions,
    smooth,
    smoothing,
    thin,
)
from tests.report.made import landscape


def run(*records: dict) -> Run:
    return Run("a", Path("a"), {}, [{"step": i, **one} for i, one in enumerate(records, 1)])


def test_curves_have_gaps_where_a_value_is_not_finite() -> None:
    made = run({"loss": 2.0}, {"loss": None}, {"lr": 1.0}, {"loss": 1.0, "lr": float("inf")})
    found = curve(made, "loss")
    assert found is not None
    assert found.x.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(found.y, [2.0, np.nan, 1.0])
    assert curve(made, "val_ce") is None
    assert curve(run({"loss": None}), "loss") is None
    assert last_value(made, "loss") == 1.0
    assert math.isnan(last_value(made, "lr") or 0.0)
    assert last_value(made, "val_ce") is None


def test_tokens_are_those_seen_by_then() -> None:
    made = run({"tokens": 10, "loss": 1}, {"tokens": 5}, {"tokens": 7, "loss": 3})
    assert positions(made, "tokens").tolist() == [10, 15, 22]
    found = curve(made, "loss", "tokens")
    assert found is not None
    assert found.x.tolist() == [10, 22]
    with pytest.raises(UserError, match="--x steps"):
        positions(run({"loss": 1}), "tokens")


def test_smoothing_is_a_centred_mean() -> None:
    y = np.array([1.0, 3.0, 8.0, np.nan, 4.0, 6.0])
    wanted = [1.0, 4.0, 5.5, np.nan, 5.0, 6.0]  # 1; (1+3+8)/3; (3+8)/2; gap; (4+6)/2; 6
    np.testing.assert_allclose(smooth(y, 3), wanted)
    np.testing.assert_array_equal(smooth(y, 1), y)
    slope = np.arange(30.0)
    np.testing.assert_allclose(smooth(slope, 9), slope)  # not bent, not at its ends either
    assert [smoothing(n) for n in (1, 49, 50, 400, 10_000)] == [1, 1, 1, 9, 201]


def test_a_thinned_curve_keeps_its_spikes_and_ends() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x / 500)
    y[1234], y[8000:8100] = 50.0, np.nan
    found = thin(Curve(x, y), 400)
    assert len(found.x) <= 402
    assert (found.x[0], found.x[-1]) == (0, 9999)
    assert 50.0 in found.y
    assert np.isnan(found.y).any()
    assert (np.diff(found.x) > 0).all()
    np.testing.assert_array_equal(found.y, y[found.x.astype(int)])
    assert thin(found, 1000) is found


def histogram(*shares: float | None) -> dict:
    return {f"p_histogram_{i}": share for i, share in enumerate(shares)}


def test_histograms_over_steps() -> None:
    made = run(histogram(1, 0), histogram(0.5, 0.5), histogram(0, 1), histogram(0.5, 0.5))
    found = history(made, "p", columns=2)
    assert found is not None
    assert (found.low, found.high) == (0.5, 4.5)
    np.testing.assert_allclose(found.shares, [[0.75, 0.25], [0.25, 0.75]])
    found = history(made, "p")
    assert found is not None
    assert found.shares.shape == (2, 4)
    assert history(made, "gate") is None


def test_histograms_with_gaps() -> None:
    """A step without kept tokens has none; where no step falls the nearest one is shown."""
    made = run(histogram(1, 0), histogram(None, None), {}, histogram(0, 1), histogram(0.5, 0.5))
    found = history(made, "p", columns=3)
    assert found is not None
    np.testing.assert_allclose(found.shares, [[1, 0, 0.25], [0, 1, 0.75]])
    one = history(run(histogram(0.25, 0.75)), "p")
    assert one is not None
    assert (one.low, one.high, one.shares.tolist()) == (0.5, 1.5, [[0.25], [0.75]])
    assert history(run(histogram(None, None)), "p") is None


def test_landscapes_of_the_second_half_are_one() -> None:
    lines: list[dict] = [{} for _ in range(8)]
    for step in (1, 4, 6, 8):
        lines[step - 1] = {"landscape": landscape(int(step == 8))}
    found = landscapes(run(*lines))
    assert [one.first for one in found] == [1, 4, 6, 8]
    last = late(found)
    assert (last.first, last.last, last.vocab_size) == (6, 8, 100)
    assert last.tokens[0, 3] == 12
    assert (last.tokens[3, 0], last.tokens[2, 0]) == (2, 2)
    assert last.density[0, 3] == 12 / 16
    assert last.mean_gate_error[0, 3] == 0.5
    assert last.mean_gate_error[2, 0] == 0.25
    assert np.isnan(last.density).sum() == np.isnan(last.mean_gate_error).sum() == 17
    assert late(found[:1]).last == 1


def test_a_broken_landscape_is_named() -> None:
    good = {"vocab_size": 5, "entropy_bins": 2, "tokens": [[1]], "gate_error": [[1, 2]]}
    assert landscapes(run({"landscape": good}))[0].tokens.tolist() == [[1, 0]]
    for content in (
        {},
        {**good, "entropy_bins": 1},
        {**good, "tokens": []},
        {**good, "tokens": 3},
        3,
    ):
        with pytest.raises(UserError, match="landscape of step 1 is broken"):
            landscapes(run({"landscape": content}))


def test_a_sum_that_is_not_finite_is_a_hole() -> None:
    content = landscape()
    content["gate_error"][0][3] = None
    found = landscapes(run({"landscape": content}))[0]
    assert np.isnan(found.mean_gate_error[0, 3])
    assert found.mean_gate_error[3, 0] == 0.25


def test_entropy_limits_hold_every_distribution() -> None:
    vocab, p = 12, np.array([0.0, 0.25, 0.5, 1.0])
    least, most = entropy_limits(p, vocab)
    assert least == pytest.approx([0, 0.5623 / np.log(12), np.log(2) / np.log(12), 0], abs=1e-4)
    assert most[3] == 0
    assert entropy_limits(np.array([1 / vocab]), vocab)[1] == pytest.approx([1.0])
    generator = np.random.default_rng(0)
    for sharpness in (0.05, 0.3, 1.0, 10.0):
        for drawn in generator.dirichlet([sharpness] * vocab, 200):
            share = -np.sum(drawn * np.log(np.maximum(drawn, 1e-300))) / np.log(vocab)
            low, high = entropy_limits(drawn, vocab)
            assert (share <= high + 1e-9).all()
            assert (share >= low - 1e-9).all()


def test_what_is_no_finite_number_is_a_gap() -> None:
    odd = [None, True, "1", [1], math.inf, -math.inf, math.nan, 10**400, -(10**400)]
    assert all(math.isnan(number(value)) for value in odd)
    assert [number(value) for value in (0, -1.5, 10**300)] == [0.0, -1.5, 1e300]
