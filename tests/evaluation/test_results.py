"""From scores of answers to summaries; the tables as they are printed."""

from typing import Any

import pytest

from megatron_deft.evaluation.results import Metric, format_tables, over_samples, summarise

METRICS = {"exact": Metric("exact", True), "near": Metric("nearness", False)}


def one_set(**values: list[float]) -> dict[str, dict[str, list[float]]]:
    return {key: {"set": of} for key, of in values.items()}


def test_deltas_are_of_pairs() -> None:
    base = [0.0] * 50 + [1.0] * 50
    better = [0.1 + 0.9 * value for value in base]  # each question moves by 0.1 or 0
    summary = summarise(
        METRICS,
        {"base": one_set(exact=base, near=base), "new": one_set(exact=base, near=better)},
    )
    assert "delta" not in summary["base"]["scores"]["near"]
    new = summary["new"]["scores"]
    assert summary["new"]["sets"] == {"set": new}
    assert new["exact"]["delta"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    delta = new["near"]["delta"]
    assert delta["mean"] == pytest.approx(0.05)
    # unpaired, the interval would reach far below 0
    assert 0.03 < delta["low"] < 0.05 < delta["high"] < 0.07


def test_sets_are_told_apart_and_count_the_same() -> None:
    values = {"exact": {"one": [1.0], "other": [0.0, 0.0, 1.0]}}
    entry = summarise({"exact": METRICS["exact"]}, {"base": values})["base"]
    assert entry["sets"]["one"]["exact"]["mean"] == 1
    assert entry["sets"]["other"]["exact"]["mean"] == pytest.approx(1 / 3)
    assert entry["scores"]["exact"]["mean"] == pytest.approx(2 / 3)


def test_the_means_over_answers() -> None:
    metric = {"right": METRICS["exact"]}
    answers = {"set": [[{"right": 1.0}, {"right": 0.0}, {"right": 0.0}], [{"right": 1.0}] * 3]}
    metrics, values = over_samples(metric, answers)
    assert {key: metric.label for key, metric in metrics.items()} == {
        "avg@3": "avg@3", "pass@2": "pass@2", "pass@3": "pass@3"
    }  # fmt: skip
    assert values["avg@3"]["set"] == [pytest.approx(1 / 3), 1.0]
    assert values["pass@2"]["set"] == [pytest.approx(2 / 3), 1.0]
    assert over_samples(metric, {"set": [[{"right": 1.0}]]}) == (metric, {"right": {"set": [1.0]}})


ENTRY = {"mean": 0.5, "low": 0.25, "high": 0.75}
LESS = {"mean": -0.1, "low": -0.2, "high": 0.05}


def test_the_table_of_one_set() -> None:
    both = {"exact": ENTRY, "near": ENTRY}
    moved = {"exact": {**ENTRY, "mean": 1.0, "delta": LESS}, "near": {**ENTRY, "delta": LESS}}
    summary: dict[str, Any] = {
        "base": {"scores": both, "sets": {"set": both}},
        "tuned": {"scores": moved, "sets": {"set": moved}},
    }
    labels = {key: metric.label for key, metric in METRICS.items()}
    assert format_tables(labels, summary).splitlines() == [
        "model     exact                nearness",
        "-" * 50,
        "base       50.0 [25.0, 75.0]    50.0 [25.0, 75.0]",
        "tuned     100.0 [25.0, 75.0]    50.0 [25.0, 75.0]",
        "  - base  -10.0 [-20.0, +5.0]  -10.0 [-20.0, +5.0]",
    ]


def test_the_tables_of_several_sets() -> None:
    keys = ("avg@4", "pass@2", "pass@4")
    entries = dict.fromkeys(keys, ENTRY)
    summary = {"base": {"scores": entries, "sets": {"aime": entries, "math": entries}}}
    assert format_tables({key: key for key in keys}, summary).splitlines() == [
        "avg@4",
        "model  aime                math                mean",
        "-" * 65,
        "base    50.0 [25.0, 75.0]   50.0 [25.0, 75.0]   50.0 [25.0, 75.0]",
        "",
        "pass@4",
        "model  aime                math                mean",
        "-" * 65,
        "base    50.0 [25.0, 75.0]   50.0 [25.0, 75.0]   50.0 [25.0, 75.0]",
    ]
