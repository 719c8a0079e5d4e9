"""Loss spikes: seen above what is usual, not at the start, and the same after a resume."""

import json
import random
from pathlib import Path

import pytest

from megatron_deft.training.spikes import FEWEST, WINDOW, Spikes, recent_losses


def noisy(count: int, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(2.0, 0.1) for _ in range(count)]


def heights(spikes: Spikes, losses: list[float]) -> list[float | None]:
    return [spikes.look(step, loss)[0] for step, loss in enumerate(losses)]


def test_a_spike_is_told_once_and_measured_in_deviations() -> None:
    spikes = Spikes(6.0, noisy(WINDOW))
    height, line = spikes.look(7, 4.0)
    assert height == pytest.approx(20, rel=0.25)
    assert line is not None
    assert line.startswith("step 7: loss 4 is ")
    assert "train.spike_threshold=6" in line
    again, quiet = spikes.look(8, 5.0)
    assert again is not None
    assert again > height
    assert quiet is None
    assert spikes.look(9, 2.0) == (None, None)
    assert spikes.look(10, 4.0)[1] is not None


def test_no_false_alarm() -> None:
    """At the start, while the loss falls, of noise, of losses that hardly vary, of a fall."""
    falling = [8 * 0.97**step + 0.5 for step in range(300)]
    flat = [1.0 + 1e-6 * (step % 3) for step in range(100)]
    for losses in (noisy(1000), falling, flat, [*noisy(100), 0.1], [9.0, 1.0, 9.0]):
        assert set(heights(Spikes(6.0, []), losses)) == {None}
    assert heights(Spikes(6.0, noisy(FEWEST - 1)), [50.0]) == [None]
    assert heights(Spikes(6.0, noisy(FEWEST)), [50.0]) != [None]


def test_what_is_not_finite_is_not_compared_and_null_is_off() -> None:
    spikes = Spikes(6.0, noisy(FEWEST))
    assert heights(spikes, [float("nan"), float("inf")]) == [None, None]
    assert heights(spikes, [9.0])[0] is not None
    assert heights(Spikes(None, noisy(WINDOW)), [50.0]) == [None]


def test_a_spike_does_not_hide_the_next() -> None:
    spikes = Spikes(6.0, noisy(WINDOW))
    losses = [value for pair in zip(noisy(30, 2), [9.0] * 30, strict=True) for value in pair]
    assert [height is not None for height in heights(spikes, losses)] == [False, True] * 30


def test_a_resumed_run_compares_with_the_same_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert recent_losses(path) == []
    losses = [None if step % 50 == 0 else value for step, value in enumerate(noisy(250))]
    path.write_text("".join(json.dumps({"step": 1, "loss": loss}) + "\n" for loss in losses))
    finite = [loss for loss in losses if loss is not None]
    assert recent_losses(path) == finite[-WINDOW:]
