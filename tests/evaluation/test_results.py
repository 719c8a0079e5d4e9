"""Intervals against published values and against theory; the table as it is printed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation.results import (
    GenerationLog,
    Metric,
    bootstrap,
    format_table,
    model_identity,
    summarise,
    wilson,
)


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


METRICS = {
    "exact": Metric("exact", lambda a, b: float(a == b), wilson),
    "near": Metric("nearness", lambda a, b: 0.5, bootstrap),
}


def test_deltas_are_of_pairs() -> None:
    base = [0.0] * 50 + [1.0] * 50
    better = [0.1 + 0.9 * value for value in base]  # each sample moves by 0.1 or 0
    summary = summarise(
        METRICS, {"base": {"exact": base, "near": base}, "new": {"exact": base, "near": better}}
    )
    assert "delta" not in summary["base"]["near"]
    assert summary["new"]["exact"]["delta"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    delta = summary["new"]["near"]["delta"]
    assert delta["mean"] == pytest.approx(0.05)
    # unpaired, the interval would reach far below 0
    assert 0.03 < delta["low"] < 0.05 < delta["high"] < 0.07


def test_the_table() -> None:
    entry = {"mean": 0.5, "low": 0.25, "high": 0.75}
    less = {"mean": -0.1, "low": -0.2, "high": 0.05}
    summary: dict[str, Any] = {
        "base": {"exact": entry, "near": entry},
        "tuned": {"exact": {**entry, "mean": 1.0, "delta": less}, "near": {**entry, "delta": less}},
    }
    assert format_table(METRICS, summary).splitlines() == [
        "model     exact                nearness",
        "-" * 50,
        "base       50.0 [25.0, 75.0]    50.0 [25.0, 75.0]",
        "tuned     100.0 [25.0, 75.0]    50.0 [25.0, 75.0]",
        "  - base  -10.0 [-20.0, +5.0]  -10.0 [-20.0, +5.0]",
    ]


def test_the_log_is_continued_without_its_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = GenerationLog(file, {"model": "a"})
    for index in range(3):
        log.add({"index": index, "output": "x\u2028y"})
    file.write_bytes(file.read_bytes()[:-5])
    again = GenerationLog(file, {"model": "a"})
    assert sorted(again.records) == [0, 1]
    assert again.changed == []
    again.add({"index": 2, "output": "new"})
    assert GenerationLog(file, {"model": "a"}).records[2]["output"] == "new"


def test_the_log_of_another_run_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    GenerationLog(file, {"model": "a", "seed": 1}).add({"index": 0})
    other = GenerationLog(file, {"model": "b", "seed": 1})
    assert (other.records, other.changed) == ({}, ["model"])
    assert GenerationLog(file, {"model": "b", "seed": 1}).records == {}


@pytest.mark.parametrize("content", ["no json\n", "[1]\n"])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="not a file of generations"):
        GenerationLog(file, {})
    assert file.read_text() == content


def test_model_identity_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_identity(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert model_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert model_identity(tmp_path) != before
