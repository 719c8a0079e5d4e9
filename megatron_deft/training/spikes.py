"""Steps whose loss stands out from those before."""

import json
import math
from collections import deque
from pathlib import Path
from statistics import median

WINDOW = 100  # steps that a loss is compared with
FEWEST = 20  # fewer say nothing of what is usual
SPREAD = 1.4826  # of a normal distribution, the standard deviation over the median deviation
FLOOR = 0.01  # of the median: losses that hardly vary have no spikes below


class Spikes:
    """The losses of the last steps, and how far from them the next one is.

    threshold: standard deviations above the median, from where on a loss is a spike; None: none is
    losses:    those of earlier steps, in order

    The median and the median deviation, unlike mean and variance, do not move with the spikes.
    """

    def __init__(self, threshold: float | None, losses: list[float]) -> None:
        self.threshold = threshold
        self._losses = deque(losses, WINDOW)
        self._is_spike = False

    def look(self, step: int, loss: float) -> tuple[float | None, str | None]:
        """Compare a step's loss with those before, and keep it; one that is not finite is neither.

        returns: of a spike, how many standard deviations it is above the median; and a line for the
            log, at the first of several in a row
        """
        if self.threshold is None or not math.isfinite(loss):
            return None, None
        was_spike, before = self._is_spike, list(self._losses)
        self._losses.append(loss)
        self._is_spike = False
        if len(before) < FEWEST:
            return None, None
        usual = median(before)
        deviation = SPREAD * median(abs(value - usual) for value in before)
        deviation = max(deviation, FLOOR * abs(usual))
        distance = (loss - usual) / deviation if deviation else 0.0
        if distance <= self.threshold:
            return None, None
        self._is_spike = True
        if was_spike:
            return distance, None
        return distance, (
            f"step {step}: loss {loss:.4g} is {distance:.1f} standard deviations above the median "
            f"{usual:.4g} of the last {len(before)} steps (train.spike_threshold="
            f"{self.threshold:g}); training goes on"
        )


def recent_losses(metrics: Path) -> list[float]:
    """The last finite losses of a metrics.jsonl, so that a resumed run sees the same spikes."""
    if not metrics.exists():
        return []
    with open(metrics, encoding="utf-8") as lines:
        found = (json.loads(line).get("loss") for line in deque(lines, 2 * WINDOW))
        return [loss for loss in found if loss is not None][-WINDOW:]
